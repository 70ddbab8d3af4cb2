"""Fixed sine and cosine tables that say where something is, and tables of positions resized to another grid.

Angles are computed in float64; tables are float32, on the CPU, whatever the default device is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LONGEST = 10000.0
"""Wavelengths go from 2 pi to nearly 2 pi times this."""


def sin_cos(positions: Tensor, width: int) -> Tensor:
    """Positions (...) -> (..., width): [sin(p w_k)]_k, then [cos(p w_k)]_k, where w_k = LONGEST^(-k / (width / 2)).

    The halves stand one behind the other, not interleaved. `width` is even.
    """
    half = width // 2
    frequencies = LONGEST ** (-torch.arange(half, device="cpu", dtype=torch.float64) / half)
    angles = positions.to("cpu", torch.float64).unsqueeze(-1) * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def grid_sin_cos(rows: int, cols: int, width: int) -> Tensor:
    """(rows * cols, width), row by row: the first half of the channels says the row, the other the column.

    `width` is a multiple of 4.
    """
    row, col = (sin_cos(torch.arange(n, device="cpu"), width // 2) for n in (rows, cols))
    parts = (row.unsqueeze(1).expand(-1, cols, -1), col.expand(rows, -1, -1))
    return torch.cat(parts, dim=-1).flatten(0, 1)


def resize_table(table: Tensor, rows: int, cols: int, *, align_corners: bool) -> Tensor:
    """Positions of a square grid, (G * G, C) row by row -> (rows * cols, C), by bicubic interpolation.

    Computed in float32 at least, returned in the dtype of `table`; the table itself where the grid is the same.
    """
    side = round(len(table) ** 0.5)
    if (rows, cols) == (side, side):
        return table
    image = table.to(torch.promote_types(table.dtype, torch.float32)).T.unflatten(1, (side, side)).unsqueeze(0)
    image = F.interpolate(image, size=(rows, cols), mode="bicubic", align_corners=align_corners)
    return image[0].flatten(1).T.to(table.dtype)
