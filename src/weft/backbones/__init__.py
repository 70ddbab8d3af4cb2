"""The generalists that exist, by name and by family. A new one is a file in this folder and a row here."""

import difflib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from weft.backbones.loading import LoadConfig
from weft.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from weft.backbones.base import Backbone


@dataclass(frozen=True)
class Family:
    """A module of this folder: `load(checkpoint, name, options)`, `save(model, folder)`, `nano()`, and
    `open_folder(folder)` where a checkpoint is more than one folder of tensors."""

    module: str
    types: tuple[str, ...]
    """How `model_type` in config.json, or the pipeline's class in model_index.json, begins."""

    def load_module(self) -> ModuleType:
        return import_module(f"weft.backbones.{self.module}")


FAMILIES = {
    "chameleon": Family("chameleon", ("chameleon",)),
    "janus": Family("janus", ("janus", "multi_modality")),
    "emu3": Family("emu3", ("emu3",)),
    "emu2": Family("emu2", ("emu2", "emuforcausallm", "emuvisualgeneration")),
    "mm_interleaved": Family("mm_interleaved", ("mm_interleaved",)),
}
"""Those with released checkpoints."""

BUNDLED = ("tiny", "tiny-mm", "nano")
"""`tiny` is trained and ships with the package, `tiny-mm` too, an MM-Interleaved; `nano` is random and instant, for
tests."""
_TINY_MM = Path(__file__).parent / "mm_interleaved" / "tiny"
NANO = {f"nano-{family}": family for family in FAMILIES}
"""Random and instant, one of each family, to try things out: what works with one works with its real likes."""


def load_backbone(name: str, load: LoadConfig = LoadConfig(), *, device: str = "cpu") -> "Backbone":
    """A frozen generalist in evaluation mode.

    Args:
        name: one of `BUNDLED` and `NANO`, the folder of a model, or owner/name of a repository on the hub.
        device: where it goes if `load` names none.

    Raises:
        UsageError: there is no such model, or it cannot be held as `load` asks.
        CheckpointError: its files are missing, damaged, of an unknown family, or do not fit together.
    """
    known = name.removeprefix("weft/")
    options = load.options(device)
    if known in NANO:
        return FAMILIES[NANO[known]].load_module().nano().to(options.device)
    from weft.backbones import tiny
    from weft.backbones.checkpoint import Checkpoint

    if known == "tiny-mm":
        return FAMILIES["mm_interleaved"].load_module().load(Checkpoint.open(_TINY_MM), known, options)
    if known in BUNDLED:
        return tiny.load(known).to(options.device)
    if not Path(name).exists() and "/" not in name:
        near = difflib.get_close_matches(known, (*BUNDLED, *NANO), n=1, cutoff=0.5)
        raise UsageError(
            f"there is no model {name!r}, and no folder of that name",
            where="MODEL",
            fix=f"did you mean {near[0]}?" if near else f"use one of {', '.join(BUNDLED)}, or the folder of a model",
        )
    from weft.backbones.hub import find

    found = find(name, revision=load.revision)
    family = family_of(found.folder)
    if family is None:
        return tiny.load(str(found.folder)).to(options.device)
    module = FAMILIES[family].load_module()
    opened = getattr(module, "open_folder", Checkpoint.open)(found.folder)
    backbone = module.load(opened, name, options)
    backbone.revision = found.revision
    return backbone


def family_of(folder: Path) -> str | None:
    """The family of a model's folder; None: it is like the bundled ones.

    Raises:
        CheckpointError: it is no model's folder, or of a family that is not known.
    """
    from weft.backbones.checkpoint import read_json

    for file, key in (("config.json", "model_type"), ("model_index.json", "_class_name")):
        if (folder / file).is_file():
            config: dict[str, Any] = read_json(folder / file)
            if "codec" in config and key not in config:
                return None
            said = str(config.get(key) or next(iter(config.get("architectures") or ()), "")).lower()
            for name, family in FAMILIES.items():
                if said.startswith(family.types):
                    return name
            raise CheckpointError(
                f"this is a model of type {said!r}, none of {', '.join(FAMILIES)}",
                where=str(folder / file),
                fix="`weft models` lists what can be loaded",
            )
    raise CheckpointError(
        "there is no config.json: this is no model's folder",
        where=str(folder),
        fix="give the folder that holds it; of releases as .pth, .pt or .bin make one: weft models convert",
    )


def save_backbone(backbone: "Backbone", folder: Path) -> None:
    """Write a model into an existing folder, as `load_backbone` reads it."""
    import_module(type(backbone).__module__).save(backbone, folder)


def load_model(
    name: str,
    adapter: Path | str | None = None,
    load: LoadConfig = LoadConfig(),
    *,
    device: str = "cpu",
) -> "Backbone":
    """`load_backbone`, with what was trained from a folder: an adapter, a synchroniser, parts of the model itself.

    Raises:
        AdapterError: the folder holds nothing of that, or not for this model.
    """
    backbone = load_backbone(name, load, device=device)
    if adapter is not None:
        from weft.backbones.trained import load_trained

        load_trained(backbone, Path(adapter))
    return backbone
