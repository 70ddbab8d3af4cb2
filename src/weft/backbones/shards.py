"""Weights written as transformers and diffusers read them: one file, or several of `SHARD` bytes with their index."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from weft.atomic import write_json

SHARD = 2**31


def write_weights(folder: Path, tensors: Mapping[str, Tensor], stem: str = "model") -> None:
    """Write tensors, which may lie on any device or be mapped from a file, into an existing folder."""

    def copy(key: str) -> Tensor:
        # copies: tensors that share their storage cannot be written
        return tensors[key].clone(memory_format=torch.contiguous_format)

    write_made({key: tensor.nbytes for key, tensor in tensors.items()}, copy, folder, stem)


def write_made(sizes: Mapping[str, int], make: Callable[[str], Tensor], folder: Path, stem: str = "model") -> None:
    """Write tensors that are made when their file is written: memory holds those of one file.

    Args:
        sizes: bytes of each, in the order in which they are written.
        make: key -> a contiguous tensor.
        stem: how the names of the files begin.
    """
    from safetensors.torch import save_file

    groups = list(_groups(sizes))
    names = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = [f"{stem}.safetensors"]
    for name, keys in zip(names, groups, strict=True):
        save_file({key: make(key) for key in keys}, folder / name, metadata={"format": "pt"})
    if len(groups) > 1:
        files = {key: name for name, keys in zip(names, groups, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for key, size in sizes.items():
        if group and held + size > SHARD:
            yield group
            group, held = [], 0
        group.append(key)
        held += size
    yield group
