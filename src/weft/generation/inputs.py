"""What the rows of one decoding step read and predict, from numbers to tensors.

    reads     t8    t9    [IMG] p0   p1  ... p(P-1)  [/IMG]
    predicts  t9    [IMG] p0    p1   p2  ... [/IMG]  t10

A row in a picture is described by the raster index of the patch it predicts, P at the last patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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


def text_input(token: int, position: int) -> Input:
    """A text token, or the one that closes a picture."""
    return Input(token, position, TEXT, TEXT)


def image_input(token: int, position: int, image: int, raster: int, grid: tuple[int, int]) -> Input:
    """The token that opens picture number `image` (raster 0), or its patch raster - 1."""
    rows, cols = grid

    def patch(place: int) -> Element:
        return Element(Modality.IMAGE, image, place // cols, place % cols)

    reads = patch(raster - 1) if raster else TEXT
    return Input(token, position, reads, patch(raster) if raster < rows * cols else TEXT)


def to_tensors(inputs: Sequence[Input], grids: Tensor) -> tuple[Tensor, Tensor, ModalityLayout]:
    """Ids (B, 1), positions (B, 1) and the layout of one step; `grids` (B, N, 2) as in the layout."""
    # one transfer to the device
    numbers = [(each.token, each.position, *each.reads, *each.predicts) for each in inputs]
    columns = torch.tensor(numbers, device=grids.device).T.unsqueeze(-1)
    given = torch.zeros_like(grids[..., 0], dtype=torch.bool)  # what is being written now is not given
    return columns[0], columns[1], ModalityLayout(Plane(*columns[2:6]), Plane(*columns[6:10]), grids, given)
