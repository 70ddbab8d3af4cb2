"""EVA-02-CLIP-E-plus: the vision transformer by which Emu2 sees pictures, with the released key names.

    pixels (M, 3, side, side) --forward--> (M, 1 + G * G, width) --average over squares of patches--> (M, Q, width)

Blocks normalise what they add, x + norm(f(x)), and no norm stands at the end. Queries and values have a bias, keys have
none. Pooling is what Emu2 reads and what it learns to write: Q is 8 x 8 or 16 x 16 of the G x G = 32 x 32 patches.
"""

from dataclasses import dataclass
from math import isqrt

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class EvaConfig:
    """The released sizes."""

    side: int = 448
    """Pixels along one side of a picture."""
    patch: int = 14
    """Pixels along one side of a patch."""
    width: int = 1792
    layers: int = 64
    heads: int = 16
    mlp: int = 15360
    eps: float = 1e-6
    """Of the layer norms."""

    @property
    def grid(self) -> int:
        """G, patches along one side."""
        return self.side // self.patch

    def pools_to(self, queries: int) -> bool:
        """Whether the patches divide into `queries` equal squares."""
        return queries > 0 and isqrt(queries) ** 2 == queries and self.grid % isqrt(queries) == 0


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "m l (three h c) -> three m h l c", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "m h l c -> m l (h c)"))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.attn = _Attention(config.width, config.heads)
        self.norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = _MLP(config.width, config.mlp)
        self.norm2 = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class _PatchEmbed(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, stride=config.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return rearrange(self.proj(pixels), "m c h w -> m (h w) c")


class EvaTower(nn.Module):
    """See the module's docstring for shapes."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.width))
        self.patch_embed = _PatchEmbed(config)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """(M, 3, side, side), normalised -> (M, 1 + G * G, width): the class token, then the patches row by row."""
        patches = self.patch_embed(pixels)
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x

    def pooled(self, pixels: Tensor, queries: int) -> Tensor:
        """(M, 3, side, side), normalised -> (M, queries, width), row by row, for what `EvaConfig.pools_to` allows."""
        window = self.config.grid // isqrt(queries)
        patches = rearrange(self(pixels)[:, 1:], "m (h w) c -> m c h w", h=self.config.grid)
        return rearrange(F.avg_pool2d(patches, window), "m c h w -> m (h w) c")
