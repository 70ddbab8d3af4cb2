"""How MM-Interleaved sees pictures: a frozen CLIP ViT, a trained ViT-Adapter around it, and a resampler on top.

    pixels (M, 3, side, side) --VisionEncoder--> maps 4 x (M, C, G', G') and last_hidden (M, 1 + P, C)
    maps + positions                                                   -> what the synchroniser samples
    norm(norm(linear(last_hidden)) + positions) --resampler, linear--> tokens (M, Q, D) for the language model

The adapter (Chen et al. 2023, arXiv:2205.08534) is a convolutional pyramid c. Around each quarter of the ViT's layers c
is injected into the patches x, and what the layers make of x is extracted back into c, both by deformable attention.
The four maps have 4, 2, 1 and 1/2 times the G x G grid of patches.

The ViT is transformers' `CLIPVisionModel`, whose layers are called here group by group. Pixels are in [0, 1].
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from einops import rearrange
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from weft.codecs.resampler import Resampler, ResamplerConfig
from weft.config import Config
from weft.errors import UsageError
from weft.ops.deform_attn import Shapes, deform_attn
from weft.ops.positions import grid_sin_cos, resize_table

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours that CLIP was trained on."""
GROUPS = 4
"""Interactions of the adapter with the ViT, each around as many of its layers."""
STRIDE = 16
"""Of the adapter's third map, which has the ViT's grid: it sees pictures resized to 16 pixels for each patch."""


class VisionConfig(Config):
    """ViT and adapter; the defaults are CLIP ViT-L/14 as MM-Interleaved uses it."""

    side: PositiveInt = 224
    """Pixels along one side of a picture."""
    patch: PositiveInt = 14
    """Pixels along one side of a patch."""
    width: PositiveInt = 1024
    """C, of the ViT and of the maps. Deformable attention has values of half of it, its feed-forward nets a quarter."""
    layers: PositiveInt = 24
    heads: PositiveInt = 16
    """Of the ViT's attention and of the deformable one."""
    mlp: PositiveInt = 4096
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    stem: PositiveInt = 64
    """Channels of the first convolutions of the adapter."""
    points: PositiveInt = 4
    """Sampled by each head in each map."""

    @property
    def grid(self) -> int:
        """G, patches along one side."""
        return self.side // self.patch

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.side % (2 * self.patch):
            raise ValueError(f"side {self.side} is no even number of patches of {self.patch} pixels")
        if self.layers % GROUPS:
            raise ValueError(f"layers {self.layers} do not divide into {GROUPS} groups")
        if self.width % (2 * self.heads) or self.width % 4:
            raise ValueError(f"width {self.width} is no multiple of 2 * heads {self.heads}, or not of 4")
        return self


@dataclass(frozen=True)
class Pyramid:
    """What a picture looks like at four scales."""

    maps: tuple[Tensor, ...]
    """(M, C, G', G'), where G' is 4 G, 2 G, G, G / 2."""
    last_hidden: Tensor
    """(M, 1 + P, C): class token, then patches row by row; the ViT's last layer, not normalised."""


@dataclass(frozen=True)
class _Maps:
    """Maps that are flattened row by row and stand one behind the other, V pixels in all."""

    shapes: Shapes
    centres: Tensor
    """(V, 2) where the pixels are: (x, y) as fractions of their map, in float32 at least."""

    @classmethod
    def of(cls, shapes: Shapes, like: Tensor) -> Self:
        dtype = torch.promote_types(like.dtype, torch.float32)
        centres = []
        for rows, cols in shapes:
            y, x = ((torch.arange(n, device=like.device, dtype=dtype) + 0.5) / n for n in (rows, cols))
            centres.append(torch.stack((x.expand(rows, -1), y.unsqueeze(1).expand(-1, cols)), dim=-1).flatten(0, 1))
        return cls(shapes, torch.cat(centres))


class _ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of (M, C, rows, cols)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return [conv, _ChannelNorm(channels_out), nn.ReLU()]


class SpatialPrior(nn.Module):
    """(M, 3, 16 G, 16 G) -> maps (M, C, G', G'), where G' is 4 G, 2 G, G, G / 2."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        n = config.stem
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stem = nn.Sequential(*_conv(3, n, 2), *_conv(n, n, 1), *_conv(n, n, 1), pool)
        self.conv2 = nn.Sequential(*_conv(n, 2 * n, 2))
        self.conv3 = nn.Sequential(*_conv(2 * n, 4 * n, 2))
        self.conv4 = nn.Sequential(*_conv(4 * n, 4 * n, 2))
        self.fc1 = nn.Conv2d(n, config.width, 1)
        self.fc2 = nn.Conv2d(2 * n, config.width, 1)
        self.fc3 = nn.Conv2d(4 * n, config.width, 1)
        self.fc4 = nn.Conv2d(4 * n, config.width, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c1 = self.stem(pixels)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(self.conv4(c3))


class DeformableAttention(nn.Module):
    """Every query reads a few points near its own place in each map, at offsets and with weights that it chooses.

    Zhu et al. 2021 (arXiv:2010.04159), eq. 3.
    """

    def __init__(self, config: VisionConfig, scales: int) -> None:
        super().__init__()
        self.heads, self.scales, self.points = config.heads, scales, config.points
        samples = config.heads * scales * config.points
        self.sampling_offsets = nn.Linear(config.width, samples * 2)
        self.attention_weights = nn.Linear(config.width, samples)
        self.value_proj = nn.Linear(config.width, config.width // 2)
        self.output_proj = nn.Linear(config.width // 2, config.width)
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        """Each head looks in a direction of its own, its k-th point k + 1 pixels away.

        With equal offsets the points of a head would also have equal gradients, and stay one point for ever.
        """
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # (H, 2), on the edge of a square
        steps = torch.arange(1, self.points + 1).view(-1, 1)
        offsets = directions.view(-1, 1, 1, 2).expand(-1, self.scales, -1, -1) * steps  # (H, S, K, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        for zero in (self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(zero)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, queries: Tensor, places: Tensor, source: Tensor, shapes: Shapes) -> Tensor:
        """Read maps.

        Args:
            queries: (M, Q, C).
            places: (Q, 2). (x, y) of each query as fractions of a map.
            source: (M, V, C), S maps of `shapes`.

        Returns:
            (M, Q, C).
        """
        split = {"h": self.heads, "s": self.scales, "k": self.points}
        # pixels are small fractions of a map: positions need float32
        offsets = self.sampling_offsets(queries).to(places.dtype)
        offsets = rearrange(offsets, "m q (h s k xy) -> m q h s k xy", xy=2, **split)
        sizes = torch.tensor([(cols, rows) for rows, cols in shapes], device=places.device).unsqueeze(1)  # (S, 1, 2)
        points = places.view(-1, 1, 1, 1, 2) + offsets / sizes
        weights = rearrange(self.attention_weights(queries), "m q (h sk) -> m q h sk", h=self.heads).softmax(-1)
        weights = rearrange(weights, "m q h (s k) -> m q h s k", s=self.scales)
        value = rearrange(self.value_proj(source), "m v (h c) -> m v h c", h=self.heads)
        # one picture for each row of the batch, and all queries read it
        first = torch.zeros(*queries.shape[:2], 1, dtype=torch.long, device=queries.device)
        read = deform_attn(value.unsqueeze(1), shapes, points.unsqueeze(3), weights.unsqueeze(3), first)
        return self.output_proj(read.flatten(2))


class Injector(nn.Module):
    """x <- x + gamma * attention from x to c; gamma is zero at the start, which leaves the ViT as it is."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(config.width)
        self.feat_norm = nn.LayerNorm(config.width)
        self.attn = DeformableAttention(config, scales=3)
        self.gamma = nn.Parameter(torch.zeros(config.width))

    def forward(self, x: Tensor, c: Tensor, x_maps: _Maps, c_maps: _Maps) -> Tensor:
        return x + self.gamma * self.attn(self.query_norm(x), x_maps.centres, self.feat_norm(c), c_maps.shapes)


class ConvFFN(nn.Module):
    """A feed-forward net with a 3 x 3 convolution of each channel, in each map by itself."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, c: Tensor, shapes: Shapes) -> Tensor:
        maps = _unflatten(self.fc1(c), shapes)
        return self.fc2(F.gelu(_flatten([self.dwconv(part) for part in maps])))


class Extractor(nn.Module):
    """c <- c + attention from c to x, then c <- c + feed-forward."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(config.width)
        self.feat_norm = nn.LayerNorm(config.width)
        self.attn = DeformableAttention(config, scales=1)
        self.ffn = ConvFFN(config.width, config.width // 4)
        self.ffn_norm = nn.LayerNorm(config.width)
        for linear in (self.ffn.fc1, self.ffn.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, c: Tensor, x_maps: _Maps, c_maps: _Maps) -> Tensor:
        c = c + self.attn(self.query_norm(c), c_maps.centres, self.feat_norm(x), x_maps.shapes)
        return c + self.ffn(self.ffn_norm(c), c_maps.shapes)


class Interaction(nn.Module):
    """One group of the ViT's layers, and what stands before and after it."""

    def __init__(self, config: VisionConfig, *, extra: int) -> None:
        super().__init__()
        self.injector = Injector(config)
        self.extractor = Extractor(config)
        self.extra_extractors = nn.ModuleList(Extractor(config) for _ in range(extra))

    def forward(
        self, hidden: Tensor, c: Tensor, layers: Iterable[nn.Module], x_maps: _Maps, c_maps: _Maps
    ) -> tuple[Tensor, Tensor]:
        """(M, 1 + P, C) and (M, V, C) -> the same; the class token goes through the layers alone."""
        x = self.injector(hidden[:, 1:], c, x_maps, c_maps)
        hidden = torch.cat((hidden[:, :1], x), dim=1)
        for layer in layers:
            hidden = layer(hidden, None)  # nothing is masked
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(hidden[:, 1:], c, x_maps, c_maps)
        return hidden, c


class ViTAdapter(nn.Module):
    """The trained parts of `VisionEncoder`, which runs them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.spm = SpatialPrior(config)
        self.level_embed = nn.Parameter(torch.zeros(3, config.width))
        self.interactions = nn.ModuleList(Interaction(config, extra=2 * (i == GROUPS - 1)) for i in range(GROUPS))
        self.up = nn.ConvTranspose2d(config.width, config.width, 2, stride=2)


class VisionEncoder(nn.Module):
    """Frozen ViT and adapter; see the module's docstring."""

    def __init__(self, config: VisionConfig) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        self.config = config
        self.trunk = CLIPVisionModel(
            CLIPVisionConfig(
                image_size=config.side,
                patch_size=config.patch,
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.mlp,
                hidden_act=config.activation,
            )
        )
        self.trunk.post_layernorm = nn.Identity()
        self.trunk.requires_grad_(False)
        self.adapter = ViTAdapter(config)

    def forward(self, pixels: Tensor) -> Pyramid:
        """(M, 3, side, side) in [0, 1]; left as it is.

        Raises:
            UsageError: pixels of another shape, or no pictures.
        """
        config, adapter, trunk = self.config, self.adapter, self.trunk
        if pixels.ndim != 4 or pixels.shape[1:] != (3, config.side, config.side) or not len(pixels):
            raise UsageError(
                f"the vision encoder got pixels of shape {tuple(pixels.shape)}",
                fix=f"resize pictures to (M, 3, {config.side}, {config.side}); where there are none, do not call it",
            )
        pixels = _normalise(pixels).to(adapter.level_embed.dtype)
        c1, *others = adapter.spm(F.interpolate(pixels, size=config.grid * STRIDE, mode="bilinear"))
        x_maps = _Maps.of(((config.grid, config.grid),), pixels)
        c_maps = _Maps.of(tuple((each.shape[2], each.shape[3]) for each in others), pixels)
        c = _flatten([each + level.view(-1, 1, 1) for each, level in zip(others, adapter.level_embed, strict=True)])

        hidden = trunk.pre_layrnorm(trunk.embeddings(pixels))
        size, seen = config.layers // GROUPS, []
        for i, interaction in enumerate(adapter.interactions):
            layers = trunk.encoder.layers[i * size : (i + 1) * size]
            hidden, c = interaction(hidden, c, layers, x_maps, c_maps)
            seen += _unflatten(hidden[:, 1:], x_maps.shapes)

        c2, c3, c4 = _unflatten(c, c_maps.shapes)
        pyramid = (c1 + adapter.up(c2), c2, c3, c4)
        maps = (
            each + F.interpolate(x, size=each.shape[2:], mode="bilinear") for each, x in zip(pyramid, seen, strict=True)
        )
        return Pyramid(tuple(maps), hidden)


class VisualTokenizerConfig(Config):
    """From pixels to what the language model and the synchroniser read."""

    vision: VisionConfig = VisionConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    width: PositiveInt = 5120
    """D, of the language model."""

    @model_validator(mode="after")
    def _resampler_reads_the_vit(self) -> Self:
        if self.resampler.source_width != self.vision.width:
            raise ValueError(
                f"resampler.source_width {self.resampler.source_width} is not vision.width {self.vision.width}"
            )
        return self


@dataclass(frozen=True)
class VisualTokens:
    """A picture as the language model and the synchroniser read it."""

    tokens: Tensor
    """(M, Q, D)."""
    maps: tuple[Tensor, ...]
    """`Pyramid.maps` with positions added."""


class VisualTokenizer(nn.Module):
    """See the module's docstring."""

    positions: Tensor
    """(P, C), fixed."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width, grid = config.vision.width, config.vision.grid
        self.encoder = VisionEncoder(config.vision)
        self.pos_proj = nn.Linear(width, width)
        self.pos_ln = nn.LayerNorm(width, eps=1e-6)
        self.post_ln = nn.LayerNorm(width, eps=1e-6)
        self.resampler = Resampler(config.resampler)
        self.proj = nn.Linear(config.resampler.width, config.width)
        nn.init.normal_(self.proj.weight, std=1e-3)
        nn.init.zeros_(self.proj.bias)
        self.register_buffer("positions", grid_sin_cos(grid, grid, width), persistent=False)

    def forward(self, pixels: Tensor) -> VisualTokens:
        """(M, 3, side, side) in [0, 1]; left as it is.

        Raises:
            UsageError: pixels of another shape, or no pictures.
        """
        pyramid = self.encoder(pixels)
        x = self.pos_ln(self.pos_proj(pyramid.last_hidden))
        x = self.post_ln(x + F.pad(self.positions, (0, 0, 1, 0)).to(x))  # the class token has no position
        return VisualTokens(self.proj(self.resampler(x)), tuple(self._placed(each) for each in pyramid.maps))

    def _placed(self, features: Tensor) -> Tensor:
        rows, cols = features.shape[2:]
        table = resize_table(self.positions, rows, cols, align_corners=False)
        return features + table.to(features).T.unflatten(1, (rows, cols))


def _normalise(pixels: Tensor) -> Tensor:
    """A new tensor, as CLIP was trained on."""
    mean, std = (torch.tensor(each, device=pixels.device).view(3, 1, 1) for each in (MEAN, STD))
    return (pixels - mean) / std


def _flatten(maps: Sequence[Tensor]) -> Tensor:
    """Maps (M, C, rows, cols) -> (M, V, C)."""
    return torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=1)


def _unflatten(tokens: Tensor, shapes: Shapes) -> list[Tensor]:
    """The inverse of `_flatten`."""
    parts = tokens.split([rows * cols for rows, cols in shapes], dim=1)
    return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]
