"""Which pictures a position, or another picture, may read: THE rule.

    <s>  a  [IMG] p0 p1 p2  b  </s>  <s>  c  [IMG] p0 ...
               ^ s_0                           ^ s_1

A position sees the pictures of its own document from their first element on: a picture's elements see it, its begin
token does not. Where a picture is written element by element, and not painted at once, this would show what is yet to
be written: there it is seen after its last element. A picture that is to be painted sees pictures of its document that
begin before it, the released model only the one directly before. Where no document starts, as in a sequence that was
cut, nothing is hidden.
"""

import torch
from torch import Tensor

from weft.layout import ModalityLayout


def positions_of(is_mark: Tensor) -> Tensor:
    """(B, L) bool -> (B, N) where it is True, in order; L where there are no more."""
    length, count = is_mark.shape[1], int(is_mark.sum(1).max()) if is_mark.numel() else 0
    places = torch.arange(length, device=is_mark.device)
    return torch.where(is_mark, places, length).sort(1).values[:, :count]


def begins_of(layout: ModalityLayout) -> Tensor:
    """(B, N) the position before the first element of every picture; L where there is no such picture."""
    (_, length), images = layout.shape, layout.grids.shape[1]
    begins = layout.grids.new_full((len(layout.grids), images + 1), length)
    places = torch.arange(length, device=begins.device)
    for plane, before in ((layout.inputs, places - 1), (layout.outputs, places)):
        number = torch.where(plane.image < 0, images, plane.image)
        begins.scatter_reduce_(1, number, before.expand_as(number), "amin")
    return begins[:, :images]


def seen_by_positions(is_start: Tensor, begins: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The pictures that every position of a sequence sees.

    Args:
        is_start: (B, L) bool, True where a document starts.
        begins: (B, N) position before the first element of each picture, its begin token; L for none.
        lengths: (B, N) elements of each picture, where it is seen after the last of them; None: from the first on.

    Returns:
        (B, L, N) bool.
    """
    places, begins = torch.arange(is_start.shape[1], device=is_start.device).unsqueeze(1), begins.unsqueeze(1)
    hidden = 0 if lengths is None else lengths.unsqueeze(1)
    return (_document(is_start).unsqueeze(2) <= begins) & (begins + hidden < places)


def seen_by_pictures(is_start: Tensor, begins: Tensor, *, reach: int | None = 1) -> Tensor:
    """The pictures that every picture sees while it is painted.

    Args:
        is_start: (B, L) bool, True where a document starts.
        begins: (B, N) position before the first element of each picture, its begin token; L for none.
        reach: how many directly before it; None: all of the document. The released model knows no other than 1.

    Returns:
        (B, N, N) bool: [b, i, n] is True where picture i sees picture n.
    """
    length, images = is_start.shape[1], begins.shape[1]
    document = _document(is_start).gather(1, begins.clamp(0, max(length - 1, 0)))
    number = torch.arange(images, device=begins.device)
    behind = number.unsqueeze(1) - number
    near = (behind > 0) & (behind <= (images if reach is None else reach))
    same = (document.unsqueeze(2) <= begins.unsqueeze(1)) & (begins < length).unsqueeze(2)
    return same & near


def nearest_first(visible: Tensor) -> Tensor:
    """(B, Q, N) bool -> (B, Q, M) int64: the pictures that each query sees, the last one first, then -1.

    M is the most that any query sees. Counted from 1, a place in this list is the relative index of its picture.
    """
    most = int(visible.sum(2).max()) if visible.numel() else 0
    number = torch.arange(visible.shape[2], device=visible.device)
    return torch.where(visible, number, -1).sort(dim=2, descending=True).values[..., :most]


def _document(is_start: Tensor) -> Tensor:
    """(B, L) where the document of each position starts, -1 where none has."""
    places = torch.arange(is_start.shape[1], device=is_start.device)
    return torch.where(is_start, places, -1).cummax(1).values
