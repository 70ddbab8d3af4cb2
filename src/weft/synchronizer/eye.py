"""An eye for models that have none of pixels: a small convolutional pyramid, trained with the branches that read it.

    pixels (M, 3, side, side) --stem, stride 4--> c --stride 2--> c' --stride 2--> ...   maps (M, F, rows, cols) of each

Every cell of a map is normalised and knows its place. Why it is not the ViT-Adapter of `codecs/vision.py`:
docs/decisions/0011-a-synchroniser-is-an-adapter.md.
"""

from typing import Self

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from weft.config import Config
from weft.errors import RoutingError
from weft.ops.positions import grid_sin_cos
from weft.synchronizer.sight import Looks

STRIDE = 4
"""Pixels along one side of a cell of the finest map; twice as many in each map after it."""


class EyeConfig(Config):
    """What an attached synchroniser sees with."""

    side: PositiveInt = 64
    """Of the pictures it takes, in pixels."""
    width: PositiveInt = 64
    """F, channels of its maps."""
    stem: PositiveInt = 32
    """Channels of the finest convolutions; each coarser map is made of twice as many."""
    scales: PositiveInt = 3

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the maps, fine to coarse."""
        return tuple(self.side // (STRIDE << scale) for scale in range(self.scales))

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        coarsest = STRIDE << (self.scales - 1)
        if self.side % coarsest:
            raise ValueError(f"side {self.side} is no multiple of {coarsest}, the stride of the last of its maps")
        if self.width % 4:
            raise ValueError(f"width {self.width} is no multiple of 4, as positions need")
        return self


class Eye(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: EyeConfig) -> None:
        super().__init__()
        self.config = config
        channels = [config.stem << scale for scale in range(config.scales)]
        self.stem = nn.Sequential(*_conv(3, config.stem), *_conv(config.stem, config.stem))
        self.down = nn.ModuleList(nn.Sequential(*_conv(c, 2 * c)) for c in channels[:-1])
        self.out = nn.ModuleList(nn.Sequential(nn.Conv2d(c, config.width, 1), _Norm(config.width)) for c in channels)

    def forward(self, pixels: Tensor) -> Looks:
        """(M, 3, side, side) in [0, 1].

        Raises:
            RoutingError: pixels of another size.
        """
        side = self.config.side
        if pixels.shape[1:] != (3, side, side):
            raise RoutingError(
                f"the eye got pixels of shape {tuple(pixels.shape)}", fix=f"fit pictures to {side} x {side} first"
            )
        features = [self.stem(pixels * 2 - 1)]
        for down in self.down:
            features.append(down(features[-1]))
        return Looks(tuple(self._placed(out(each)) for out, each in zip(self.out, features, strict=True)))

    def _placed(self, features: Tensor) -> Tensor:
        rows, cols = features.shape[2:]
        table = grid_sin_cos(rows, cols, self.config.width)
        return features + table.to(features).T.unflatten(1, (rows, cols))


class _Norm(nn.LayerNorm):
    """A layer norm over the channels of (M, C, rows, cols)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def _conv(channels_in: int, channels_out: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
    return [conv, _Norm(channels_out), nn.ReLU()]
