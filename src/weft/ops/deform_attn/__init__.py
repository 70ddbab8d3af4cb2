"""Deformable attention: every query sums bilinear samples of the feature maps of several pictures."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from weft.errors import UsageError
from weft.ops.deform_attn.bags import by_bags
from weft.ops.deform_attn.reference import Shapes, by_grid_sample
from weft.ops.deform_attn.rows import by_rows

__all__ = ["Impl", "Shapes", "deform_attn"]

Impl = Literal["auto", "reference", "bags", "rows", "triton"]
HAS_TRITON = find_spec("triton") is not None


def _by_kernels(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    # torch alone does not bring triton everywhere, and it is slow to import
    from weft.ops.deform_attn.triton import by_kernels

    return by_kernels(value, shapes, points, weights, pictures)


IMPLS: dict[str, Callable[[Tensor, Shapes, Tensor, Tensor, Tensor], Tensor]] = {
    "reference": by_grid_sample,
    "bags": by_bags,
    "rows": by_rows,
    "triton": _by_kernels,
}


def deform_attn(
    value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, pictures: Tensor | None = None, *,
    impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Sum bilinear samples of the pictures that each query reads.

        out[b, q, h] = sum over m, s, k of weights[b, q, h, m, s, k] * value_s[b, pictures[b, q, m], h] at the point

    Zhu et al. 2021 (arXiv:2010.04159), eq. 3 without its two projections, over several pictures.

    Args:
        value: (B, N, V, H, C). Maps of all scales of N pictures, each flattened row by row, then concatenated.
        shapes: (rows, cols) of each of the S maps; rows * cols summed over S is V.
        points: (B, Q, H, M, S, K, 2), or (B, Q, H, M, 1, K, 2) for the same in all scales. (x, y) as fractions of a
            map: 0 is its left or top edge, 1 its right or bottom edge, 0.5 / cols the centre of the first column.
            Outside reads zero.
        weights: (B, Q, H, M, S, K). Used as given; the caller normalises.
        pictures: (B, Q, M) int64, the pictures that a query reads, each once; what stands at -1 counts nothing and
            gets no gradient. None: all N, in order.
        impl: "reference"; "bags", many times faster on a CPU and only there; "rows", for few samples, as in decoding;
            "triton", on a GPU where triton is installed; "auto", the fastest.

    Returns:
        (B, Q, H, C) in the dtype of `value`, accumulated in float32 at least.

    Raises:
        UsageError: sizes disagree, or `impl` cannot run here.
    """
    batch, images = value.shape[:2]
    if pictures is None:
        pictures = torch.arange(images, device=value.device).expand(batch, weights.shape[1], -1)
    _check(value, shapes, points, weights, pictures)
    if impl == "auto":
        impl = _fastest(value, weights)
    if impl not in IMPLS or (impl == "bags" and value.device.type != "cpu") or (impl == "triton" and not _runs(value)):
        lacks = "" if HAS_TRITON or impl != "triton" else "install triton (pip install 'weft[triton]'), or "
        raise UsageError(
            f"deformable attention has no form {impl!r} on {value.device.type} here", fix=f"{lacks}pass impl='auto'"
        )
    return IMPLS[impl](value, shapes, points, weights, pictures)


def _runs(value: Tensor) -> bool:
    """Whether the kernels do; triton's interpreter runs them anywhere."""
    return HAS_TRITON and (value.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def _fastest(value: Tensor, weights: Tensor) -> Impl:
    if HAS_TRITON and value.device.type == "cuda":
        return "triton"
    corners, rows = 4 * weights.numel(), value[..., 0].numel()
    if corners <= rows:
        return "rows"
    # a compiler sees no further than the reference's operations
    return "bags" if value.device.type == "cpu" and not torch.compiler.is_compiling() else "reference"


def _check(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, pictures: Tensor) -> None:
    if value.dim() != 5 or weights.dim() != 6 or points.dim() != 7:
        raise UsageError(
            f"deformable attention takes value (B, N, V, H, C), points (B, Q, H, M, S, K, 2) and weights "
            f"(B, Q, H, M, S, K), got {tuple(value.shape)}, {tuple(points.shape)} and {tuple(weights.shape)}"
        )
    (batch, _, cells, heads, _), (_, queries, _, slots, scales, each) = value.shape, weights.shape
    wanted = {
        "value, axis 2": (cells, sum(rows * cols for rows, cols in shapes)),
        "weights": (tuple(weights.shape), (batch, queries, heads, slots, len(shapes), each)),
        "points": (tuple(points.shape), (batch, queries, heads, slots, min(points.shape[4], scales), each, 2)),
        "points, axis 4": (points.shape[4] in (1, scales), True),
        "pictures": (tuple(pictures.shape), (batch, queries, slots)),
    }
    for name, (came, should) in wanted.items():
        if came != should:
            raise UsageError(
                f"deformable attention over maps {shapes}: {name} should be {should}, is {came}",
                fix="see the sizes in the docstring of deform_attn",
            )
