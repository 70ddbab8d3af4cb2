"""A small vector-quantising picture codec: pixels <-> a grid of discrete codes.

    pixels (M, 3, side, side) in [-1, 1] --encode--> codes (M, P) --decode--> pixels

Every patch is encoded alone, so an empty patch has the same code whatever stands beside it: such codes are predictable,
which is what a language model over them needs. All context is the decoder's business.
"""

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class VQConfig:
    side: int = 64
    """Pixels along one side of a picture."""
    patch: int = 8
    """Pixels along one side of a patch; the grid has side / patch rows and columns."""
    codes: int = 512
    """Entries of the codebook."""
    code_width: int = 16
    hidden: int = 256
    """Width of the patch encoder."""
    widths: tuple[int, int, int] = (96, 48, 32)
    """Decoder channels at 1x, 2x and 4x the grid."""

    @property
    def grid(self) -> tuple[int, int]:
        return (self.side // self.patch, self.side // self.patch)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class VQCodec(nn.Module):
    """Encoder, codebook and decoder; see the module's docstring for shapes."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        pixels = 3 * config.patch**2
        self.encoder = nn.Sequential(
            nn.Linear(pixels, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.code_width),
        )
        self.codebook = nn.Embedding(config.codes, config.code_width)
        one, two, four = config.widths
        last = config.patch // 4
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_width, one, 3, padding=1),
            *(_Residual(one) for _ in range(3)),
            nn.Conv2d(one, 4 * two, 3, padding=1),
            nn.PixelShuffle(2),
            _Residual(two),
            nn.Conv2d(two, 4 * four, 3, padding=1),
            nn.PixelShuffle(2),
            _Residual(four),
            nn.SiLU(),
            nn.Conv2d(four, 3 * last**2, 3, padding=1),
            nn.PixelShuffle(last),
        )

    def features(self, pixels: Tensor) -> Tensor:
        """(M, 3, side, side) -> (M, P, code_width), before quantisation."""
        patch = self.config.patch
        return self.encoder(rearrange(pixels, "m c (h p) (w q) -> m (h w) (c p q)", p=patch, q=patch))

    def nearest(self, features: Tensor) -> Tensor:
        """(..., code_width) -> (...) index of the nearest codebook entry."""
        book = self.codebook.weight
        distance = book.square().sum(1) - 2 * features @ book.T
        return distance.argmin(-1)

    def encode(self, pixels: Tensor) -> Tensor:
        """(M, 3, side, side) in [-1, 1] -> (M, P) int64 codes, row by row."""
        return self.nearest(self.features(pixels))

    def render(self, features: Tensor) -> Tensor:
        """(M, P, code_width) -> (M, 3, side, side), unclamped."""
        rows, _ = self.config.grid
        return self.decoder(rearrange(features, "m (h w) c -> m c h w", h=rows))

    def decode(self, codes: Tensor) -> Tensor:
        """(M, P) codes -> (M, 3, side, side) in [-1, 1]."""
        return self.render(self.codebook(codes)).clamp(-1, 1)
