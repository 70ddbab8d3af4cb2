"""A synchroniser for a model that was made without one: an eye, and branches in its decoder stack, saved alone.

    attach_synchronizer(backbone, SynchronizerConfig())      outputs do not change until it is trained
    save_synchronizer(backbone, folder)                      synchronizer_config.json  synchronizer.safetensors
    load_synchronizer(fresh, folder)      detach_synchronizer(fresh)

It is no part of the backbone's modules: the names of their weights, and what adapters find in them, stay as they are.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from weft.atomic import write_json
from weft.config import Config
from weft.errors import AdapterError, WeftError
from weft.synchronizer.attach_llm import DecoderSyncConfig, attach_to_decoder
from weft.synchronizer.eye import Eye, EyeConfig
from weft.synchronizer.sight import Synchronizer

CONFIG, TENSORS = "synchronizer_config.json", "synchronizer.safetensors"


class SynchronizerConfig(Config):
    """The synchronizer section of a recipe."""

    eye: EyeConfig = EyeConfig()
    every: PositiveInt = 4
    """Of so many decoder layers the first gets a branch."""
    value_width: PositiveInt = 64
    """Of all heads together."""
    heads: PositiveInt = 8
    points: PositiveInt = 4
    """Samples per head, scale and picture."""
    max_images: PositiveInt = 50
    """One more than a position can see."""
    offset_init: float = 3.0
    """Offsets start uniform in [-offset_init, offset_init] cells of the middle map, from the middle of a picture."""

    def to_decoder(self) -> DecoderSyncConfig:
        """What the branches are made of."""
        own = self.model_dump(exclude={"eye"})
        sides = self.eye.sides
        return DecoderSyncConfig(feature_width=self.eye.width, sides=sides, base=sides[len(sides) // 2], **own)


@dataclass(frozen=True, kw_only=True)
class AttachedSynchronizer(Synchronizer):
    """One that can be saved alone and taken off again; a model's own cannot."""

    config: SynchronizerConfig


class Synchronizable(Protocol):
    """What of a backbone a synchroniser needs."""

    name: str
    fingerprint: str
    revision: str | None
    decoder: nn.Module
    synchronizer: Synchronizer | None


def attach_synchronizer(backbone: Synchronizable, config: SynchronizerConfig, *, seed: int = 0) -> AttachedSynchronizer:
    """Let a backbone look at pictures again while it reads on, in place; weights are drawn from `seed`.

    Outputs do not change until it is trained. The backbone may have an adapter, or get one later; an adapter that
    trains norms whole comes first and is detached last, because the norms that it puts in do not know the branches.

    Raises:
        AdapterError: the backbone has a synchroniser.
        UsageError: its decoder stack is not LLaMA-like.
    """
    if backbone.synchronizer is not None:
        fix = "detach_synchronizer(backbone) first"
        if not isinstance(backbone.synchronizer, AttachedSynchronizer):
            fix = "train its own: name it under `parts` in a recipe"
        raise AdapterError(f"{backbone.name} already has a synchroniser", fix=fix)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        insertion = attach_to_decoder(backbone.decoder, config.to_decoder())
        eye = Eye(config.eye).to(next(insertion.parameters()).device)
    attached = AttachedSynchronizer(eye, insertion, config.eye.side, config=config)
    backbone.synchronizer = attached
    return attached


def detach_synchronizer(backbone: Synchronizable) -> None:
    """Remove it; the decoder is again what it was, bit for bit."""
    _attached(backbone).insertion.detach()
    backbone.synchronizer = None


def synchronizer_parameters(backbone: Synchronizable) -> dict[str, nn.Parameter]:
    """The attached synchroniser's parameters by name, in a fixed order: all that training changes."""
    return dict(sorted(_attached(backbone).named_parameters()))


def save_synchronizer(backbone: Synchronizable, folder: Path) -> None:
    """Write configuration and tensors, and what base they belong to, into an existing folder."""
    parameters = synchronizer_parameters(backbone)
    # saved to memory first: the library's own file writer hides why a disk refuses
    content = save({name: tensor.detach().contiguous().cpu() for name, tensor in parameters.items()})
    (folder / TENSORS).write_bytes(content)
    base = {"name": backbone.name, "revision": backbone.revision, "fingerprint": backbone.fingerprint}
    write_json(folder / CONFIG, {"synchronizer": _attached(backbone).config.model_dump(mode="json"), "base": base})


def load_synchronizer(backbone: Synchronizable, folder: Path | str) -> AttachedSynchronizer:
    """Put a saved synchroniser on a backbone, in place, for inference.

    Raises:
        AdapterError: a file is missing or damaged, a tensor is missing, unknown, of another shape or not finite, it was
            trained on other weights than these, or the backbone has one already.
    """
    folder = Path(folder)
    config = _read_config(backbone, folder)
    try:
        tensors = load((folder / TENSORS).read_bytes())
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"the tensors of the synchroniser cannot be read: {error}",
            where=str(folder / TENSORS),
            fix="copy the whole folder again, or save it again",
        ) from error
    attached = attach_synchronizer(backbone, config)
    try:
        _fill(synchronizer_parameters(backbone), tensors, folder / TENSORS)
    except WeftError:
        detach_synchronizer(backbone)
        raise
    attached.eye.requires_grad_(False).eval()
    attached.insertion.requires_grad_(False).eval()
    return attached


def read_synchronizer_base(folder: Path) -> str:
    """The name of the model that a saved synchroniser belongs to.

    Raises:
        AdapterError: this is no folder of one.
    """
    return read_record(folder)[1]["name"]


def _read_config(backbone: Synchronizable, folder: Path) -> SynchronizerConfig:
    config, base = read_record(folder)
    if base["fingerprint"] != backbone.fingerprint:
        raise AdapterError(
            f"the synchroniser was trained on {base['name']} with other weights than this {backbone.name}: "
            f"{base['fingerprint'][:8]}, not {backbone.fingerprint[:8]}",
            where=str(folder),
            fix="load it on the weights that it was trained on",
        )
    return config


def read_record(folder: Path) -> tuple[SynchronizerConfig, dict[str, str]]:
    """The configuration of a saved synchroniser, and name and fingerprint of the model it belongs to.

    Raises:
        AdapterError: this is no folder of one.
    """
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text())
        base = values["base"]
        return SynchronizerConfig.model_validate(values["synchronizer"]), {k: base[k] for k in ("name", "fingerprint")}
    except FileNotFoundError as error:
        raise AdapterError(
            f"no {CONFIG} in the folder of a synchroniser", where=str(folder), fix="give the folder that holds it"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"the synchroniser's configuration cannot be read: {error}",
            where=str(file),
            fix="copy the whole folder again",
        ) from error


@torch.no_grad()
def _fill(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], file: Path) -> None:
    for name in sorted(parameters.keys() | tensors.keys()):
        given, wanted = tensors.get(name), parameters.get(name)
        fault = None
        if given is None or wanted is None:
            fault = "is missing" if given is None else "is not what the configuration asks for"
        elif given.shape != wanted.shape:
            fault = f"has shape {tuple(given.shape)}, the configuration asks for {tuple(wanted.shape)}"
        elif not given.isfinite().all():
            fault = "holds values that are not finite"
        if fault:
            raise AdapterError(f"tensor {name} {fault}", where=str(file), fix="use the folder as it was saved")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _attached(backbone: Synchronizable) -> AttachedSynchronizer:
    if not isinstance(backbone.synchronizer, AttachedSynchronizer):
        raise AdapterError(
            f"{backbone.name} has no attached synchroniser",
            fix="attach_synchronizer(backbone, SynchronizerConfig()) first",
        )
    return backbone.synchronizer
