"""Deformable attention on a GPU: two kernels, in which one program is one query of one head.

A program goes over the pictures that its query reads and, K samples at a time, over their scales; the rows of the
values that a sample lies between are read where they are, and nothing but the result is written. Towards the values,
where many samples meet in one cell, shares are added up atomically.

Bytes that must pass between memory and chip, each once (the traffic bound; `x` stands for the bytes of all of x):

    forward     value + points + weights + pictures + out
    backward    value + points + weights + pictures + dout   and   dvalue + dpoints + dweights

The sums towards the values are float32 even where the values are not, and are rounded afterwards: 4 bytes a number are
cleared and read again, beside those of `dvalue`. Between the caches and the chip pass the four rows of every sample,

    4 * B * Q * H * M * S * K * C numbers,

once in forward and once in backward, there with as many atomic additions.

Atomic additions come in any order, which is seen in the last bits of `dvalue`. Under
`torch.use_deterministic_algorithms(True)` the sums are of 64-bit integers, alike in every order: a fixed point is laid
so that the largest sum there could be still fits, which is finer than float32 for all but what is below 2^-37 of it.
It costs twice the bytes of the sums, and a number that is not finite spoils all of `dvalue`.

`TRITON_INTERPRET=1` runs the kernels on a CPU, slowly, to test them.
"""
# mypy: disable-error-code="untyped-decorator"

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.ops.deform_attn.reference import Shapes

TILE = 512
"""Numbers of a corner of K samples at a time: what a warp holds in registers."""
FIXED_POINT_BITS = 61
"""Of the largest sum that could be; two of 63 are left for rounding."""


def by_kernels(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    """As the contract says, on a GPU."""
    return cast(Tensor, _deform_attn(value, [side for shape in shapes for side in shape], points, weights, pictures))


@torch.library.custom_op("weft::deform_attn", mutates_args=())
def _deform_attn(value: Tensor, sides: Sequence[int], points: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    """sides: rows and cols of one map after another."""
    inputs = _contiguous(value, points, weights, pictures)
    out = value.new_empty(*weights.shape[:3], value.shape[4])
    if out.numel() == 0 or weights.numel() == 0:
        return out.zero_()
    with torch.cuda.device_of(value):
        _forward[_grid(weights)](out, *inputs, tuple(sides), **_sizes(value, points, weights))
    return out


@torch.library.custom_op("weft::deform_attn_backward", mutates_args=())
def _deform_attn_backward(
    dout: Tensor, value: Tensor, sides: Sequence[int], points: Tensor, weights: Tensor, pictures: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _contiguous(value, points, weights, pictures)
    exact = torch.promote_types(value.dtype, torch.float32)
    if dout.numel() == 0 or weights.numel() == 0:
        return value.new_zeros(value.shape), points.new_zeros(points.shape), weights.new_zeros(weights.shape)
    dpoints, dweights = points.new_empty(points.shape), weights.new_empty(weights.shape)
    fixed = torch.are_deterministic_algorithms_enabled()
    unit = _unit(dout, weights, pictures).to(exact) if fixed else dout.new_ones((), dtype=exact)
    sums = value.new_zeros(value.shape, dtype=torch.int64 if fixed else exact)
    with torch.cuda.device_of(value):
        _backward[_grid(weights)](
            sums, dpoints, dweights, dout.contiguous(), unit, *inputs, tuple(sides),
            **_sizes(value, points, weights), FIXED=fixed,
        )  # fmt: skip
    return (sums * unit if fixed else sums).to(value.dtype), dpoints, dweights


@_deform_attn.register_fake
def _(value: Tensor, sides: Sequence[int], points: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    return value.new_empty(*weights.shape[:3], value.shape[4])


@_deform_attn_backward.register_fake
def _(
    dout: Tensor, value: Tensor, sides: Sequence[int], points: Tensor, weights: Tensor, pictures: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), points.new_empty(points.shape), weights.new_empty(weights.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sides, *places = inputs
    ctx.save_for_backward(value, *places)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    value, *places = ctx.saved_tensors
    dvalue, dpoints, dweights = _deform_attn_backward(dout, value, ctx.sides, *places)
    return dvalue, None, dpoints, dweights, None


_deform_attn.register_autograd(_differentiate, setup_context=_keep)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _grid(weights: Tensor) -> tuple[int]:
    return (weights.shape[:3].numel(),)


def _sizes(value: Tensor, points: Tensor, weights: Tensor) -> dict[str, Any]:
    """What both kernels are told."""
    (_, images, cells, heads, channels), (_, queries, _, slots, scales, each) = value.shape, weights.shape
    wide = triton.next_power_of_2(channels)
    return {
        "images": images, "cells": cells, "heads": heads, "queries": queries, "slots": slots,
        "SCALES": scales, "PLACES": points.shape[4], "EACH": each, "CHANNELS": channels,
        "SAMPLES": min(triton.next_power_of_2(each), max(TILE // wide, 1)), "WIDE": wide,
        "EXACT": tl.float64 if value.dtype == torch.float64 else tl.float32, "num_warps": max(wide // TILE, 1),
    }  # fmt: skip


def _unit(dout: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    """A power of two of which no sum towards the values can be more than 2^FIXED_POINT_BITS."""
    weights = weights.abs().masked_fill((pictures < 0)[:, :, None, :, None, None], 0.0)
    most = (weights.sum((3, 4, 5), dtype=torch.float64) * dout.abs().amax(3)).sum()
    # what float32 can hold
    return torch.exp2((most.log2().ceil() - FIXED_POINT_BITS).clamp_min(-126))


@triton.jit
def _forward(
    out: tl.tensor, value: tl.tensor, points: tl.tensor, weights: tl.tensor, pictures: tl.tensor, sides: tl.tuple,
    images: tl.tensor, cells: tl.tensor, heads: tl.tensor, queries: tl.tensor, slots: tl.tensor,
    SCALES: tl.constexpr, PLACES: tl.constexpr, EACH: tl.constexpr, CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr,
) -> None:  # fmt: skip
    head, row, asker = _who(heads, queries)
    channel = tl.arange(0, WIDE)[None, :]
    total = tl.zeros((SAMPLES, WIDE), EXACT)
    for slot in range(slots):
        picture = tl.load(pictures + asker * slots + slot)
        if (picture >= 0) & (picture < images):
            place = (asker * heads + head) * slots + slot  # of B * Q * H * M
            maps = ((row * images + picture) * cells * heads + head) * CHANNELS
            for s in tl.static_range(SCALES):
                for first in range(0, EACH, SAMPLES):
                    x, y, weight = _samples(points, weights, place, s, first, SCALES, PLACES, EACH, SAMPLES, EXACT)
                    column, right = _between(x, sides[2 * s + 1])
                    line, down = _between(y, sides[2 * s])
                    for corner in tl.static_range(4):
                        cell, there = _corner(sides, s, column + corner % 2, line + corner // 2)
                        at = maps + (cell * heads * CHANNELS)[:, None] + channel
                        found = tl.load(value + at, there[:, None] & (channel < CHANNELS), 0.0).to(EXACT)
                        share = weight * _nearness(right, corner % 2) * _nearness(down, corner // 2)
                        total += share[:, None] * found
    at = (asker * heads + head) * CHANNELS + tl.arange(0, WIDE)
    tl.store(out + at, tl.sum(total, 0), tl.arange(0, WIDE) < CHANNELS)


@triton.jit
def _backward(
    sums: tl.tensor, dpoints: tl.tensor, dweights: tl.tensor, dout: tl.tensor, unit: tl.tensor,
    value: tl.tensor, points: tl.tensor, weights: tl.tensor, pictures: tl.tensor, sides: tl.tuple,
    images: tl.tensor, cells: tl.tensor, heads: tl.tensor, queries: tl.tensor, slots: tl.tensor,
    SCALES: tl.constexpr, PLACES: tl.constexpr, EACH: tl.constexpr, CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr, FIXED: tl.constexpr,
) -> None:  # fmt: skip
    head, row, asker = _who(heads, queries)
    channel = tl.arange(0, WIDE)[None, :]
    dtotal = tl.load(dout + (asker * heads + head) * CHANNELS + channel, channel < CHANNELS, 0.0).to(EXACT)
    units = 1 / tl.load(unit)
    for slot in range(slots):
        picture = tl.load(pictures + asker * slots + slot)
        reads = (picture >= 0) & (picture < images)
        place = (asker * heads + head) * slots + slot
        maps = ((row * images + picture) * cells * heads + head) * CHANNELS
        for first in range(0, EACH, SAMPLES):
            k = first + tl.arange(0, SAMPLES)
            dx = tl.zeros((SAMPLES,), EXACT)
            dy = tl.zeros((SAMPLES,), EXACT)
            for s in tl.static_range(SCALES):
                dweight = tl.zeros((SAMPLES,), EXACT)
                if PLACES > 1:
                    dx = tl.zeros((SAMPLES,), EXACT)
                    dy = tl.zeros((SAMPLES,), EXACT)
                if reads:
                    x, y, weight = _samples(points, weights, place, s, first, SCALES, PLACES, EACH, SAMPLES, EXACT)
                    column, right = _between(x, sides[2 * s + 1])
                    line, down = _between(y, sides[2 * s])
                    for corner in tl.static_range(4):
                        cell, there = _corner(sides, s, column + corner % 2, line + corner // 2)
                        at = maps + (cell * heads * CHANNELS)[:, None] + channel
                        there = there[:, None] & (channel < CHANNELS)
                        found = tl.load(value + at, there, 0.0).to(EXACT)
                        dshare = tl.sum(found * dtotal, 1)
                        across, below = _nearness(right, corner % 2), _nearness(down, corner // 2)
                        dweight += dshare * across * below
                        dx += (2 * (corner % 2) - 1) * sides[2 * s + 1] * weight * below * dshare
                        dy += (2 * (corner // 2) - 1) * sides[2 * s] * weight * across * dshare
                        dfound = (weight * across * below)[:, None] * dtotal
                        if FIXED:
                            dfound = (dfound * units).to(tl.int64)
                        tl.atomic_add(sums + at, dfound, there, sem="relaxed")
                tl.store(dweights + (place * SCALES + s) * EACH + k, dweight, k < EACH)
                if PLACES > 1 or s == SCALES - 1:
                    first_of_two = 2 * ((place * PLACES + s % PLACES) * EACH + k)
                    tl.store(dpoints + first_of_two, dx, k < EACH)
                    tl.store(dpoints + first_of_two + 1, dy, k < EACH)


@triton.jit
def _who(heads: tl.tensor, queries: tl.tensor) -> tl.tuple:
    """This program's head, its place in B and that in B * Q; programs side by side read the same maps."""
    number = tl.program_id(0)
    row = (number // queries // heads).to(tl.int64)
    return number // queries % heads, row, row * queries + number % queries


@triton.jit
def _samples(
    points: tl.tensor, weights: tl.tensor, place: tl.tensor, s: tl.constexpr, first: tl.tensor,
    SCALES: tl.constexpr, PLACES: tl.constexpr, EACH: tl.constexpr, SAMPLES: tl.constexpr, EXACT: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Points and weights of SAMPLES samples; those that are none lie outside."""
    k = first + tl.arange(0, SAMPLES)
    at = 2 * ((place * PLACES + s % PLACES) * EACH + k)
    x = tl.load(points + at, k < EACH, -9.0).to(EXACT)
    y = tl.load(points + at + 1, k < EACH, -9.0).to(EXACT)
    return x, y, tl.load(weights + (place * SCALES + s) * EACH + k, k < EACH, 0.0).to(EXACT)


@triton.jit
def _between(fractions: tl.tensor, size: tl.tensor) -> tl.tuple:
    """The cell before each point, and the way from there to the next; far away is two cells outside."""
    at = fractions * size - 0.5
    at = tl.where(at < -2, -2.0, at)
    at = tl.where(at > size + 1, size + 1.0, at)
    # what is not a number lies outside, and its way is not a number
    cell = tl.floor(tl.where(at == at, at, -2.0))
    return cell.to(tl.int32), at - cell


@triton.jit
def _nearness(way: tl.tensor, after: tl.constexpr) -> tl.tensor:
    """The share of the cell before a point, or of the one after it."""
    return way if after else 1 - way


@triton.jit
def _corner(sides: tl.tuple, s: tl.constexpr, column: tl.tensor, line: tl.tensor) -> tl.tuple:
    """Cells counted from the picture's first, and whether there are such cells."""
    start = 0
    for finer in tl.static_range(s):
        start += sides[2 * finer] * sides[2 * finer + 1]
    rows, cols = sides[2 * s], sides[2 * s + 1]
    there = (column >= 0) & (column < cols) & (line >= 0) & (line < rows)
    return (start + line * cols + column).to(tl.int64), there
