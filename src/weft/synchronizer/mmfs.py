"""Multi-image multi-scale feature synchroniser: every query samples the feature maps of the pictures that it may see.

    z[q, m]  = W_d x[q] + b_d + E[m]                      m = 1 for the nearest picture that q sees, 2 for the next, ...
    offsets  = W_o z + b_o           of every head and point, the same in all scales
    logits   = W_a z + b_a           of every head, scale and point
    y[q]     = W_out (sum over m, s, k of weight * sample of W_v F) + b_out

The weights are the softmax of a head's logits over all pictures, scales and points and one logit more that is zero, the
null slot, which reads `ignore_token`. Offsets and logits are affine in x, so W_d is never applied picture by picture:
W_o z = (W_o W_d) x + W_o (b_d + E[m]) + b_o, a product and a short table.

Which pictures a query sees is decided in `visibility.py`, and where a synchroniser sits by whoever inserts it. Queries
and features come in normalised. Source: Tian et al. 2024 (arXiv:2401.10208), section 3, and the released model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.errors import ConfigError, UsageError
from weft.ops.deform_attn import Impl, Shapes, deform_attn
from weft.synchronizer.visibility import nearest_first


@dataclass(frozen=True)
class MMFSConfig:
    query_width: int
    feature_width: int
    value_width: int
    """Of all heads together."""
    out_width: int
    heads: int
    points: int
    """Samples per head, scale and picture."""
    sides: tuple[int, ...]
    """The side of the square map in every scale, fine to coarse."""
    base: int
    """An offset of 1 is 1 / base of a picture whose maps have these sides; of other maps, side / base cells."""
    max_images: int
    """Rows of E. The most pictures a query can see is one less: row 0 is no picture's."""
    offset_init: float
    """Offsets start uniform in [-offset_init, offset_init]."""
    without_images: Literal["zero", "bias"] = "zero"
    """What a query that sees no picture gets: exactly nothing, or b_out as in the released model."""

    def __post_init__(self) -> None:
        if self.value_width % self.heads:
            raise ConfigError(
                f"value_width {self.value_width} is not divisible by {self.heads} heads", fix="change one of them"
            )


@dataclass(frozen=True)
class FeatureBank:
    """The feature maps of the N pictures of each sequence; what stands for a missing picture is never read."""

    features: Tensor
    """(B, N, V, F): maps fine to coarse, each row by row."""
    shapes: Shapes
    """(rows, cols) of the S maps."""
    is_padding: Tensor | None = None
    """(B, N, V) bool: cells that read as zero."""

    @classmethod
    def of_maps(cls, maps: Sequence[Tensor]) -> "FeatureBank":
        """Of a (B, N, F, rows, cols) for every scale."""
        flat = torch.cat([scale.flatten(3) for scale in maps], 3).transpose(2, 3)
        return cls(flat, tuple((scale.shape[3], scale.shape[4]) for scale in maps))


@dataclass(frozen=True)
class Projected:
    """All that no query changes: made once for the tokens of a context or the steps of a picture."""

    values: Tensor
    """(B, N, V, H, C)"""
    shapes: Shapes
    weight: Tensor
    """(R, Cq): from a query to its H * K * 2 offsets and H * S * K logits."""
    bias: Tensor
    """(R,) with the nearest picture."""
    table: Tensor
    """(max_images - 1 or fewer, R): what the nearest, the next, ... picture adds to that; the nearest nothing."""
    null: Tensor
    """(H, E): what the null slot of every head adds to the output."""


class FeatureSynchronizer(nn.Module):
    """Parameters are named and shaped as in released checkpoints.

    So `attention_weights` has a row for the null slot of every head and scale, K + 1 in all, which nothing reads, as
    there; `ignore_token` is zero unless a checkpoint says otherwise, and not trained.
    """

    ignore_token: Tensor

    def __init__(self, config: MMFSConfig) -> None:
        super().__init__()
        self.config = config
        scales = len(config.sides)
        self.dynamic_offset_mask = nn.Linear(config.query_width, config.query_width)
        self.query_relpos = nn.Embedding(config.max_images, config.query_width)
        self.sampling_offsets = nn.Linear(config.query_width, config.heads * config.points * 2)
        self.attention_weights = nn.Linear(config.query_width, config.heads * scales * (config.points + 1))
        self.value_proj = nn.Linear(config.feature_width, config.value_width)
        self.output_proj = nn.Linear(config.value_width, config.out_width)
        self.register_buffer("ignore_token", torch.zeros(1, 1, 1, config.value_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.dynamic_offset_mask.reset_parameters()
        self.attention_weights.reset_parameters()
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.uniform_(self.sampling_offsets.bias, -self.config.offset_init, self.config.offset_init)
        nn.init.trunc_normal_(self.query_relpos.weight, std=0.02)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.dynamic_offset_mask, self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.ignore_token)

    def project(self, bank: FeatureBank) -> Projected:
        """What `forward` takes instead of the features, to be kept while they and the weights stay.

        Raises:
            UsageError: the features are not of this synchroniser's width, or not in its scales.
        """
        c, features = self.config, bank.features
        if features.dim() != 4 or features.shape[3] != c.feature_width or len(bank.shapes) != len(c.sides):
            raise UsageError(
                f"features (B, N, V, F) are {tuple(features.shape)} in {len(bank.shapes)} scales; this synchroniser "
                f"reads {c.feature_width} wide ones in {len(c.sides)}",
                fix="give it the maps it was configured for",
            )
        values = self.value_proj(features)
        if bank.is_padding is not None:
            values = values.masked_fill(bank.is_padding.unsqueeze(3), 0.0)
        weight = torch.cat((self.sampling_offsets.weight, self._without_null(self.attention_weights.weight)))
        bias = torch.cat((self.sampling_offsets.bias, self._without_null(self.attention_weights.bias)))
        by_place = self.query_relpos.weight[1 : features.shape[1] + 1] + self.dynamic_offset_mask.bias
        table = F.linear(by_place, weight, bias)
        return Projected(
            values.unflatten(3, (c.heads, -1)),
            bank.shapes,
            weight @ self.dynamic_offset_mask.weight,
            table[:1].sum(0),
            table - table[:1],
            (self.ignore_token.view(-1) * self.output_proj.weight).unflatten(1, (c.heads, -1)).sum(2).T,
        )

    def forward(
        self, queries: Tensor, bank: FeatureBank | Projected, visible: Tensor, points: Tensor, *, impl: Impl = "auto"
    ) -> Tensor:
        """Read the pictures.

        Args:
            queries: (B, Q, Cq).
            bank: features, or what `project` made of them.
            visible: (B, Q, N) bool, (B, N) bool for all queries alike, or what `nearest_first` made of either: for
                several synchronisers, or where finding M would make the host wait for the device.
            points: (B, Q, 2) the place of every query, (x, y) as fractions of a picture; or (B, Q, S or N * S or 1, 2)
                scale by scale; or 4 numbers instead of 2, a box with (width, height) that the offsets are parts of.
                Any of B and Q may be 1. In float32, whatever the queries are.
            impl: of `deform_attn`.

        Returns:
            (B, Q, E).

        Raises:
            UsageError: sizes disagree, or a query sees more pictures than `max_images` allows.
        """
        c = self.config
        projected = bank if isinstance(bank, Projected) else self.project(bank)
        pictures = self._pictures(visible, queries, projected)
        offsets, logits = self._offsets_and_logits(queries, pictures, projected)
        weights, null = _softmax_with_zero(logits)
        found = deform_attn(
            projected.values, projected.shapes, self._points(points, offsets, pictures, projected.shapes), weights,
            pictures, impl=impl,
        )  # fmt: skip
        out = self.output_proj(found.flatten(2)) + null @ projected.null
        return out.masked_fill((pictures < 0).all(2, keepdim=True), 0.0) if c.without_images == "zero" else out

    def _without_null(self, rows: Tensor) -> Tensor:
        """(H * S * (K + 1), ...) -> (H * S * K, ...)"""
        return rows.unflatten(0, (-1, self.config.points + 1))[:, :-1].flatten(0, 1)

    def _pictures(self, visible: Tensor, queries: Tensor, projected: Projected) -> Tensor:
        """(B, Q, M)"""
        batch, count = queries.shape[:2]
        visible = visible if visible.dim() == 3 else visible.unsqueeze(1)
        fits = (
            projected.values.shape[0] == len(visible) == batch
            and visible.shape[1] in (1, count)
            and (visible.dtype != torch.bool or visible.shape[2] == projected.values.shape[1])
        )
        if not fits:
            raise UsageError(
                f"queries (B, Q, Cq) are {tuple(queries.shape)}, `visible` (B, Q, N) is {tuple(visible.shape)}, the "
                f"pictures (B, N) are {tuple(projected.values.shape[:2])}",
                fix="make B, Q and N agree",
            )
        pictures = nearest_first(visible) if visible.dtype == torch.bool else visible
        if pictures.shape[2] > len(projected.table):
            raise UsageError(
                f"a query sees {pictures.shape[2]} pictures, this synchroniser counts to {self.config.max_images - 1}",
                fix="show it fewer",
            )
        return pictures.expand(-1, count, -1)

    def _offsets_and_logits(self, queries: Tensor, pictures: Tensor, projected: Projected) -> tuple[Tensor, Tensor]:
        """(B, Q, H, M, 1, K, 2) and (B, Q, H, M, S, K), -inf where there is no picture."""
        c = self.config
        both = F.linear(queries, projected.weight, projected.bias).unsqueeze(2)
        if pictures.shape[2] != 1:
            both = both + projected.table[: pictures.shape[2]]
        offsets, logits = both.split((c.heads * c.points * 2, c.heads * len(c.sides) * c.points), 3)
        logits = logits.masked_fill((pictures < 0).unsqueeze(3), -torch.inf)
        return (
            offsets.unflatten(3, (c.heads, 1, c.points, 2)).transpose(2, 3),
            logits.unflatten(3, (c.heads, len(c.sides), c.points)).transpose(2, 3),
        )

    def _points(self, points: Tensor, offsets: Tensor, pictures: Tensor, shapes: Shapes) -> Tensor:
        """(B, Q, H, M, S or 1, K, 2)"""
        c, scales = self.config, len(shapes)
        at = points if points.dim() == 4 else points.unsqueeze(2)
        if at.shape[2] not in (1, scales) and at.shape[2] % scales:
            raise UsageError(f"reference points are {tuple(points.shape)}, for {scales} scales", fix="see `points`")
        at = at.unflatten(2, (-1, min(at.shape[2], scales)))  # (B, Q, N or 1, S or 1, 2 or 4)
        if at.shape[2] > 1:  # of the pictures that are read
            places = pictures.clamp_min(0)[..., None, None].expand(-1, -1, -1, *at.shape[3:])
            at = at.expand(*pictures.shape[:2], -1, -1, -1).gather(2, places)
        at = at[:, :, None, :, :, None]
        offsets = offsets.to(torch.promote_types(at.dtype, offsets.dtype))
        # the unit of the offsets, in cells of the scale
        units = [side / c.base for side in c.sides]
        if at.shape[-1] == 4:
            steps = [(unit / c.points / 2, unit / c.points / 2) for unit in units]
            offsets = offsets * at[..., 2:]
        else:
            steps = [(unit / cols, unit / rows) for unit, (rows, cols) in zip(units, shapes, strict=True)]
        if len(set(steps)) == 1:  # maps of the configured sides: the same points in all scales
            steps = steps[:1]
        moved = torch.addcmul(at[..., :2], offsets, offsets.new_tensor(steps).unsqueeze(1))
        return moved.expand(len(pictures), -1, -1, -1, -1, -1, -1)


def _softmax_with_zero(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, H, M, S, K) -> weights of the same shape, and (B, Q, H) that of one logit more, zero.

    Summed picture by picture, the nearest first: a query's bits are the same beside one that sees more pictures.
    """
    top = logits.flatten(3).amax(3).clamp_min(0) if logits.shape[3] else logits.new_zeros(logits.shape[:3])
    top = top.detach()
    each, null = (logits - top[..., None, None, None]).exp(), (-top).exp()
    total = null
    for picture in each.flatten(4).sum(4).unbind(3):
        total = total + picture
    return each / total[..., None, None, None], null / total
