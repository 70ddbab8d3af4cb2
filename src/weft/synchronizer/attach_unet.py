"""Synchronisers in a picture decoder, diffusers' `UNet2DConditionModel`.

    s <- s + Conv1x1(MMFS(LayerNorm(s) + positions, LayerNorm(features)))        for every skip and for the middle,
                                                                                 once, before the way up

Every cell looks from its own place in the picture. The convolution is zero at the start, and the model as it was.
Source: Tian et al. 2024 (arXiv:2401.10208), section 3, and the released model; the paper's text has them after the
blocks of the way up instead.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from weft.config import Config
from weft.errors import UsageError
from weft.ops.positions import grid_sin_cos, resize_table
from weft.synchronizer.attach import EPS, Branch, Insertion, WithoutImages
from weft.synchronizer.mmfs import FeatureBank, MMFSConfig, Projected

MIDDLE = "mid"


class UNetSyncConfig(Config):
    """The synchronisers of a U-Net. Defaults are the released model's, except for `without_images`."""

    side: PositiveInt = 64
    """Of the latents it was made for, in cells: an offset of 1 is one cell of the map that asks."""
    feature_width: PositiveInt = 1024
    value_width: PositiveInt = 1024
    """Of all heads together."""
    heads: PositiveInt = 16
    points: PositiveInt = 8
    """Samples per head, scale and picture."""
    sides: tuple[PositiveInt, ...] = (64, 32, 16, 8)
    """The side of the square map in every scale, fine to coarse."""
    max_images: PositiveInt = 10
    """One more than a picture can see."""
    offset_init: float = 1.0
    """Offsets start uniform in [-offset_init, offset_init]."""
    without_images: WithoutImages = "zero"
    """What a picture that sees none gets: exactly nothing, or the biases of the outputs as in the released model."""


class ConvBranch(Branch):
    def __init__(self, width: int, base: int, config: UNetSyncConfig) -> None:
        own = config.model_dump(exclude={"side"})
        super().__init__(
            MMFSConfig(query_width=width, out_width=width, base=base, **own),
            partial(nn.LayerNorm, eps=EPS),
        )
        self.side, self.without_images = config.side, config.without_images
        self.conv = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, bank: FeatureBank | Projected, pictures: Tensor) -> Tensor:
        """(B, C, rows, cols) -> what is added to it."""
        _, width, rows, cols = x.shape
        queries = self.query_norm(x.flatten(2).transpose(1, 2))
        queries = queries + _positions(self.side, rows, cols, width, x.device, queries.dtype)
        found = self.read(queries, bank, pictures, _centres(rows, cols, x.device))
        added: Tensor = self.conv(found.transpose(1, 2).unflatten(2, (rows, cols)))
        if self.without_images == "zero":
            added = added.masked_fill((pictures < 0).all(2)[..., None, None], 0.0)
        return added


def attach_to_unet(unet: nn.Module, config: UNetSyncConfig) -> Insertion:
    """Insert synchronisers, with random weights and zero convolutions, on the device of the U-Net.

    What of the U-Net is trained is left as it is.

    Raises:
        UsageError: the model is not such a U-Net.
    """
    if not all(hasattr(unet, name) for name in ("conv_in", "down_blocks", "mid_block", "up_blocks")):
        raise UsageError(f"{type(unet).__name__} is no U-Net of diffusers", fix="pass a UNet2DConditionModel")
    widths = list(_skips(unet))
    ups: list[Any] = list(unet.up_blocks)  # type: ignore[arg-type]
    if sum(len(up.resnets) for up in ups) != len(widths):
        raise UsageError(
            f"{len(widths)} skips go into a way up that takes {sum(len(up.resnets) for up in ups)}",
            fix="pass a UNet2DConditionModel",
        )
    named = {**{str(i): skip for i, skip in enumerate(widths)}, MIDDLE: widths[-1]}
    device = next(unet.parameters()).device
    insertion = Insertion(
        {
            name: ConvBranch(width, max(config.side >> level, 1), config).to(device)
            for name, (width, level) in named.items()
        }
    )
    end = len(widths)
    for up in ups:
        # Before the blocks of the way up, not after those of the way down: a skip is also what the next block reads.
        # The middle goes with them, so that what others add to it or to skips is in already.
        names = tuple(map(str, range(end - len(up.resnets), end)))
        hook = partial(_before_up, insertion, names, is_first=end == len(widths))
        insertion.hold(up.register_forward_pre_hook(hook, with_kwargs=True))
        end -= len(up.resnets)
    return insertion


def _skips(unet: Any) -> Iterator[tuple[int, int]]:
    """(channels, how many times halved) of every skip, in the order they are made."""
    yield unet.conv_in.out_channels, 0
    for level, block in enumerate(unet.down_blocks):
        for resnet in block.resnets:
            yield resnet.out_channels, level
        for down in block.downsamplers or ():
            yield down.out_channels, level + 1


def _before_up(
    insertion: Insertion, names: tuple[str, ...], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *,
    is_first: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    skips = zip(names, kwargs["res_hidden_states_tuple"], strict=True)
    new: dict[str, Any] = {
        "res_hidden_states_tuple": tuple(_synchronised(insertion, name, skip) for name, skip in skips)
    }
    if is_first:
        new["hidden_states"] = _synchronised(insertion, MIDDLE, kwargs["hidden_states"])
    return args, {**kwargs, **new}


def _synchronised(insertion: Insertion, name: str, x: Tensor) -> Tensor:
    added = insertion.run(name, x)
    return x if added is None else x + added


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _positions(side: int, rows: int, cols: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(rows * cols, width)"""
    table = resize_table(grid_sin_cos(side, side, width), rows, cols, align_corners=False)
    return table.to(device, dtype)


def _centres(rows: int, cols: int, device: torch.device) -> Tensor:
    """(1, rows * cols, 2) of the cells, (x, y) as fractions."""
    x = (torch.arange(cols, device=device) + 0.5) / cols
    y = (torch.arange(rows, device=device) + 0.5) / rows
    return torch.stack((x.expand(rows, -1), y.unsqueeze(1).expand(-1, cols)), 2).flatten(0, 1).unsqueeze(0)
