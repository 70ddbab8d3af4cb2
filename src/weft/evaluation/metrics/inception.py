"""The network behind FID and KID: Inception of 2015-12-05 (Szegedy et al. 2015, arXiv:1512.00567), up to its last pool.

Not the one of torchvision: it has 1008 classes, its average pools do not count padding, and the last block takes the
maximum where the others take the mean. Names of parts are those of the weights that are published in torch's form as
pt_inception-2015-12-05-6726825d.pth, which the user has; nothing is downloaded.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.errors import CheckpointError

FEATURES, CLASSES = 2048, 1008
PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"

Pool = Literal["mean", "max", "halve"]


class Layer(NamedTuple):
    width: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


Chain = tuple[Layer | tuple[Layer, Layer], ...]
"""Layers one after another; two at the end read the same."""


class _Convolution(nn.Module):
    """Followed by normalisation and ReLU; what strides has no padding."""

    def __init__(
        self, channels: int, width: int, kernel: int | tuple[int, int] = 1, stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        rows, cols = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, cols // 2) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(channels, width, (rows, cols), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Chains side by side, the last of them behind a pool, joined along the channels."""

    def __init__(self, channels: int, pool: Pool, **chains: Chain) -> None:
        super().__init__()
        self.pool = pool
        self.chains = [tuple(self._add(channels, name, chain)) for name, chain in chains.items()]

    def _add(self, channels: int, name: str, chain: Chain) -> Iterator[tuple[str, ...]]:
        """The names of each step's layers."""
        for number, step in enumerate(chain, 1):
            base = f"{name}_{number}" if len(chain) > 1 else name
            layers = {base: step} if isinstance(step, Layer) else {f"{base}a": step[0], f"{base}b": step[1]}
            for each, layer in layers.items():
                self.add_module(each, _Convolution(channels, *layer))
            yield tuple(layers)
            channels = sum(layer.width for layer in layers.values())

    def forward(self, x: Tensor) -> Tensor:
        found = []
        pooled = pool(x, self.pool)
        for names in self.chains:
            branch = pooled if names[0][0] == "branch_pool" else x
            for step in names:
                branch = torch.cat([self.get_submodule(name)(branch) for name in step], 1)
            found.append(branch)
        return torch.cat([*found, pooled] if self.pool == "halve" else found, 1)


def pool(x: Tensor, kind: Pool) -> Tensor:
    """Of 3 x 3; means leave out what lies outside of the picture."""
    if kind == "halve":
        return F.max_pool2d(x, 3, 2)
    if kind == "max":
        return F.max_pool2d(x, 3, 1, 1)
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _up_to_5x5(channels: int, pooled: int) -> _Block:
    return _Block(
        channels, "mean", branch1x1=(Layer(64),), branch5x5=(Layer(48), Layer(64, 5)),
        branch3x3dbl=(Layer(64), Layer(96, 3), Layer(96, 3)), branch_pool=(Layer(pooled),),
    )  # fmt: skip


def _first_halving(channels: int) -> _Block:
    return _Block(
        channels, "halve", branch3x3=(Layer(384, 3, 2),),
        branch3x3dbl=(Layer(64), Layer(96, 3), Layer(96, 3, 2)),
    )  # fmt: skip


def _up_to_7x7(channels: int, inner: int) -> _Block:
    wide, tall = (1, 7), (7, 1)
    return _Block(
        channels, "mean", branch1x1=(Layer(192),), branch7x7=(Layer(inner), Layer(inner, wide), Layer(192, tall)),
        branch7x7dbl=(Layer(inner), Layer(inner, tall), Layer(inner, wide), Layer(inner, tall), Layer(192, wide)),
        branch_pool=(Layer(192),),
    )  # fmt: skip


def _second_halving(channels: int) -> _Block:
    return _Block(
        channels, "halve", branch3x3=(Layer(192), Layer(320, 3, 2)),
        branch7x7x3=(Layer(192), Layer(192, (1, 7)), Layer(192, (7, 1)), Layer(192, 3, 2)),
    )  # fmt: skip


def _forked(channels: int, pooling: Pool) -> _Block:
    fork = (Layer(384, (1, 3)), Layer(384, (3, 1)))
    return _Block(
        channels, pooling, branch1x1=(Layer(320),), branch3x3=(Layer(384), fork),
        branch3x3dbl=(Layer(448), Layer(384, 3), fork), branch_pool=(Layer(192),),
    )  # fmt: skip


class Inception(nn.Module):
    """Random weights; `load_inception` reads those that were published."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, pad=False)
        self.Mixed_5b = _up_to_5x5(192, pooled=32)
        self.Mixed_5c = _up_to_5x5(256, pooled=64)
        self.Mixed_5d = _up_to_5x5(288, pooled=64)
        self.Mixed_6a = _first_halving(288)
        self.Mixed_6b = _up_to_7x7(768, inner=128)
        self.Mixed_6c = _up_to_7x7(768, inner=160)
        self.Mixed_6d = _up_to_7x7(768, inner=160)
        self.Mixed_6e = _up_to_7x7(768, inner=192)
        self.Mixed_7a = _second_halving(768)
        self.Mixed_7b = _forked(1280, "mean")
        self.Mixed_7c = _forked(FEATURES, "max")
        # not used by any metric here; its shape tells this network from others
        self.fc = nn.Linear(FEATURES, CLASSES)
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, 299, 299), about -1..1 -> (n, 2048), the means of the last block's maps."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(pool(x, "halve")))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(pool(x, "halve"))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def load_inception(file: Path) -> Inception:
    """The published weights, as they came or as safetensors.

    Raises:
        CheckpointError: the file cannot be read, or holds another network's weights.
    """
    stored = {name: tensor for name, tensor in _read(file).items() if not name.endswith("num_batches_tracked")}
    # sizes are all that is needed of it until the file is known to be right
    with torch.device("meta"):
        network = Inception()
    wanted = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name in [*wanted, *stored]:
        if name in wanted and name in stored and wanted[name].shape == stored[name].shape:
            continue
        shapes = [tuple(each[name].shape) if name in each else "none" for each in (stored, wanted)]
        raise CheckpointError(
            f"these are not the weights of the Inception of FID: {name} is {shapes[0]}, not {shapes[1]}",
            where=str(file),
            fix=f"give {PUBLISHED}, which torchvision's inception_v3 is not",
        )
    counts = {name: torch.tensor(0) for name in network.state_dict() if name not in wanted}
    network.load_state_dict({name: tensor.float() for name, tensor in stored.items()} | counts, assign=True)
    return network.requires_grad_(False).eval()


def _read(file: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights cannot be read: {error}", where=str(file), fix=f"give {PUBLISHED}") from error
    except Exception as error:  # a refused pickle, a damaged one and a cut archive are of different types
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"weights cannot be read as tensors alone: {reason}", where=str(file), fix=f"give {PUBLISHED}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError("this holds more than tensors by name", where=str(file), fix=f"give {PUBLISHED}")
    return found
