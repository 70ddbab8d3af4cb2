"""Deformable attention by torch's `grid_sample`: the definition that every other form is held against."""

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = tuple[tuple[int, int], ...]
"""(rows, cols) of the map of every scale."""


def by_grid_sample(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    """As the contract says: one call per scale, every head of every picture sampled by all queries."""
    (batch, images, _, heads, channels), queries = value.shape, points.shape[1]
    exact = torch.promote_types(value.dtype, torch.float32)
    # from places in a query's list to pictures, weighing nothing where the query does not read the picture
    reads = (pictures.unsqueeze(3) == torch.arange(images, device=pictures.device)).to(exact)
    points = torch.einsum("bqmn,bqhmskx->bqhnskx", reads, points.to(exact))
    weights = torch.einsum("bqmn,bqhmsk->bqhnsk", reads, weights.to(exact))
    total = value.new_zeros(batch, queries, heads, channels, dtype=exact)
    for s, maps in enumerate(value.to(exact).split([rows * cols for rows, cols in shapes], 2)):
        maps = maps.permute(0, 1, 3, 4, 2).reshape(batch * images * heads, channels, *shapes[s])
        grid = points[..., min(s, points.shape[4] - 1), :, :].permute(0, 3, 2, 1, 4, 5)
        found = F.grid_sample(maps, grid.reshape(len(maps), queries, weights.shape[5], 2) * 2 - 1, align_corners=False)
        found = found.unflatten(0, (batch, images, heads))
        total = total + torch.einsum("bnhcqk,bqhnk->bqhc", found, weights[..., s, :])
    return total.to(value.dtype)
