"""Partial sums of the conv branches while pictures are written patch by patch.

A patch is read by later ones only, at most `RingCache.size` places ahead in raster order. So each picture being written
owns a ring of that many R-wide sums per layer, instead of the C-wide patches they come from: 16 to 64 times smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.ops.grid import Window


@dataclass(frozen=True)
class StepTables:
    """Where one step of one window reads and writes in a ring of S * size + 1 rows, the last for what has no place."""

    here: Tensor
    """(B,) the partial sum that this patch completes."""
    ahead: Tensor
    """(B * T,) where each tap product goes, this patch's own among them."""
    done: Tensor
    """(B + 1,) the rows to clear: `here`, and the last."""
    size: int


class RingCache:
    """The conv branches' partial sums, one ring per adapted layer and window, for a fixed number of cache slots.

    Owned by whoever decodes; a slot must be reset when a picture starts in it.

    Args:
        columns: of the widest grid to be decoded.
    """

    def __init__(self, slots: int, columns: int) -> None:
        self.slots, self.columns = slots, columns
        self._rings: dict[Any, Tensor] = {}

    def size(self, window: Window) -> int:
        """Partial sums per slot: how far ahead in raster order a patch is read, and itself."""
        return window.up * self.columns + window.left + 1

    def ring(self, key: Any, window: Window, taps: Tensor, rank: int) -> Tensor:
        """(slots * size + 1, rank) partial sums of one window of one layer, zero at first, in the dtype of `taps`."""
        if key not in self._rings:
            self._rings[key] = taps.new_zeros(self.slots * self.size(window) + 1, rank, requires_grad=False)
        return self._rings[key]

    def reset(self, slots: Sequence[int]) -> None:
        """Forget the partial sums of these slots."""
        if len(slots):
            for ring in self._rings.values():
                ring[:-1].view(self.slots, -1, ring.shape[1])[list(slots)] = 0

    def reorder(self, order: Tensor) -> None:
        """Slot i takes what slot order[i] holds, as beams do."""
        for ring in self._rings.values():
            held = ring[:-1].view(self.slots, -1, ring.shape[1])
            held.copy_(held[order])

    @property
    def nbytes(self) -> int:
        return sum(ring.nbytes for ring in self._rings.values())


def step_tables(
    window: Window, rings: RingCache, slots: Tensor, place: Tensor, cols: Tensor, is_image: Tensor
) -> StepTables:
    """Where each row of one step reads and writes.

    Args:
        slots, place, cols, is_image: (B,) cache slot, raster index, columns of the grid, whether it writes a patch.
    """
    size, last = rings.size(window), rings.slots * rings.size(window)
    # filled on the device: copying a list to it would wait, and cannot be captured
    a, b = (torch.cat([place.new_full((1,), offset) for offset in side]) for side in zip(*window.taps, strict=True))
    cols, at, base = cols.unsqueeze(1), place.unsqueeze(1), slots.unsqueeze(1) * size
    col = at % cols + b
    reaches = is_image.unsqueeze(1) & (col >= 0) & (col < cols)
    ahead = torch.where(reaches, base + (at + a * cols + b) % size, last)  # (B, T), the patch itself first
    here = ahead[:, 0]
    return StepTables(here, ahead.reshape(-1), torch.cat((here, here.new_full((1,), last))), size)
