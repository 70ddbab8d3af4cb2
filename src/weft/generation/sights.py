"""What the rows of a decoding step see: the pictures of each cache slot, projected once for all the tokens after them.

Only where the backbone has synchronisers.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weft.synchronizer.mmfs import Projected
from weft.synchronizer.sight import NOTHING, Looks, Sight, Synchronizer


class Sights:
    """The pictures that each slot holds, in their order. Room for them grows, with that of all other slots."""

    def __init__(self, synchronizer: Synchronizer, slots: int) -> None:
        self._synchronizer, self._slots = synchronizer, slots
        self._counts = [0] * slots
        self._kept: dict[str, Projected] = {}
        """By branch: values (slots, N, V, H, C)."""

    def add(self, slots: Sequence[int], looks: Looks) -> None:
        """Each slot holds these pictures (M, ...) from now on, after those that it has."""
        bank = self._synchronizer.bank_of(looks)
        new = self._synchronizer.insertion.project(replace(bank, features=bank.features.transpose(0, 1)))
        count = len(bank.features)
        self._make_room(max(self._counts[slot] for slot in slots) + count)
        for slot in slots:
            first = self._counts[slot]
            for name, kept in self._kept.items():
                kept.values[slot, first : first + count] = new[name].values[0]
            self._counts[slot] += count

    def clear(self, slot: int) -> None:
        self._counts[slot] = 0

    def step(self, seen: Sequence[int]) -> Sight:
        """What is seen in a step of all slots, of which each sees its first `seen` pictures."""
        if not self._kept:
            return NOTHING
        room = next(iter(self._kept.values())).values.shape[1]
        device = next(iter(self._kept.values())).values.device
        visible = torch.arange(room, device=device) < torch.tensor(seen, device=device)[:, None, None]
        return Sight(self._kept, visible)

    def of(self, slot: int, visible: Tensor) -> Sight:
        """What several positions of one slot see: (1, L, N) bool, N at most the room there is."""
        only = {
            name: replace(kept, values=kept.values[slot : slot + 1, : visible.shape[2]])
            for name, kept in self._kept.items()
        }
        return Sight(only, visible) if only else NOTHING

    def _make_room(self, pictures: int) -> None:
        room = next(iter(self._kept.values())).values.shape[1] if self._kept else 0
        if pictures <= room:
            return
        room = max(pictures, 2 * room)
        empty = self._synchronizer.insertion.project(self._synchronizer.blank_bank(1, room))
        for name, projected in empty.items():
            values = projected.values.new_zeros(self._slots, *projected.values.shape[1:])
            if name in self._kept:
                before = self._kept[name].values
                values[:, : before.shape[1]] = before
            self._kept[name] = replace(projected, values=values)
