"""Perceiver resampler: a fixed number of learned queries that read a sequence of any length.

    source (B, L, source_width), keep (B, L) --forward--> (B, Q, width)

Every layer lets the queries read each other, then (every `cross_every`-th layer, the first one included) the source,
then passes them through a feed-forward net. Each of the three is post-norm: x <- norm(dropout(f(x)) + x). This is the
Q-Former of BLIP-2 (Li et al. 2023, arXiv:2301.12597) without text, and with optional norms of queries and keys.

MM-Interleaved has two: pictures to visual tokens, and a context of the language model to the condition of a picture.
"""

from typing import Self

import torch
from einops import rearrange
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from weft.config import Config
from weft.errors import UsageError

EPS = 1e-12
"""Of all layer norms here. Zero in float16, in which torch's layer norm does not compute, whatever it is given."""


class ResamplerConfig(Config):
    """Sizes; the defaults are those of MM-Interleaved's visual tokens, but for dropout."""

    queries: PositiveInt = 64
    """Q."""
    width: PositiveInt = 768
    source_width: PositiveInt = 1024
    layers: PositiveInt = 12
    cross_every: PositiveInt = 2
    """Layers 0, n, 2n, ... read the source."""
    heads: PositiveInt = 12
    mlp: PositiveInt = 3072
    """Hidden width of the feed-forward nets; does not follow `width`."""
    qk_norm: bool = True
    """Normalise the queries and keys of each head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of attention and of what each part adds. MM-Interleaved trained with 0.1 for visual tokens, 0 for conditions."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class _Attention(nn.Module):
    """x (B, Q, D) reads source (B, L, S)."""

    def __init__(self, config: ResamplerConfig, source_width: int) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(source_width, config.width)
        self.value = nn.Linear(source_width, config.width)
        size = config.width // config.heads
        self.q_norm = nn.LayerNorm(size, eps=EPS) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(size, eps=EPS) if config.qk_norm else nn.Identity()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=EPS)

    def forward(self, x: Tensor, source: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = (
            rearrange(part, "b l (h c) -> b h l c", h=self.heads)
            for part in (self.query(x), self.key(source), self.value(source))
        )
        q, k = self.q_norm(q).expand(len(k), -1, -1, -1), self.k_norm(k)
        visible = None if keep is None else keep[:, None, None]
        dropout = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        out = self.dense(rearrange(read, "b h l c -> b l (h c)"))
        return self.norm(F.dropout(out, self.dropout, self.training) + x)


class _MLP(nn.Module):
    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.fc1 = nn.Linear(config.width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.width)
        self.norm = nn.LayerNorm(config.width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.dropout(self.fc2(F.gelu(self.fc1(x))), self.dropout, self.training) + x)


class _Layer(nn.Module):
    def __init__(self, config: ResamplerConfig, *, reads_source: bool) -> None:
        super().__init__()
        self.attention = _Attention(config, config.width)
        self.crossattention = _Attention(config, config.source_width) if reads_source else None
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, source: Tensor, keep: Tensor | None) -> Tensor:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, source, keep)
        return self.mlp(x)


class Resampler(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.randn(1, config.queries, config.width) * 0.02)
        self.norm = nn.LayerNorm(config.width, eps=EPS)
        self.layers = nn.ModuleList(
            _Layer(config, reads_source=i % config.cross_every == 0) for i in range(config.layers)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, source: Tensor, keep: Tensor | None = None) -> Tensor:
        """Read a sequence.

        Args:
            source: (B, L, source_width).
            keep: (B, L) bool, True where the source may be read; None: everywhere. A row that keeps nothing reads zero.

        Returns:
            (B, Q, width).

        Raises:
            UsageError: shapes do not fit.
        """
        if source.ndim != 3 or source.shape[2] != self.config.source_width:
            raise UsageError(
                f"the resampler got {tuple(source.shape)} and reads (B, L, {self.config.source_width})",
                fix="give features of `ResamplerConfig.source_width`",
            )
        if keep is not None and (keep.shape != source.shape[:2] or keep.dtype != torch.bool):
            raise UsageError(
                f"`keep` is {keep.dtype} {tuple(keep.shape)} for a source of {tuple(source.shape)}",
                fix="give one bool per position of the source",
            )
        # (1, Q, D) until the first cross-attention: before it, no row differs from another
        x = F.dropout(self.norm(self.queries), self.config.dropout, self.training)
        for layer in self.layers:
            x = layer(x, source, keep)
        return x
