"""What the rows of one decoding step read and predict, from numbers to tensors.

reads     t8    t9    [IMG] p0   p1  ... p(P-1)  [/IMG]
predicts  t9    [IMG] p0    p1   p2  ... [/IMG]  t10
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from weft.generation.sampling import Draws
from weft.layout import Modality, ModalityLayout, Plane


class Element(NamedTuple):
    """One position in one plane of a layout."""

    modality: Modality
    image: int = -1
    row: int = -1
    col: int = -1


NOTHING = Element(Modality.NONE)
TEXT = Element(Modality.TEXT)


@dataclass(frozen=True)
class Input:
    """One row's part of a step: a token at a position of its sequence, or nothing (`Input(pad, position)`)."""

    token: int
    position: int
    reads: Element = NOTHING
    predicts: Element = NOTHING

    @property
    def is_real(self) -> bool:
        return self.reads.modality != Modality.NONE


def element_input(
    token: int, position: int, image: int, last_raster: int | None, next_raster: int | None, cols: int
) -> Input:
    """An element that is patch `last_raster` of picture number `image` and predicts patch `next_raster`; None: text."""

    def at(raster: int | None) -> Element:
        return TEXT if raster is None else Element(Modality.IMAGE, image, raster // cols, raster % cols)

    return Input(token, position, at(last_raster), at(next_raster))


class Drawing(NamedTuple):
    """How one slot's next element is chosen."""

    may: int
    """The kinds of text allowed."""
    top_k: int
    without_text: int
    """The slots that guidance leads it away from; its own where it does not."""
    without_all: int
    temperature: float = 0.0
    top_p: float = 1.0
    uniform: float = 0.0
    text: float = 1.0
    """How far."""
    images: float = 1.0


_READ, _DRAWN = 10, 4
"""Whole numbers of a slot: what it reads, then how it chooses; after them stand the five fractions of a `Drawing`."""
_NUMBERS = struct.Struct(f"={_READ + _DRAWN}q5d")
WIDTH = _NUMBERS.size // 8
"""Numbers of a slot in one step."""


def to_numbers(inputs: Sequence[Input], drawings: Sequence[Drawing]) -> Tensor:
    """(B, WIDTH) int64: all of one step that changes from step to step, for one transfer to the device."""
    packed = bytearray()
    for each, drawing in zip(inputs, drawings, strict=True):
        packed += _NUMBERS.pack(each.token, each.position, *each.reads, *each.predicts, *drawing)
    return torch.frombuffer(packed, dtype=torch.int64).view(-1, WIDTH)


@dataclass(frozen=True)
class StepTensors:
    """One step on the device."""

    ids: Tensor
    """(B, 1)"""
    positions: Tensor
    """(B, 1)"""
    layout: ModalityLayout
    is_image: Tensor
    """(B,) bool: predicts an element of a picture."""
    may: Tensor
    """(B,)"""
    sources: Tensor
    """(2, B) the slots that each slot is led away from."""
    scales: Tensor
    """(2, B) by how much."""
    draws: Draws

    @classmethod
    def of(cls, numbers: Tensor, grids: Tensor, greedy: bool) -> Self:
        """`to_numbers` on the device, of which the whole numbers are views; `grids` (B, N, 2) as in the layout."""
        ids, positions, layout = _split(numbers.T.unsqueeze(-1), grids)
        may, top_k, *sources = (_READ + i for i in range(_DRAWN))
        fractions = numbers[:, _READ + _DRAWN :].contiguous().view(torch.float64).float().T
        draws = Draws(fractions[0], numbers[:, top_k], fractions[1], fractions[2], greedy)
        is_image = layout.outputs.modality[:, 0] == Modality.IMAGE
        return cls(ids, positions, layout, is_image, numbers[:, may], numbers.T[sources[0] :][:2], fractions[3:], draws)


def to_tensors(inputs: Sequence[Input], grids: Tensor) -> tuple[Tensor, Tensor, ModalityLayout]:
    """Ids (B, 1), positions (B, 1) and the layout of one step; `grids` (B, N, 2) as in the layout."""
    # one transfer to the device
    numbers = [(each.token, each.position, *each.reads, *each.predicts) for each in inputs]
    return _split(torch.tensor(numbers, device=grids.device).T.unsqueeze(-1), grids)


def _split(columns: Tensor, grids: Tensor) -> tuple[Tensor, Tensor, ModalityLayout]:
    given = torch.zeros_like(grids[..., 0], dtype=torch.bool)  # what is being written now is not given
    return columns[0], columns[1], ModalityLayout(Plane(*columns[2:6]), Plane(*columns[6:10]), grids, given)
