"""Weft: teach a vision-language generalist to write illustrated documents. Public names; each loads on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.adapters import AdapterConfig, attach
    from weft.data import open_dataset
    from weft.document import Document, Image, Text, Turn, assistant, user
    from weft.errors import WeftError
    from weft.generate import SamplingConfig, generate, load_model
    from weft.train import TrainConfig, train

__version__ = "0.1.0"

_PLACES = {
    "AdapterConfig": "weft.adapters",
    "Document": "weft.document",
    "Image": "weft.document",
    "SamplingConfig": "weft.generate",
    "Text": "weft.document",
    "TrainConfig": "weft.train",
    "Turn": "weft.document",
    "WeftError": "weft.errors",
    "assistant": "weft.document",
    "attach": "weft.adapters",
    "generate": "weft.generate",
    "load_model": "weft.generate",
    "open_dataset": "weft.data",
    "train": "weft.train",
    "user": "weft.document",
}

__all__ = sorted(_PLACES)  # noqa: PLE0605
