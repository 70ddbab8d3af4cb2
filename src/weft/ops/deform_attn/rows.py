"""Deformable attention straight from the values: for so few samples that arranging the values would cost more.

Every corner of every sample is written down, as the number of its row among the values and its share; torch's
`embedding_bag` adds them up.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.ops.deform_attn.reference import Shapes


def by_rows(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, pictures: Tensor) -> Tensor:
    """As the contract says."""
    (batch, images, cells, heads, channels), queries = value.shape, weights.shape[1]
    exact, device = torch.promote_types(value.dtype, torch.float32), value.device
    starts = [sum(rows * cols for rows, cols in shapes[:s]) for s in range(len(shapes))]
    scales = [(cols, rows, start) for (rows, cols), start in zip(shapes, starts, strict=True)]
    cols, rows, start = torch.tensor(scales, dtype=exact, device=device)[..., None, None].unbind(1)  # (S, 1, 1) each
    right, below = torch.tensor(((0, 1, 0, 1), (0, 0, 1, 1)), dtype=exact, device=device)
    x, y = points.to(exact).unsqueeze(6).unbind(7)  # (B, Q, H, M, S or 1, K, 1) each
    (column, of_x), (row, of_y) = _corners(x * cols - 0.5, right, cols), _corners(y * rows - 0.5, below, rows)
    weights = weights.to(exact) * (pictures >= 0)[:, :, None, :, None, None]
    shares = of_x * of_y * weights.unsqueeze(6)
    # a point that is not a number lies anywhere: its shares are not numbers either
    cell = (row * cols + column + start).long().clamp_(0, cells - 1)
    picture = pictures.clamp_min(0) + torch.arange(batch, device=device)[:, None, None] * images
    first = picture.unsqueeze(2) * (cells * heads) + torch.arange(heads, device=device)[:, None]  # (B, Q, H, M)
    at, table = (cell * heads + first[..., None, None, None]).flatten(), value.reshape(-1, channels)
    if table.dtype != exact:
        table, at = table[at].to(exact), torch.arange(len(at), device=device)
    bags = torch.arange(batch * queries * heads, device=device) * shares[:1, :1, :1].numel()
    found = F.embedding_bag(at, table, bags, mode="sum", per_sample_weights=shares.flatten())
    return found.view(batch, queries, heads, channels).to(value.dtype)


def _corners(at: Tensor, after: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The cells before (`after` 0) and after (1) a place, and the share of each: zero where there is no such cell."""
    cell = at.detach().floor() + after
    inside = torch.minimum(cell.clamp_min(0), size - 1)
    return inside, (1 - (at - cell).abs()) * (cell == inside)
