"""Pickled releases, for the one time that they are converted: read as tensors and nothing else, never run."""

from pathlib import Path

import torch
from torch import Tensor

from weft.backbones.checkpoint import PICKLES, read_json
from weft.errors import CheckpointError


def find_pickles(source: Path) -> list[Path]:
    """`source` itself, the one in a folder, or the shards of `pytorch_model.bin.index.json` there.

    Raises:
        CheckpointError: there is none, or it is not clear which is meant.
    """
    if source.is_file():
        return [source]
    index = source / "pytorch_model.bin.index.json"
    if index.is_file():
        return [source / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    found = sorted(path for path in source.glob("*") if path.suffix in PICKLES)
    if len(found) != 1:
        raise CheckpointError(
            f"there are {len(found)} pickled files and no index of them" if found else "there is no pickled file",
            where=str(source),
            fix="name the file that holds the model, or fetch pytorch_model.bin.index.json",
        )
    return found


def read_pickle(path: Path, within: str | None = None) -> dict[str, Tensor]:
    """Tensors by name, left on the disk until they are used.

    Args:
        within: the entry that holds them, if the pickle has one of that name.

    Raises:
        CheckpointError: it is damaged, or holds more than tensors.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a refused pickle, a damaged one and a cut archive are different types
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"this cannot be read as tensors alone, and what else a pickle holds could run code: {reason}",
            where=str(path),
            fix="fetch the original file of the release again",
        ) from error
    tensors = found.get(within, found) if isinstance(found, dict) else None
    if (
        not tensors
        or not isinstance(tensors, dict)
        or not all(isinstance(tensor, Tensor) for tensor in tensors.values())
    ):
        raise CheckpointError("this holds more than tensors by name", where=str(path), fix="give a state dict")
    return tensors
