"""Modality-specialised adapters, at home in PEFT.

Importing this package registers the adapter type with PEFT: `get_peft_model(model, MossConfig(...))`, `save_pretrained`
and `PeftModel.from_pretrained` then work as for any other. Whoever runs the model says what its positions are:
`model(..., layout=layout)`, or `routing_of(model).set(layout)` before. Weft's own backbones do that in `forward`; for
them there is `attach`.
"""

import contextlib
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn

from weft.adapters.config import Branch, MossConfig
from weft.adapters.peft import MossModel, find_routing, register, withdraw
from weft.adapters.recipe import AdapterConfig
from weft.adapters.rings import RingCache
from weft.adapters.routing import RoutingState
from weft.atomic import write_json
from weft.errors import AdapterError, WeftError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "AdapterConfig", "Branch", "MossConfig", "MossModel", "RingCache", "RoutingState", "adapter_parameters", "attach",
    "detach", "load_adapter", "recompute_layers", "routing_of", "save_adapter",
]  # fmt: skip

register()

BASE_RECORD = "weft_base.json"


class Adaptable(Protocol):
    """What of a backbone adapters need."""

    name: str
    fingerprint: str
    revision: str | None
    decoder: nn.Module
    routing: RoutingState | None


def routing_of(model: nn.Module) -> RoutingState:
    """The routing state shared by the adapted layers of a model.

    Raises:
        AdapterError: the model has none.
    """
    routing = find_routing(model)
    if routing is None:
        raise AdapterError(
            "this model has no adapter that routes by modality", fix="call get_peft_model(model, MossConfig()) first"
        )
    return routing


def attach(backbone: Adaptable, config: AdapterConfig, *, seed: int = 0) -> PeftModel:
    """Put a fresh adapter on a backbone's decoder stack, in place; its random half is drawn from `seed`.

    Outputs do not change until it is trained. The decoder's own weights are frozen.
    """
    _check_free(backbone)
    with torch.random.fork_rng(devices=[]), _without_deprecations():
        torch.manual_seed(seed)
        model = get_peft_model(backbone.decoder, config.to_peft())
    # PEFT takes the name from the decoder, which has none
    model.peft_config["default"].base_model_name_or_path = backbone.name
    return _install(backbone, model)


def recompute_layers(backbone: Adaptable) -> None:
    """Compute the activations of an adapted decoder stack's layers again in the backward pass, to save memory."""
    # it warns that gradients would not reach embeddings, which are frozen and outside the stack
    logger, quiet = logging.getLogger("transformers.modeling_utils"), lambda _: False
    logger.addFilter(quiet)
    with warnings.catch_warnings():
        # transformers 5.23 gives the method a new name, PEFT 0.21 has the old one
        warnings.simplefilter("ignore", FutureWarning)
        _adapted(backbone).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logger.removeFilter(quiet)


def detach(backbone: Adaptable) -> None:
    """Remove the adapter; the decoder is again what it was, bit for bit."""
    model = _adapted(backbone)
    decoder = model.base_model.model
    for name in list(model.peft_config):  # PEFT's own unload would keep modules_to_save as they were trained
        withdraw(decoder, name)
    backbone.decoder, backbone.routing = decoder, None


def adapter_parameters(backbone: Adaptable) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, in a fixed order: all that training changes and a checkpoint holds."""
    return dict(sorted(_own_parameters(_adapted(backbone))))


def save_adapter(backbone: Adaptable, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does, and what base they belong to."""
    model = _adapted(backbone)
    model.save_pretrained(folder, save_embedding_layers=False)
    record = {"name": backbone.name, "revision": backbone.revision, "fingerprint": backbone.fingerprint}
    write_json(Path(folder) / BASE_RECORD, record)


def load_adapter(backbone: Adaptable, folder: Path | str) -> PeftModel:
    """Put a saved adapter on a backbone, in place, for inference.

    Raises:
        AdapterError: a file is missing, a tensor is missing, unknown or of another shape, or the adapter was trained on
            other weights than these.
    """
    folder = Path(folder)
    _check_free(backbone)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise AdapterError(
                f"no {name} in the adapter folder", where=str(folder), fix="give the folder that holds it"
            )
    try:
        if (folder / BASE_RECORD).is_file():
            record = json.loads((folder / BASE_RECORD).read_text())
            if record["fingerprint"] != backbone.fingerprint:
                raise AdapterError(
                    f"the adapter was trained on {record['name']} with other weights than this {backbone.name}: "
                    f"{record['fingerprint'][:8]}, not {backbone.fingerprint[:8]}",
                    where=str(folder),
                    fix="load it on the weights that it was trained on",
                )
        with _without_deprecations():
            return _install(backbone, PeftModel.from_pretrained(backbone.decoder, folder))
    except WeftError as error:
        withdraw(backbone.decoder, "default")
        error.where = error.where or str(folder)
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        withdraw(backbone.decoder, "default")
        raise AdapterError(
            f"the adapter cannot be read: {error}",
            where=str(folder),
            fix="copy the whole folder again, or save it again",
        ) from error


@contextlib.contextmanager
def _without_deprecations() -> "Iterator[None]":
    """PEFT 0.21 asks transformers 5.23 for a property by its old name; that is no news for whoever trains."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _install(backbone: Adaptable, model: PeftModel) -> PeftModel:
    backbone.decoder, backbone.routing = model, routing_of(model)
    return model


def _check_free(backbone: Adaptable) -> None:
    if isinstance(backbone.decoder, PeftModel):
        raise AdapterError(f"{backbone.name} already has an adapter", fix="detach(backbone) first")


def _adapted(backbone: Adaptable) -> PeftModel:
    if not isinstance(backbone.decoder, PeftModel):
        raise AdapterError(f"{backbone.name} has no adapter", fix="attach(backbone, AdapterConfig()) first")
    return backbone.decoder


def _own_parameters(model: PeftModel) -> "Iterator[tuple[str, nn.Parameter]]":
    parts = (".moss_", ".modules_to_save.")
    return ((name, p) for name, p in model.named_parameters() if any(part in name for part in parts))
