"""What an adapter folder holds, read without its base model."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.adapters import BASE_RECORD
from weft.adapters.config import PEFT_TYPE, Branch, Branches, MossConfig
from weft.errors import AdapterError

Modality = Literal["text", "image"]


@dataclass(frozen=True)
class LayerBranch:
    """One branch of one layer."""

    layer: str
    modality: Modality
    branch: Branch
    parameters: int
    norm: float
    """Of the up-projection, root of the sum of squares; 0 means that the branch does nothing here."""


@dataclass(frozen=True)
class Inspection:
    """An adapter folder whose tensors are those that its configuration asks for."""

    folder: Path
    config: MossConfig
    base: dict[str, str] | None
    """Name and fingerprint of the model it was trained on, where Weft saved it."""
    branches: tuple[LayerBranch, ...]
    saved_modules: int
    """Parameters of modules that were trained whole."""
    size: int
    """Bytes of the folder."""

    @property
    def kind(self) -> str:
        return kind_of(self.config.branches)

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(branch.layer for branch in self.branches))

    @property
    def parameters(self) -> int:
        return sum(branch.parameters for branch in self.branches) + self.saved_modules

    def of(self, modality: Modality) -> tuple[LayerBranch, ...]:
        return tuple(branch for branch in self.branches if branch.modality == modality)

    def idle(self, modality: Modality) -> bool:
        """There is such a branch, and it does nothing in any layer: it was never trained."""
        found = self.of(modality)
        return bool(found) and all(branch.norm == 0 for branch in found)

    def to_json(self) -> dict[str, Any]:
        config = self.config.to_dict()
        return {
            "kind": self.kind,
            "base": self.base or {"name": self.config.base_model_name_or_path},
            **{
                key: config[key] for key in ("text", "image", "routing", "context_images", "target_modules", "patterns")
            },
            "modules_to_save": self.config.modules_to_save,
            "layers": len(self.layers),
            "parameters": {
                "text": sum(branch.parameters for branch in self.of("text")),
                "image": sum(branch.parameters for branch in self.of("image")),
                "saved_modules": self.saved_modules,
                "all": self.parameters,
            },
            "idle": [modality for modality in ("text", "image") if self.idle(modality)],
            "branches": [asdict(branch) for branch in self.branches],
            "bytes": self.size,
        }


def kind_of(branches: Branches) -> str:
    """The name of what these branches are: that of the paper, where it has one."""
    text, image = branches.text, branches.own_image
    if branches.shared:
        return "lora" if text is not None and text.rank != "full" else "full"
    if text is None or image is None:
        return f"{'image' if text is None else 'text'} branch only"
    if image.experts:
        return "sam_conv_lora"
    if image.windows:
        return "moss"
    return "full, two weight sets" if text.rank == image.rank == "full" else "moe_lora"


def inspect_adapter(folder: Path) -> Inspection:
    """Read a folder that `save_adapter` or PEFT wrote.

    Raises:
        AdapterError: it is not one, it is of another type, or the first tensor that is missing, unknown or of another
            shape than its configuration says.
    """
    config, base = _read_config(folder)
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            tensors = {key: cast(Tensor, file.get_tensor(key)) for key in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"adapter_model.safetensors cannot be read: {error}", where=str(folder), fix="copy the whole folder again"
        ) from error
    own: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, found, part = key.removeprefix("base_model.model.").partition(".moss_")
        if found:
            own.setdefault(layer, {})[part] = tensor
    if not own:
        raise AdapterError("the folder holds no adapted layer", where=str(folder), fix="train or save it again")
    branches = tuple(branch for layer, parts in own.items() for branch in _read_layer(folder, config, layer, parts))
    saved = sum(tensor.numel() for key, tensor in tensors.items() if ".moss_" not in key)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Inspection(folder, config, base, branches, saved, size)


def read_base(folder: Path) -> str | None:
    """The name of the model that an adapter folder belongs to, if it says one.

    Raises:
        AdapterError: this is no folder of an adapter of Weft's type.
    """
    config, base = _read_config(folder)
    return base["name"] if base else config.base_model_name_or_path


def _read_config(folder: Path) -> tuple[MossConfig, dict[str, str] | None]:
    file = folder / "adapter_config.json"
    try:
        peft_type = json.loads(file.read_text()).get("peft_type")
        if peft_type != PEFT_TYPE:
            raise AdapterError(
                f"this is a {peft_type} adapter, not one of Weft's ({PEFT_TYPE})",
                where=str(file),
                fix="use PEFT itself for it",
            )
        config = MossConfig.from_pretrained(folder)
        record = folder / BASE_RECORD
        base = json.loads(record.read_text()) if record.is_file() else None
    except AdapterError as error:
        error.where, error.fix = error.where or str(file), error.fix or "use the file that was saved with the tensors"
        raise
    except FileNotFoundError as error:
        raise AdapterError(
            "no adapter_config.json in the folder", where=str(folder), fix="give the folder that holds it"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"it cannot be read: {error}", where=str(file), fix="copy the whole folder again") from error
    return config, base


def _read_layer(folder: Path, config: MossConfig, layer: str, parts: dict[str, Tensor]) -> Iterator[LayerBranch]:
    settings = config.branches_of(layer)
    chosen: tuple[tuple[Modality, Branch | None], ...] = (("text", settings.text), ("image", settings.own_image))
    wanted = {f"{modality}_{part}": shape for modality, branch in chosen if branch for part, shape in _shapes(branch)}
    for part in sorted(wanted.keys() | parts.keys()):
        key = f"{layer}.moss_{part}"
        if part not in parts:
            raise AdapterError(f"tensor {key} is missing", where=str(folder), fix="copy the whole folder again")
        if part not in wanted:
            raise AdapterError(
                f"tensor {key} is not what the configuration asks for",
                where=str(folder),
                fix="use the adapter_config.json that was saved with it",
            )
        shape = tuple(parts[part].shape)
        if len(shape) != 2 or any(want not in (None, size) for want, size in zip(wanted[part], shape, strict=True)):
            asked = " x ".join("any" if size is None else str(size) for size in wanted[part])
            raise AdapterError(
                f"tensor {key} has shape {shape}, the configuration asks for {asked}",
                where=str(folder),
                fix="use the adapter_config.json that was saved with it",
            )
        if not bool(parts[part].isfinite().all()):
            raise AdapterError(
                f"tensor {key} holds values that are not finite",
                where=str(folder),
                fix="train again, with a lower learning rate, or take an earlier checkpoint",
            )
    for modality, branch in chosen:
        if branch is not None:
            mine = [parts[f"{modality}_{part}"] for part, _ in _shapes(branch)]
            norm = parts[f"{modality}_B"].double().norm().item()
            yield LayerBranch(layer, modality, branch, sum(tensor.numel() for tensor in mine), norm)


def _shapes(branch: Branch) -> Iterator[tuple[str, tuple[int | None, int | None]]]:
    """A branch's tensors and their sizes, as far as they are known without the base model."""
    if branch.rank == "full":
        yield "B", (None, None)
        return
    yield "A", (len(branch.taps.taps) * branch.rank, None)
    yield "B", (None, branch.rank)
    if branch.experts:
        yield "experts", (sum(len(window.taps) for window in branch.expert_taps) * branch.rank, branch.rank)
    if branch.gate:
        yield "gate", (len(branch.experts), branch.rank)
