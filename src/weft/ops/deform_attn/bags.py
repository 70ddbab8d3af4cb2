"""Deformable attention on a CPU: a sample is four rows of a table, and torch's `embedding_bag` adds up weighted rows.

    out[bag] = sum over samples and corners of share * table[cell + corner]          a bag is one query of one head

Samples are never written down, only the cell above and left of each and its place between four cells. A table holds the
maps of one scale, head by head, so that the few maps that many bags in a row read stay in the cache:

    . . . . .      a b c . .     two cells of zeros after every row of a map and two rows after every map, which are
    . . . . .      d e f . .     also what comes before the next row and the next map: a point outside is moved to
    . .            . . . . .     where all four corners are zero, and there are no cases to tell apart
    before         . . . . .

Towards the values the sum runs the other way: samples are sorted by cell, and a bag is what reads one cell.
"""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.ops.deform_attn.reference import Shapes

SAMPLES_AT_ONCE = 1 << 16
"""Heads are taken together up to this many samples of one scale: for fewer the calls would cost more than the work, and
more would cost memory for nothing."""


def by_bags(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    """As the contract says, on a CPU."""
    return cast(Tensor, _Bags.apply(value, shapes, points, weights, pictures))


class _Bags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
        ctx.save_for_backward(value, points, weights, pictures)
        ctx.shapes = shapes
        (batch, queries, heads, _, _, _), channels = weights.shape, value.shape[-1]
        reads = _Reads.of(pictures, value.shape[1])
        out = value.new_empty(heads, batch * queries, channels)
        for some in reads.parts(weights):
            found = torch.zeros((), dtype=_exact(value))
            for table, samples in _scales(value, shapes, points, weights, reads, some):
                starts = reads.starts(samples)
                for corner, shares in zip(samples.corners, samples.shares(), strict=True):
                    found = found + _sums(table.rows[corner:], samples.cells, starts, shares)
            out[some] = found.view(-1, batch * queries, channels)
        return out.view(heads, batch, queries, channels).permute(1, 2, 0, 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        value, points, weights, pictures = ctx.saved_tensors
        _, _, heads, _, scales, each = weights.shape
        reads, slots = _Reads.of(pictures, value.shape[1]), pictures.numel()
        dout = dout.permute(2, 0, 1, 3).flatten(1, 2).to(_exact(value))
        dvalue = torch.empty_like(value)
        dpoints = points.new_zeros(points.shape[4], 2, heads, slots, each)
        dweights = weights.new_zeros(scales, heads, slots, each)
        for some in reads.parts(weights):
            dbags, dmaps = dout[some].flatten(0, 1), _maps(dvalue, ctx.shapes)
            for s, (table, samples) in enumerate(_scales(value, ctx.shapes, points, weights, reads, some)):
                starts, dplane = reads.starts(samples), dpoints[min(s, len(dpoints) - 1), :, some]
                dots = [_dots(table.rows[corner:], samples.cells, starts, dbags) for corner in samples.corners]
                dfx, dfy, dw = samples.towards(*dots)
                reads.add_to(dplane[0], dfx.mul_(table.shape[3]))
                reads.add_to(dplane[1], dfy.mul_(table.shape[2]))
                reads.add_to(dweights[s, some], dw)
                table.rows.zero_()
                _add_to_cells(table.rows, samples, reads.bags(samples), dbags)
                next(dmaps)[some] = table.maps()
        of = (*pictures.shape[:2], -1)
        return (
            dvalue, None, dpoints.unflatten(3, of).permute(3, 4, 2, 5, 0, 6, 1),
            dweights.unflatten(2, of).permute(2, 3, 1, 4, 0, 5), None,
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

    def parts(self, weights: Tensor) -> Iterator[slice]:
        """Heads to take at once."""
        heads, samples = weights.shape[2], max(len(self.picture) * weights.shape[5], 1)
        step = max(SAMPLES_AT_ONCE // samples, 1)
        return (slice(start, min(start + step, heads)) for start in range(0, heads, step))

    def pick(self, plane: Tensor) -> Tensor:
        """(B, Q, h, M, K) -> (h, T, K)"""
        plane = plane.permute(2, 0, 1, 3, 4).flatten(1, 3)
        return (plane if self.slot is None else plane[:, self.slot]).contiguous()

    def add_to(self, plane: Tensor, found: Tensor) -> None:
        """found (h, T, K) to plane (h, B * Q * M, K)"""
        if self.slot is None:
            plane += found
        else:
            plane.index_add_(1, self.slot, found.to(plane.dtype))

    def starts(self, samples: "_Samples") -> Tensor:
        """(h * B * Q,) the first sample of every bag."""
        heads, pairs, each = samples.cells.shape
        return (self.first * each + _steps(heads, pairs * each)).flatten()

    def bags(self, samples: "_Samples") -> Tensor:
        """(h * T * K,) the bag of every sample."""
        heads, _, each = samples.cells.shape
        return (self.query + _steps(heads, len(self.first))).unsqueeze(2).expand(-1, -1, each).flatten()


class _Samples(NamedTuple):
    """Of some heads, in one scale."""

    cells: Tensor
    """(h, T, K) int32: the row of the table above and left of the point."""
    fx: Tensor
    """(h, T, K) the way from there to the right, 0 to 1."""
    fy: Tensor
    """(h, T, K) the way down."""
    weights: Tensor
    below: int
    """Rows of the table from a cell to the one below."""

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """Rows of the table from `cells` to the four: left and right above, left and right below."""
        return 0, 1, self.below, self.below + 1

    def shares(self) -> Iterator[Tensor]:
        """The weight of each corner."""
        lower = self.weights * self.fy
        for row in (self.weights - lower, lower):
            right = row * self.fx
            yield row - right
            yield right

    def towards(self, above: Tensor, above_right: Tensor, below: Tensor, below_right: Tensor) -> tuple[Tensor, ...]:
        """Gradients towards fx, fy and weights, from each corner's product with the gradient of its bag."""
        across, across_below = above_right.sub_(above), below_right.sub_(below)
        above = above.addcmul_(across, self.fx)
        down = below.addcmul_(across_below, self.fx).sub_(above)
        dfx = torch.lerp(across, across_below, self.fy).mul_(self.weights)
        return dfx, down * self.weights, above.addcmul_(down, self.fy)


class _Table(NamedTuple):
    rows: Tensor
    """(before + h * pictures * (rows + 2) * (cols + 2), C)"""
    shape: tuple[int, ...]
    """h, pictures, rows, cols"""

    @classmethod
    def of(cls, maps: Tensor, dtype: torch.dtype) -> "_Table":
        """maps (h, pictures, rows, cols, C)"""
        *shape, channels = maps.shape
        heads, pictures, rows, cols = shape
        size = (heads * pictures * (rows + 2) + 2) * (cols + 2) + 2
        table = cls(maps.new_zeros(size, channels, dtype=dtype), tuple(shape))
        table.maps().copy_(maps)
        return table

    def maps(self) -> Tensor:
        """(h, pictures, rows, cols, C)"""
        heads, pictures, rows, cols = self.shape
        cells = self.rows[2 * (cols + 2) + 2 :].view(heads, pictures, rows + 2, cols + 2, self.rows.shape[1])
        return cells[:, :, :rows, :cols]

    def samples(self, pictures: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> _Samples:
        """pictures (T,); x, y as fractions and weights (h, T, K)"""
        heads, images, rows, cols = self.shape
        (column, fx), (row, fy) = _between(x, cols), _between(y, rows)
        size = (rows + 2) * (cols + 2)
        # a point that is not a number lies anywhere: its shares are not numbers either
        cells = row.mul_(cols + 2).add_(column).int().clamp_(0, size + cols + 2)
        cells += ((pictures + _steps(heads, images)) * size).unsqueeze(2)
        return _Samples(cells, fx, fy, weights, cols + 2)


def _between(fractions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The cell before a point, counted from two cells left of the map, and the way from there to the next."""
    at = torch.add(1.5, fractions, alpha=size).clamp_(0, size + 3)
    cell = at.floor().clamp_(max=size + 2)
    return cell, at.sub_(cell)


def _scales(
    value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, reads: _Reads, some: slice
) -> Iterator[tuple[_Table, _Samples]]:
    exact = _exact(value)
    for s, maps in enumerate(_maps(value, shapes)):
        if s < points.shape[4]:
            x, y = (reads.pick(points[:, :, some, :, s, :, axis].to(exact)) for axis in (0, 1))
        table = _Table.of(maps[some], exact)
        yield table, table.samples(reads.picture, x, y, reads.pick(weights[:, :, some, :, s].to(exact)))


def _maps(value: Tensor, shapes: Shapes) -> Iterator[Tensor]:
    """value (B, N, V, H, C) scale by scale as (H, B * N, rows, cols, C)"""
    for part, shape in zip(value.split([rows * cols for rows, cols in shapes], 2), shapes, strict=True):
        yield part.flatten(0, 1).unflatten(1, shape).permute(3, 0, 1, 2, 4)


def _sums(table: Tensor, cells: Tensor, starts: Tensor, shares: Tensor) -> Tensor:
    return F.embedding_bag(cells.flatten(), table, starts, mode="sum", per_sample_weights=shares.flatten())


def _dots(table: Tensor, cells: Tensor, starts: Tensor, dbags: Tensor) -> Tensor:
    """(h, T, K): each sample's row of the table times the gradient of its bag."""
    zeros = table.new_zeros(cells.shape)
    ends = torch.cat((starts, starts.new_tensor([cells.numel()])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are young
        where = torch.sparse_csr_tensor(ends, cells.flatten(), zeros.flatten(), (len(dbags), len(table)))
    return torch.sparse.sampled_addmm(where, dbags, table.T, beta=0.0).values().view_as(cells)


def _add_to_cells(dtable: Tensor, samples: _Samples, bags: Tensor, dbags: Tensor) -> None:
    cells, order = samples.cells.flatten().sort(stable=True)
    counts = torch.bincount(cells, minlength=len(dtable))
    starts, bags = (counts.cumsum(0) - counts).int(), bags[order]
    fx, fy, weights = (of.flatten()[order] for of in (samples.fx, samples.fy, samples.weights))
    ordered = _Samples(cells, fx, fy, weights, samples.below)
    for corner, shares in zip(ordered.corners, ordered.shares(), strict=True):
        dtable[corner:] += _sums(dbags, bags, starts[: len(dtable) - corner], shares)


def _steps(count: int, step: int) -> Tensor:
    return (torch.arange(count, dtype=torch.int32) * step).unsqueeze(1)


def _exact(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
