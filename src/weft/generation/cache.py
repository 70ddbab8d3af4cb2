"""Keys and values of rows that join and leave at any step, behind transformers' cache interface.

transformers' own caches advance all rows together; here every row is written at its own positions. What a freed slot
still holds is hidden by the mask, but a hidden value that is not a number would come through it (0 * NaN): clear a slot
when its row leaves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from weft.backbones.base import DecodeStep

WIDTH_STEP = 64
"""Widths are multiples of it: few shapes, and on a CPU the same bits whatever the width."""


@dataclass
class _Frame:
    """Where the current forward writes and how far it reads; shared by all layers."""

    slots: Tensor
    """(B,)"""
    positions: Tensor
    """(B, q)"""
    width: int
    every_slot: bool
    """Row b is slot b, for every slot."""
    _places: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def places(self, stored: Tensor) -> Tensor:
        """(B * H * q,) rows of `stored` (slots, H, length, C), taken as (slots * H * length, C), that are written."""
        heads, length = stored.shape[1:3]
        key = heads, stored.device
        if key not in self._places:  # once for all layers of a device
            head = torch.arange(heads, device=self.slots.device)
            places = (self.slots[:, None] * heads + head)[..., None] * length + self.positions[:, None]
            self._places[key] = places.flatten().to(stored.device)
        return self._places[key]


class _SlotLayer(CacheLayerMixin):
    """Keys and values (slots, H, room, C) of one layer; room is doubled where a row needs more, up to the length."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, room = self._cache.slots, self._cache.length if self._cache.is_static else 0
        self.keys, self.values = (
            states.new_zeros(slots, states.shape[1], room, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def _grow(self, width: int) -> None:
        # a context may have 100,000 positions and an answer few
        more = min(max(width, 2 * self.keys.shape[2]), self._cache.length) - self.keys.shape[2]
        self.keys, self.values = (F.pad(stored, (0, 0, 0, more)) for stored in (self.keys, self.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, H, q, C) at the rows' positions; returns (B, H, width, C) of the rows' slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        frame = self._cache.frame
        if frame.width > self.keys.shape[2]:
            self._grow(frame.width)
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            stored.view(-1, stored.shape[-1]).index_copy_(0, frame.places(stored), states.flatten(0, 2))
        if frame.every_slot:
            return self.keys[:, :, : frame.width], self.values[:, :, : frame.width]
        return self.keys[frame.slots, :, : frame.width], self.values[frame.slots, :, : frame.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.frame.width, 0

    def get_seq_length(self) -> int:
        return self._cache.frame.width

    def get_max_length(self) -> int:
        return self._cache.length


class SlotCache(Cache):
    """`slots` sequences of up to `length` positions, for any number of layers.

    Args:
        static: room for all positions is made at once, and keys and values stay where they are.
    """

    frame: _Frame

    def __init__(self, slots: int, length: int, *, static: bool = False) -> None:
        self.slots, self.length, self.is_static = slots, length, static
        self._every: Tensor | None = None
        super().__init__(layer_class_to_replicate=partial(_SlotLayer, self))

    def step(self, positions: Tensor, reach: int, rings: Any = None, slots: Sequence[int] | None = None) -> DecodeStep:
        """Prepare a forward.

        Args:
            positions: (B, q), where each row's inputs stand in its own sequence.
            reach: the largest position + 1.
            rings: the adapters' partial sums, where every row feeds one position.
            slots: the slot of each row; None: all, in order.
        """
        device, width = positions.device, self.width(reach)
        rows = self._all_slots(device) if slots is None else torch.tensor(slots, device=device)
        self.frame = _Frame(rows, positions, width, every_slot=slots is None)
        readable = torch.arange(width, device=device) <= positions[:, None, :, None]  # (B, 1, q, width)
        return DecodeStep(rows, positions, readable, self, rings)

    def width(self, reach: int) -> int:
        """Positions that are read where the largest is reach - 1."""
        return min(-(-reach // WIDTH_STEP) * WIDTH_STEP, self.length)

    def _all_slots(self, device: torch.device) -> Tensor:
        # the same tensor in every step: a captured one reads no list
        if self._every is None or self._every.device != device:
            self._every = torch.arange(self.slots, device=device)
        return self._every

    def clear(self, slot: int) -> None:
        """Forget what a slot holds."""
        for layer in cast("list[_SlotLayer]", self.layers):
            layer.keys[slot], layer.values[slot] = 0, 0

    def reorder(self, order: Sequence[int]) -> None:
        """Slot i takes what slot order[i] holds, as beams do."""
        for layer in cast("list[_SlotLayer]", self.layers):
            for stored in (layer.keys, layer.values):
                stored.copy_(stored[list(order)])
