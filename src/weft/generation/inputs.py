"""What the rows of one decoding step read and predict, from numbers to tensors.

reads     t8    t9    [IMG] p0   p1  ... p(P-1)  [/IMG]
predicts  t9    [IMG] p0    p1   p2  ... [/IMG]  t10
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


def element_input(
    token: int, position: int, image: int, last_raster: int | None, next_raster: int | None, cols: int
) -> Input:
    """An element that is patch `last_raster` of picture number `image` and predicts patch `next_raster`; None: text."""

    def at(raster: int | None) -> Element:
        return TEXT if raster is None else Element(Modality.IMAGE, image, raster // cols, raster % cols)

    return Input(token, position, at(last_raster), at(next_raster))


def to_tensors(inputs: Sequence[Input], grids: Tensor) -> tuple[Tensor, Tensor, ModalityLayout]:
    """Ids (B, 1), positions (B, 1) and the layout of one step; `grids` (B, N, 2) as in the layout."""
    # one transfer to the device
    numbers = [(each.token, each.position, *each.reads, *each.predicts) for each in inputs]
    columns = torch.tensor(numbers, device=grids.device).T.unsqueeze(-1)
    given = torch.zeros_like(grids[..., 0], dtype=torch.bool)  # what is being written now is not given
    return columns[0], columns[1], ModalityLayout(Plane(*columns[2:6]), Plane(*columns[6:10]), grids, given)
