"""Deformable attention on a CPU: a sample is four rows of a table, and torch's `embedding_bag` adds up weighted rows.

    out[bag] = sum over samples and corners of share * table[cell + corner]          a bag is one query of one head

Samples are never written down, only the cell above and left of each and its place between four cells. A table holds,
head by head, the maps of all scales, so that the few cells that many bags in a row read stay in the cache:

    . . . . .      a b c . .     two cells of zeros after every row of a map and two rows after every map, which are
    . . . . .      d e f . .     also what comes before the next row and the next map: a point outside is moved to
    . .            . . . . .     where all four corners are zero, and there are no cases to tell apart
    before         . . . . .

Towards the values the sum runs the other way: samples are sorted by cell, and a bag is what reads one cell.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.ops.deform_attn.reference import Shapes

SAMPLES_AT_ONCE = 1 << 17
"""Heads are taken together up to this many samples: for fewer the calls would cost more than the work, and more would
cost memory for nothing."""


def by_bags(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    """As the contract says, on a CPU."""
    return cast(Tensor, _Bags.apply(value, shapes, points, weights, pictures))


class _Bags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
        ctx.save_for_backward(value, points, weights, pictures)
        ctx.shapes = shapes
        (batch, queries, heads, _, _, _), channels = weights.shape, value.shape[-1]
        reads, atlas = _Reads.of(pictures, value.shape[1]), _Atlas.of(value, shapes)
        out = value.new_empty(heads, batch * queries, channels)
        for some, samples in _parts(atlas, reads, points, weights):
            table, starts = atlas.table(value[:, :, :, some]), reads.starts(samples)
            of_corners = (
                _sums(table[corner:], cells, starts, shares)
                for (cells, corner), shares in zip(samples.corners, samples.shares(), strict=True)
            )
            out[some] = reduce(Tensor.add_, of_corners).view(-1, batch * queries, channels)
        return out.view(heads, batch, queries, channels).permute(1, 2, 0, 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        value, points, weights, pictures = ctx.saved_tensors
        reads, atlas = _Reads.of(pictures, value.shape[1]), _Atlas.of(value, ctx.shapes)
        dout = dout.permute(2, 0, 1, 3).flatten(1, 2).to(_exact(value))
        dvalue = torch.empty_like(value)
        dpoints = points.new_zeros(points.shape[2], pictures.numel(), *points.shape[4:])
        dweights = weights.new_zeros(weights.shape[2], pictures.numel(), *weights.shape[4:])
        for some, samples in _parts(atlas, reads, points, weights):
            table, starts = atlas.table(value[:, :, :, some]), reads.starts(samples)
            dbags = dout[some].flatten(0, 1)
            dots = [_dots(table[corner:], cells, starts, dbags) for cells, corner in samples.corners]
            dfx, dfy, dw = (of.unflatten(2, weights.shape[4:]) for of in samples.towards(*dots))
            for axis, of in enumerate((dfx.mul_(atlas.cols), dfy.mul_(atlas.rows))):
                reads.add_to(dpoints[some, ..., axis], of if points.shape[4] > 1 else of.sum(2, keepdim=True))
            reads.add_to(dweights[some], dw)
            atlas.add_up(table, samples, reads.bags(samples), dbags)
            atlas.copy(table, dvalue[:, :, :, some])
        of = (*pictures.shape[:2], -1)
        return (
            dvalue, None, dpoints.unflatten(1, of).permute(1, 2, 0, 3, 4, 5, 6),
            dweights.unflatten(1, of).permute(1, 2, 0, 3, 4, 5), None,
        )  # fmt: skip


class _Reads(NamedTuple):
    """The T pairs of a query and a picture that it reads, query by query, of all sequences."""

    slot: Tensor | None
    """(T,) their places among B * Q * M; None: all are such pairs."""
    picture: Tensor
    """(T,) of B * N"""
    query: Tensor
    """(T,) of B * Q"""
    first: Tensor
    """(B * Q,) the first pair of every query."""

    @classmethod
    def of(cls, pictures: Tensor, images: int) -> "_Reads":
        batch, queries, slots = pictures.shape
        flat = pictures.flatten()
        slot = (flat >= 0).nonzero().squeeze(1)
        query = slot // max(slots, 1)
        picture = flat[slot] + query // max(queries, 1) * images
        counts = torch.bincount(query, minlength=batch * queries)
        first = counts.cumsum(0) - counts
        return cls(None if len(slot) == len(flat) else slot, picture.int(), query.int(), first.int())

    def pick(self, of_slots: Tensor) -> Tensor:
        """(B, Q, h, M, ...) -> (h, T, ...)"""
        plane = of_slots.movedim(2, 0).flatten(1, 3)
        return (plane if self.slot is None else plane[:, self.slot]).contiguous()

    def add_to(self, plane: Tensor, found: Tensor) -> None:
        """found (h, T, ...) to plane (h, B * Q * M, ...)"""
        if self.slot is None:
            plane += found
        else:
            plane.index_add_(1, self.slot, found.to(plane.dtype))

    def starts(self, samples: "_Samples") -> Tensor:
        """(h * B * Q,) the first sample of every bag."""
        heads, pairs, each = samples.cells.shape
        return (self.first * each + _steps(heads, pairs * each)).flatten()

    def bags(self, samples: "_Samples") -> Tensor:
        """(h * T * S * K,) the bag of every sample."""
        heads, _, each = samples.cells.shape
        return (self.query + _steps(heads, len(self.first))).unsqueeze(2).expand(-1, -1, each).flatten()


class _Samples(NamedTuple):
    """Of some heads."""

    cells: Tensor
    """(h, T, S * K) int32: the row of the table above and left of the point."""
    fx: Tensor
    """(h, T, S * K) the way from there to the right, 0 to 1."""
    fy: Tensor
    """(h, T, S * K) the way down."""
    weights: Tensor
    below: Tensor
    """(S * K,) int32: rows of the table from a cell to the one below."""

    @property
    def corners(self) -> Iterator[tuple[Tensor, int]]:
        """Left and right above, left and right below: as cells, and rows of the table from there."""
        for cells in (self.cells, self.cells + self.below):
            yield cells, 0
            yield cells, 1

    def shares(self) -> Iterator[Tensor]:
        """The weight of each corner."""
        lower = self.weights * self.fy
        for row in (self.weights - lower, lower):
            right = row * self.fx
            yield row.sub_(right)
            yield right

    def towards(self, above: Tensor, above_right: Tensor, below: Tensor, below_right: Tensor) -> tuple[Tensor, ...]:
        """Gradients towards fx, fy and weights, from each corner's product with the gradient of its bag."""
        across, across_below = above_right.sub_(above), below_right.sub_(below)
        above = above.addcmul_(across, self.fx)
        down = below.addcmul_(across_below, self.fx).sub_(above)
        dfx = torch.lerp(across, across_below, self.fy).mul_(self.weights)
        return dfx, down * self.weights, above.addcmul_(down, self.fy)


class _Atlas(NamedTuple):
    """Where the maps of B * N pictures are in a table: for every head, scale after scale."""

    shapes: Shapes
    pictures: int
    starts: tuple[int, ...]
    """Of the scales among the rows of a head, and their end."""
    cols: Tensor
    """(S, 1)"""
    rows: Tensor
    """(S, 1)"""

    @classmethod
    def of(cls, value: Tensor, shapes: Shapes) -> "_Atlas":
        pictures, starts = value.shape[0] * value.shape[1], [0]
        for rows, cols in shapes:
            starts.append(starts[-1] + (pictures * (rows + 2) + 2) * (cols + 2) + 2)
        sides = torch.tensor(shapes, dtype=_exact(value))
        return cls(shapes, pictures, tuple(starts), sides[:, 1:], sides[:, :1])

    def table(self, value: Tensor) -> Tensor:
        """value (B, N, V, h, C) -> (h * starts[S], C)"""
        table = value.new_zeros(value.shape[3] * self.starts[-1], value.shape[4], dtype=_exact(value))
        for maps, of_value in self._maps(table, value):
            maps.copy_(of_value)
        return table

    def copy(self, table: Tensor, value: Tensor) -> None:
        """Back, to value (B, N, V, h, C)."""
        for maps, of_value in self._maps(table, value):
            of_value.copy_(maps)

    def _maps(self, table: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scale by scale the same cells of both, (h, B * N, rows, cols, C)."""
        parts = value.split([rows * cols for rows, cols in self.shapes], 2)
        for (rows, cols), of_head, part in zip(self.shapes, self._scales(table), parts, strict=True):
            maps = of_head[:, 2 * (cols + 2) + 2 :].unflatten(1, (self.pictures, rows + 2, cols + 2))
            yield maps[:, :, :rows, :cols], part.flatten(0, 1).unflatten(1, (rows, cols)).permute(3, 0, 1, 2, 4)

    def _scales(self, table: Tensor) -> Iterator[Tensor]:
        """Scale by scale (h, the rows of it, C)."""
        of_heads = table.view(-1, self.starts[-1], table.shape[1])
        return (of_heads[:, start:end] for start, end in pairwise(self.starts))

    def first_cells(self, reads: _Reads, heads: int, each: int) -> Tensor:
        """(h, T, S * K) int32: where the map begins that a sample reads."""
        start, size = self._of_samples(each, lambda s, rows, cols: (self.starts[s], (rows + 2) * (cols + 2)))
        return reads.picture.unsqueeze(1) * size + start + _steps(heads, self.starts[-1]).unsqueeze(2)

    def samples(self, first: Tensor, points: Tensor, weights: Tensor) -> _Samples:
        """points (h, T, S or 1, K, 2) as fractions, weights (h, T, S, K)"""
        width, last = self._of_samples(weights.shape[3], lambda _, rows, cols: (cols + 2, (rows + 3) * (cols + 2)))
        x, y = points.to(self.cols.dtype).unbind(4)
        (column, fx), (row, fy) = _between(x, self.cols), _between(y, self.rows)
        # a point that is not a number lies anywhere: its shares are not numbers either
        cells = row.mul_(width).add_(column).int().clamp_(width.new_zeros(()), last).add_(first)
        return _Samples(cells, fx, fy, weights.to(self.cols.dtype).flatten(2), width)

    def _of_samples(self, each: int, size: Callable[[int, int, int], tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Two (S * K,) int32: sizes that depend on the scale, for each of its samples."""
        sizes = [size(s, rows, cols) for s, (rows, cols) in enumerate(self.shapes)]
        first, second = torch.tensor(sizes, dtype=torch.int32).repeat_interleave(each, 0).T.contiguous()
        return first, second

    def add_up(self, table: Tensor, samples: _Samples, bags: Tensor, dbags: Tensor) -> None:
        """Of every row of the table, the shares that bags took of it, times their gradients."""
        cells, order = samples.cells.flatten().sort(stable=True)
        counts = torch.bincount(cells, minlength=len(table))
        starts, bags = (counts.cumsum(0) - counts).int(), bags[order]
        fx, fy, weights = (of.flatten()[order] for of in (samples.fx, samples.fy, samples.weights))
        shares = samples._replace(fx=fx, fy=fy, weights=weights).shares()
        for below in (False, True):
            left, right = (_sums(dbags, bags, starts, share) for share in (next(shares), next(shares)))
            left[1:] += right[:-1]
            if not below:
                table.copy_(left)
                continue
            for (_, cols), of_head, found in zip(self.shapes, self._scales(table), self._scales(left), strict=True):
                of_head[:, cols + 2 :] += found[:, : -(cols + 2)]


def _parts(atlas: _Atlas, reads: _Reads, points: Tensor, weights: Tensor) -> Iterator[tuple[slice, _Samples]]:
    """Some heads at once."""
    heads, scales, each = (weights.shape[axis] for axis in (2, 4, 5))
    step = min(max(SAMPLES_AT_ONCE // max(len(reads.picture) * scales * each, 1), 1), heads)
    first = atlas.first_cells(reads, step, each)
    for start in range(0, heads, step):
        some = slice(start, min(start + step, heads))
        picked = (reads.pick(of[:, :, some]) for of in (points, weights))
        yield some, atlas.samples(first[: some.stop - start], *picked)


def _between(fractions: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """(h, T, S or 1, K) -> (h, T, S * K) the cell before, counted from two left of the map, and the way to the next."""
    at = (fractions * size).flatten(2).add_(1.5)
    each = fractions.shape[3]
    at.clamp_(size.new_zeros(()), (size + 2).expand(-1, each).flatten())
    cell = at.floor()
    return cell, at.sub_(cell)


def _sums(table: Tensor, cells: Tensor, starts: Tensor, shares: Tensor) -> Tensor:
    return F.embedding_bag(cells.flatten(), table, starts, mode="sum", per_sample_weights=shares.flatten())


def _dots(table: Tensor, cells: Tensor, starts: Tensor, dbags: Tensor) -> Tensor:
    """(h, T, S * K): each sample's row of the table times the gradient of its bag."""
    zeros = table.new_zeros(cells.shape)
    ends = torch.cat((starts, starts.new_tensor([cells.numel()])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are young
        where = torch.sparse_csr_tensor(ends, cells.flatten(), zeros.flatten(), (len(dbags), len(table)))
    return torch.sparse.sampled_addmm(where, dbags, table.T, beta=0.0).values().view_as(cells)


def _steps(count: int, step: int) -> Tensor:
    return (torch.arange(count, dtype=torch.int32) * step).unsqueeze(1)


def _exact(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
