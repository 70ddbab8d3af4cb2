"""The generalists that exist, by name. A new one is a file in this folder and a row here."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import UsageError

if TYPE_CHECKING:
    from weft.backbones.base import Backbone


def _tiny(name: str) -> "Backbone":
    from weft.backbones import tiny

    return tiny.load(name)


BACKBONES: "dict[str, Callable[[str], Backbone]]" = {"tiny": _tiny, "nano": _tiny}
"""Name -> what loads it. `tiny` is trained and ships with the package; `nano` is random and instant, for tests."""


def load_backbone(name: str) -> "Backbone":
    """A frozen generalist in evaluation mode: a name from `BACKBONES`, or a folder that a pretraining run wrote.

    Raises:
        UsageError: there is neither such a name nor such a folder.
        CheckpointError: its weights are missing, damaged, or of another shape.
    """
    known = name.removeprefix("weft/")
    if known in BACKBONES:
        return BACKBONES[known](known)
    if Path(name).is_dir():
        return _tiny(name)
    near = difflib.get_close_matches(known, BACKBONES, n=1, cutoff=0.5)
    raise UsageError(
        f"there is no model {name!r}, and no folder of that name",
        where="MODEL",
        fix=f"did you mean {near[0]}?" if near else f"use one of {', '.join(BACKBONES)}, or the folder of a model",
    )


def load_model(name: str, adapter: Path | str | None = None) -> "Backbone":
    """`load_backbone`, with a trained adapter from a folder attached to it.

    Raises:
        AdapterError: the folder is no adapter, or not one for this model.
    """
    backbone = load_backbone(name)
    if adapter is not None:
        from weft.adapters import load_adapter

        load_adapter(backbone, Path(adapter))
    return backbone
