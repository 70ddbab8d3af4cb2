"""Patches of pictures as rows of a matrix, and the causal windows that reach from one to earlier ones."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

WindowShape = Literal["up_left", "raster"]
MAX_KERNEL = 4


@dataclass(frozen=True)
class Window:
    """Which patches one patch reads: (rows up, columns left) of each tap, the patch itself first.

    All of them come earlier in raster order, so that pictures can be written patch by patch.
    """

    name: str
    taps: tuple[tuple[int, int], ...]

    @staticmethod
    @cache
    def of(kernel: int, shape: WindowShape = "up_left") -> "Window":
        """`up_left`: k x k patches that end at this one (Xu et al. 2024). `raster`: the k x k patches around this one,
        those that come earlier; k = 3 is itself, its left neighbour and three above."""
        if shape == "up_left":
            return Window(f"up_left{kernel}", tuple((a, b) for a in range(kernel) for b in range(kernel)))
        left, right = kernel // 2, (kernel - 1) // 2
        above = tuple((a, b) for a in range(1, kernel // 2 + 1) for b in range(-right, left + 1))
        return Window(f"raster{kernel}", (*((0, b) for b in range(left + 1)), *above))

    @property
    def up(self) -> int:
        return max(a for a, _ in self.taps)

    @property
    def left(self) -> int:
        return max(b for _, b in self.taps)

    @property
    def right(self) -> int:
        return max(-b for _, b in self.taps)


@dataclass(frozen=True)
class Tables:
    """One window over one set of patches. Both (n, T); n where there is no such patch."""

    reads: Tensor
    """Row that each tap of this row reads."""
    read_by: Tensor
    """Row that reads this row through each tap."""


@dataclass(frozen=True)
class Patches:
    """n rows: the patches of pictures, each picture's in raster order, one picture after another."""

    groups: tuple[tuple[tuple[int, int], int], ...]
    """((rows, columns) of the grid, number of pictures), in the order of the rows; empty unless all are whole."""
    tables: dict[str, Tables]
    """By the window's name, for the windows that were asked for."""

    @staticmethod
    def of(
        groups: tuple[tuple[tuple[int, int], int], ...], first: Tensor, place: Tensor, grid: Tensor,
        windows: tuple[Window, ...],
    ) -> "Patches":  # fmt: skip
        """Find every window's neighbours.

        Args:
            first: (n,) the row of the first patch of this row's picture.
            place: (n,) raster index. A picture may end early, not begin late.
            grid: (n, 2) its rows and columns.
        """
        return Patches(groups, {w.name: _tables(w, first, place, grid) for w in windows})

    @staticmethod
    def dense(groups: tuple[tuple[tuple[int, int], int], ...], windows: tuple[Window, ...] = ()) -> "Patches":
        """Whole pictures, group after group."""
        place = torch.cat([torch.arange(h * w).repeat(m) for (h, w), m in groups])
        grid = torch.cat([torch.tensor([[h, w]]).expand(m * h * w, 2) for (h, w), m in groups])
        return Patches.of(groups, torch.arange(len(place)) - place, place, grid, windows)


def _tables(window: Window, first: Tensor, place: Tensor, grid: Tensor) -> Tables:
    n, device = len(place), place.device
    up, left = torch.tensor(window.taps, device=device).unbind(1)
    cols = grid[:, 1:].clamp_min(1)
    row, col = place.unsqueeze(1) // cols, place.unsqueeze(1) % cols
    source_row, source_col = row - up, col - left  # (n, T)
    there = (source_row >= 0) & (source_col >= 0) & (source_col < cols)
    reads = torch.where(there, first.unsqueeze(1) + source_row * cols + source_col, n)
    # the other way round: each (row, tap) is read at most once; the last row takes what falls outside
    read_by = reads.new_full((n + 1, len(window.taps)), n)
    read_by.scatter_(0, reads, torch.arange(n, device=device).unsqueeze(1).expand_as(reads).contiguous())
    return Tables(reads, read_by[:n])
