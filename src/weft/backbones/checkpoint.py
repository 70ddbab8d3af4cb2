"""Released weights on disk: safetensors, checked from their headers, then read one tensor at a time into a module.

    Checkpoint.open(folder) -> fill(module on the meta device, checkpoint, rename)

Knows files and tensors. Which key is which parameter is known by each backbone; where a name's folder comes from, by
`hub.py`; where a filled module lies, by `placement.py`.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.errors import CheckpointError

Rename = Callable[[str], str | None]
"""A checkpoint's key -> the module's; None: knowingly not needed."""
Transform = Callable[[str, Tensor], Tensor]
"""(module's key, stored tensor) -> the tensor that is wanted. Is also called with meta tensors, to learn shapes."""
Quantize = Literal["8bit", "4bit"]

STEMS = ("model", "diffusion_pytorch_model")
"""Files of transformers and of diffusers begin so."""
PICKLES = frozenset({".bin", ".pth", ".pt", ".ckpt"})
NAMED = 3
"""Keys that a message names before it counts the rest."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
LONGEST_HEADER = 100 * 2**20
WHOLE = 2**18
"""Bytes up to which a fingerprint reads all of a tensor; of a larger one it reads `BLOCKS` blocks."""
BLOCKS, BLOCK = 32, 2**12


@dataclass(frozen=True)
class LoadOptions:
    """How weights are held."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    device_map: str | dict[str, str | int] | None = None
    """accelerate's, over `decoder`: "auto", or module name -> device."""
    quantize: Quantize | None = None
    """The decoder's linear layers, through bitsandbytes, on a CUDA device."""

    @property
    def staging(self) -> str:
        """Where `fill` puts a decoder: on the CPU, if `placement.py` then spreads or quantises it."""
        return self.device if self.device_map is None and self.quantize is None else "cpu"


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    start: int
    """Its first byte in the file."""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and weights in safetensors, of which only the headers have been read."""

    folder: Path
    config: dict[str, Any]
    """config.json."""
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path, *, subfolder: str | None = None, variant: str | None = None) -> "Checkpoint":
        """Open one file, or the shards that an index names, as transformers and diffusers write them.

        Args:
            variant: "bf16" for `model.bf16.safetensors` and its like; None: the plain files, or the only variant there.

        Raises:
            CheckpointError: no such folder; no weights, or pickled ones only; a shard or a tensor that the index names
                is missing; a file is shorter or longer than its header says, or its header is damaged; `config.json`
                is missing or no JSON object. No tensor was read by then.
        """
        root = Path(folder) / subfolder if subfolder else Path(folder)
        if not root.is_dir():
            raise CheckpointError("there is no such folder", where=str(root), fix="give the folder of a checkpoint")
        tensors = _read_weights(root, variant)
        return cls(root, read_json(root / "config.json"), tensors)

    def get(self, key: str) -> Tensor:
        """Read one tensor into memory of its own, so that the file may be replaced later."""
        info = self.tensors.get(key)
        if info is None:
            raise CheckpointError(f"there is no tensor {key}", where=str(self.folder))
        tensor = torch.empty(info.shape, dtype=info.dtype)
        _read_into(info, 0, memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data))
        return tensor

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights: the same however they are sharded, another after fine-tuning.

        SHA-256 over every key, dtype and shape, and the bytes of every tensor: all of them up to 256 KiB, beyond that
        32 blocks of 4 KiB, evenly spaced from the first byte to the last. What changes a large tensor between these
        blocks alone, such as an edit of a few rows in the middle of an embedding table, is not seen.
        """
        digest = hashlib.sha256()
        for key in sorted(self.tensors):
            info = self.tensors[key]
            digest.update(f"{key} {info.dtype} {info.shape}\n".encode())
            for offset, size in _sampled(info.bytes):
                digest.update(_read(info, offset, size))
        return digest.hexdigest()


def fill(
    module: nn.Module,
    checkpoint: Checkpoint,
    rename: Rename = lambda key: key,
    transform: Transform | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> None:
    """Give every parameter and buffer of a module, usually on the meta device, its tensor.

    Keys and shapes are compared first, from headers alone. Then tensors are read one at a time: at its peak, memory
    holds the module and one tensor as stored and as wanted. Buffers that checkpoints do not hold are made anew by
    `materialise_buffers`.

    Args:
        dtype: of floating-point tensors; None: as they are stored.

    Raises:
        CheckpointError: tensors are missing, unexpected, named twice, or of another shape; the first few are named.
    """
    sources = _match(module, checkpoint, rename, transform)

    def wanted(key: str) -> Tensor:
        tensor = checkpoint.get(sources[key])
        if transform is not None:
            tensor = transform(key, tensor)
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    for key in sources:
        _put(module, key, wanted(key))
    materialise_buffers(module, device)


def materialise_buffers(module: nn.Module, device: str = "cpu") -> None:
    """Compute the non-persistent buffers that a build on the meta device left empty, such as rotary frequencies.

    Each is taken from a second submodule of the same class, built from `config` alone as transformers does it.

    Raises:
        CheckpointError: the submodule that holds one has no `config` to be rebuilt from.
    """
    for path, part in module.named_modules():
        empty = {name for name in part._non_persistent_buffers_set if _is_meta(part._buffers[name])}
        if not empty:
            continue
        if not hasattr(part, "config"):
            raise CheckpointError(
                f"the buffer {path}.{min(empty)} is neither in the checkpoint nor computed from a configuration",
                fix="give it a value after the module is built on the meta device",
            )
        with torch.device("cpu"):
            fresh = type(part)(part.config)
        for name in empty:
            setattr(part, name, fresh.get_buffer(name).to(device))


def fingerprint_of(module: nn.Module) -> str:
    """SHA-256 over every key and byte of a small module, on the CPU."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.name} is missing", where=str(path.parent), fix="fetch it from where the weights came from"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=str(path), fix=_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path.name} holds {type(value).__name__} where an object is wanted", where=str(path), fix=_AGAIN
        )
    return value


_AGAIN = "it is damaged: fetch it again"


# --- keys -----------------------------------------------------------------------------------------------------------


def _match(module: nn.Module, checkpoint: Checkpoint, rename: Rename, transform: Transform | None) -> dict[str, str]:
    """The module's key -> the checkpoint's, in the order in which the files hold them."""
    wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
    renamed = [(rename(key), key) for key in checkpoint.tensors]
    uses = Counter(key for key, _ in renamed)
    missing = [key for key in wanted if key not in uses]
    unexpected = [source for key, source in renamed if key is not None and key not in wanted]
    twice = [f"{source} for {key}" for key, source in renamed if key in wanted and uses[key] > 1]
    sources = {key: source for key, source in renamed if key is not None and key in wanted}
    misshapen = []
    for key, source in sources.items():
        stored = torch.empty(checkpoint.tensors[source].shape, dtype=checkpoint.tensors[source].dtype, device="meta")
        found = stored if transform is None else transform(key, stored)
        if found.shape != wanted[key]:
            misshapen.append(f"{source} with {tuple(stored.shape)} for {key} with {tuple(wanted[key])}")
    troubles = [
        f"{len(keys)} {trouble}: {few(keys)}"
        for trouble, keys in (
            ("missing", missing), ("unexpected", unexpected), ("named twice", twice), ("of another shape", misshapen)
        )
        if keys
    ]  # fmt: skip
    if troubles:
        files = {info.file for info in checkpoint.tensors.values()}
        raise CheckpointError(
            f"these weights are not what this model holds; tensors {'; '.join(troubles)}",
            where=str(files.pop() if len(files) == 1 else checkpoint.folder),
            fix="give the checkpoint that belongs to this config.json, complete and unchanged",
        )
    return dict(sorted(sources.items(), key=lambda pair: _place(checkpoint.tensors[pair[1]])))


def _place(info: TensorInfo) -> tuple[str, int]:
    return str(info.file), info.start


def few(keys: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(keys) - NAMED
    return ", ".join(keys[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    tensor = tensor.contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # a part of what was stored would keep all of it in memory
    owner, _, name = key.rpartition(".")
    part = module.get_submodule(owner)
    old = part._parameters.get(name)
    setattr(part, name, tensor if old is None else nn.Parameter(tensor, requires_grad=old.requires_grad))


def _is_meta(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.is_meta


# --- files ----------------------------------------------------------------------------------------------------------


def _read_weights(root: Path, variant: str | None) -> dict[str, TensorInfo]:
    for part in [f".{variant}"] if variant else ["", *_only_variant(root)]:
        for stem in STEMS:
            whole = root / f"{stem}{part}.safetensors"
            if whole.is_file():
                return _read_header(whole)
            # the libraries have put the variant in two places
            for name in (f"{stem}.safetensors.index{part}.json", f"{stem}{part}.safetensors.index.json"):
                if (root / name).is_file():
                    return _read_shards(root / name)
    raise _no_weights(root, variant)


def _only_variant(root: Path) -> list[str]:
    """The variant of the files in a folder, with its dot, if they have one and the same."""
    name = re.compile(
        rf"(?:{'|'.join(STEMS)})(?:(\.\w+)\.safetensors(?:\.index\.json)?|\.safetensors\.index(\.\w+)\.json)"
    )
    found = {match[1] or match[2] for path in root.iterdir() if (match := name.fullmatch(path.name))}
    return list(found) if len(found) == 1 else []


def _no_weights(root: Path, variant: str | None) -> CheckpointError:
    wanted = f"{STEMS[0]}.{variant}.safetensors" if variant else f"{STEMS[0]}.safetensors"
    others = sorted(path.name for path in root.glob("*.safetensors*"))
    if others:
        return CheckpointError(
            f"there is no {wanted}, nor an index of its shards, among {few(others)}",
            where=str(root),
            fix="name the variant that is there, or fetch the missing files",
        )
    pickles = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in PICKLES)
    if pickles:
        return CheckpointError(
            f"the weights are pickled ({few(pickles)}), which can run code when read",
            where=str(root),
            fix=f"convert them once: weft models convert {root} OUT",
        )
    return CheckpointError(f"there are no weights: {wanted} is missing", where=str(root), fix="fetch the missing files")


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise CheckpointError("the index has no weight_map of tensors to files", where=str(index), fix=_AGAIN)
    shards: dict[str, dict[str, TensorInfo]] = {}
    for name in sorted(set(weights.values())):
        path = index.parent / name
        if Path(name).name != name:
            raise CheckpointError(f"the index names {name}, which is not in its folder", where=str(index), fix=_AGAIN)
        if not path.is_file():
            raise CheckpointError(
                "the index names this shard, and it is missing", where=str(path), fix="fetch the missing files"
            )
        shards[name] = _read_header(path)
    absent = [key for key, name in weights.items() if key not in shards[name]]
    if absent:
        raise CheckpointError(
            f"the index says that this shard holds {few(absent)}, and it does not",
            where=str(index.parent / weights[absent[0]]),
            fix="fetch index and shards again, of one revision",
        )
    return {key: shards[name][key] for key, name in weights.items()}


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file: 8 bytes with the header's length, the header in JSON, then the tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if head == b"version ":
            raise CheckpointError(
                "this is a pointer of Git LFS, not the weights", where=str(path), fix="fetch the weights: git lfs pull"
            )
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise CheckpointError("the header is cut off or damaged", where=str(path), fix=_AGAIN)
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {key: _info(entry, path, 8 + length) for key, entry in entries.items()}
        ends = sorted((info.start, info.start + info.bytes) for info in tensors.values())
        end = 8 + length
        for start, stop in ends:
            if start != end:
                raise ValueError(f"a tensor begins at byte {start}, the one before it ends at {end}")
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the header is damaged: {error}", where=str(path), fix=_AGAIN) from error
    if end != size:
        raise CheckpointError(
            f"the file has {size:,} bytes, its header speaks of {end:,}: it is "
            + ("cut off" if size < end else "longer than it should be"),
            where=str(path),
            fix=_AGAIN,
        )
    return tensors


def _info(entry: dict[str, Any], path: Path, start: int) -> TensorInfo:
    first, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in DTYPES or not all(type(n) is int and n >= 0 for n in (*shape, first, end)):
        raise ValueError(f"{entry} is no tensor that can be read here")
    info = TensorInfo(shape, DTYPES[entry["dtype"]], path, start + first)
    if info.bytes != end - first:
        raise ValueError(f"{entry} has {end - first} bytes for {info.bytes}")
    return info


def _read(info: TensorInfo, offset: int, size: int) -> bytearray:
    data = bytearray(size)
    _read_into(info, offset, memoryview(data))
    return data


def _read_into(info: TensorInfo, offset: int, into: memoryview) -> None:
    """Fill `into` with the bytes from `offset` of a tensor."""
    with open(info.file, "rb", buffering=0) as file:
        file.seek(info.start + offset)
        done = 0
        while done < len(into):
            read = file.readinto(into[done:])
            if not read:
                raise CheckpointError("the file became shorter while it was read", where=str(info.file), fix=_AGAIN)
            done += read


def _sampled(size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what a fingerprint reads of a tensor of `size` bytes."""
    if size <= WHOLE:
        yield 0, size
        return
    for i in range(BLOCKS):
        yield i * (size - BLOCK) // (BLOCKS - 1), BLOCK
