import pytest

from tests.serve.nonce import NonceBackbone
from tests.serve.running import running


@pytest.fixture(scope="module")
def nonce_server():
    """A server of the model whose answers show whose they are."""
    with running({"nonce": NonceBackbone()}) as server:
        yield server


@pytest.fixture(scope="module")
def nano_server():
    from weft.backbones import load_backbone

    with running({"nano": load_backbone("nano")}) as server:
        yield server
