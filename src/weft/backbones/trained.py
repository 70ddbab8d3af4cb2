"""What training changes in a backbone: an adapter, a synchroniser beside it, and parameters of its own, by name.

    adapter/  adapter_config.json  adapter_model.safetensors  weft_base.json    the adapter, as PEFT saves it
              synchronizer/                                                     as `weft.synchronizer` saves it
              parts.json  parts.safetensors                                     the backbone's own parameters

A folder holds any of the three. This is the one place that knows of all; each is saved and checked by its own package.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from weft.adapters import BASE_RECORD, adapter_parameters, detach, load_adapter, save_adapter
from weft.adapters.inspection import read_base
from weft.atomic import MANIFEST, write_json
from weft.errors import AdapterError, ConfigError
from weft.synchronizer.adapter import CONFIG as SYNCHRONIZER_CONFIG
from weft.synchronizer.adapter import (
    AttachedSynchronizer,
    detach_synchronizer,
    load_synchronizer,
    read_synchronizer_base,
    save_synchronizer,
    synchronizer_parameters,
)

if TYPE_CHECKING:
    from weft.backbones.base import Backbone

SYNCHRONIZER, PARTS, PARTS_RECORD = "synchronizer", "parts.safetensors", "parts.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", BASE_RECORD)


@dataclass(frozen=True)
class Parts:
    """Parameters of the backbone itself that are trained, by the names they have without an adapter."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """As the backbone held them; while they are trained they are in fp32."""

    @torch.no_grad()
    def lower(self) -> None:
        """Hold them again as the backbone did."""
        for name, parameter in self.parameters.items():
            parameter.data = parameter.data.to(self.dtypes[name])


def choose_parts(backbone: "Backbone", patterns: Sequence[str]) -> Parts:
    """Let the parameters be trained in whose names one of the regular expressions is found.

    Raises:
        ConfigError: an expression is found in no name.
    """
    own = dict(own_parameters(backbone))
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in own):
            kinds = ", ".join(dict.fromkeys(name.split(".")[0] for name in own))
            raise ConfigError(
                f"parts: {pattern!r} is found in no parameter of {backbone.name}",
                fix=f"names begin with {kinds}, as in dict(backbone.named_parameters())",
            )
    chosen = {name: own[name] for name in sorted(own) if any(re.search(pattern, name) for pattern in patterns)}
    dtypes = {name: parameter.dtype for name, parameter in chosen.items()}
    for parameter in chosen.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return Parts(chosen, dtypes)


def own_parameters(backbone: "Backbone") -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters that are no adapter's, by the names they have without one."""
    for name, parameter in cast(nn.Module, backbone).named_parameters():
        if ".moss_" not in name and ".modules_to_save." not in name:
            for wrapped in (".base_model.model.", ".base_layer.", ".original_module."):
                name = name.replace(wrapped, ".")
            yield name, parameter


def trained_parameters(backbone: "Backbone", parts: Parts = Parts()) -> dict[str, nn.Parameter]:
    """All that training changes and a checkpoint holds, in a fixed order: the adapter's by their names in it, those of
    an attached synchroniser after `synchronizer.`, the backbone's own after `parts.`."""
    found = adapter_parameters(backbone) if isinstance(backbone.decoder, PeftModel) else {}
    if isinstance(backbone.synchronizer, AttachedSynchronizer):
        found |= {f"synchronizer.{name}": tensor for name, tensor in synchronizer_parameters(backbone).items()}
    return found | {f"parts.{name}": parameter for name, parameter in parts.parameters.items()}


def save_trained(backbone: "Backbone", parts: Parts, folder: Path) -> None:
    """Write what there is of the three into an existing folder."""
    if isinstance(backbone.decoder, PeftModel):
        save_adapter(backbone, folder)
    if isinstance(backbone.synchronizer, AttachedSynchronizer):
        (folder / SYNCHRONIZER).mkdir()
        save_synchronizer(backbone, folder / SYNCHRONIZER)
    if parts.parameters:
        content = save({name: tensor.detach().contiguous().cpu() for name, tensor in parts.parameters.items()})
        (folder / PARTS).write_bytes(content)
        record = {"name": backbone.name, "revision": backbone.revision, "fingerprint": backbone.fingerprint}
        write_json(folder / PARTS_RECORD, {"base": record})


def load_trained(backbone: "Backbone", folder: Path | str) -> None:
    """Put all that a folder holds on a backbone, in place, for inference; its own parameters in the dtype it has.

    Raises:
        AdapterError: the folder holds nothing trained, a file is missing or damaged, or it belongs to other weights.
    """
    folder = Path(folder)
    _check_manifest(folder)
    has_parts, has_synchronizer = holds_parts(folder), (folder / SYNCHRONIZER).is_dir()
    if has_parts:
        _load_parts(backbone, folder)
    if holds_adapter(folder) or not (has_parts or has_synchronizer):
        load_adapter(backbone, folder)
    if has_synchronizer:
        load_synchronizer(backbone, folder / SYNCHRONIZER)


def detach_trained(backbone: "Backbone") -> None:
    """Take adapter and synchroniser off; its own parameters stay as they are."""
    if isinstance(backbone.synchronizer, AttachedSynchronizer):
        detach_synchronizer(backbone)
    if isinstance(backbone.decoder, PeftModel):
        detach(backbone)


def holds_adapter(folder: Path) -> bool:
    return any((folder / name).exists() for name in ADAPTER_FILES)


def holds_parts(folder: Path) -> bool:
    return any((folder / name).exists() for name in (PARTS, PARTS_RECORD))


def synchronizer_folder(folder: Path) -> Path | None:
    """Where a synchroniser is: beside what else was trained, or alone, as `save_synchronizer` writes it."""
    return next((at for at in (folder / SYNCHRONIZER, folder) if (at / SYNCHRONIZER_CONFIG).exists()), None)


@dataclass(frozen=True)
class PartsInspection:
    base: str
    names: tuple[str, ...]
    parameters: int


def inspect_parts(folder: Path) -> PartsInspection:
    """What of the backbone itself was trained.

    Raises:
        AdapterError: a file is missing or damaged.
    """
    sizes = {name: tensor.numel() for name, tensor in read_parts(folder)}
    return PartsInspection(_read_parts_base(folder)["name"], tuple(sizes), sum(sizes.values()))


def read_base_name(folder: Path) -> str | None:
    """The name of the model that a folder was trained on, if it says one.

    Raises:
        AdapterError: it holds nothing trained, or its record is damaged.
    """
    if holds_adapter(folder):
        return read_base(folder)
    if (folder / SYNCHRONIZER).is_dir():
        return read_synchronizer_base(folder / SYNCHRONIZER)
    if holds_parts(folder):
        return _read_parts_base(folder)["name"]
    return read_base(folder)


def read_parts(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The saved parameters of a backbone itself, one at a time.

    Raises:
        AdapterError: the file is missing or damaged.
    """
    try:
        with safe_open(folder / PARTS, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"the trained parts cannot be read: {error}", where=str(folder / PARTS), fix="copy the whole folder again"
        ) from error


@torch.no_grad()
def _load_parts(backbone: "Backbone", folder: Path) -> None:
    base, file = _read_parts_base(folder), str(folder / PARTS)
    if base["fingerprint"] != backbone.fingerprint:
        raise AdapterError(
            f"the parts were trained in {base['name']} with other weights than this {backbone.name}: "
            f"{base['fingerprint'][:8]}, not {backbone.fingerprint[:8]}",
            where=file,
            fix="load them into the weights that they were trained in",
        )
    own = dict(own_parameters(backbone))
    for name, tensor in read_parts(folder):
        if name not in own or own[name].shape != tensor.shape:
            has = tuple(own[name].shape) if name in own else "no such parameter"
            raise AdapterError(f"part {name} has shape {tuple(tensor.shape)}, this model has {has}", where=file)
        if not tensor.isfinite().all():
            raise AdapterError(f"part {name} holds values that are not finite", where=file)
        own[name].copy_(tensor)


def _read_parts_base(folder: Path) -> dict[str, str]:
    file = folder / PARTS_RECORD
    try:
        base = json.loads(file.read_text())["base"]
        return {key: base[key] for key in ("name", "fingerprint")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"the record of the trained parts cannot be read: {error}",
            where=str(file),
            fix="copy the whole folder again",
        ) from error


def _check_manifest(folder: Path) -> None:
    """A folder must not load as less than it was."""
    try:
        names = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return  # made by PEFT, or by hand
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{MANIFEST} cannot be read: {error}", where=str(folder), fix="copy the whole folder again"
        ) from error
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise AdapterError(f"no {missing} in the adapter folder", where=str(folder), fix="copy the whole folder again")
