"""What every position of a batch is: the only description of text and pictures that anything below the tokens sees.

A sequence is a run of spans: text positions, or the patches of one picture. From spans come two planes, one for what a
position's input is and one for what it predicts, which in a next-token model is the input of the next position:

    input    t8  t9  [IMG] p0  p1  ... p(P-1) [/IMG] t10
    predicts t9 [IMG] p0   p1  p2  ... [/IMG]  t10   ...

Made by the collator in training and by the engine in decoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor

from weft.errors import LayoutError


class Modality(IntEnum):
    NONE = 0
    """Padding."""
    TEXT = 1
    IMAGE = 2


@dataclass(frozen=True)
class TextSpan:
    length: int


@dataclass(frozen=True)
class ImageSpan:
    """One picture of `rows` x `cols` patches. `present` < rows * cols only where the sequence ends inside it."""

    rows: int
    cols: int
    present: int | None = None
    given: bool = False
    """It stands in the context and is not to be generated."""

    @property
    def length(self) -> int:
        return self.rows * self.cols if self.present is None else self.present


Span = TextSpan | ImageSpan


@dataclass(frozen=True)
class Plane:
    """One fact per position and element: modality, and for patches the picture's number in its sequence and the place.

    All (B, L) int64; image, row and col are -1 where the modality is not IMAGE.
    """

    modality: Tensor
    image: Tensor
    row: Tensor
    col: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Plane":
        return Plane(*(function(getattr(self, f.name)) for f in fields(self)))


@dataclass(frozen=True)
class ModalityLayout:
    """A batch of sequences."""

    inputs: Plane
    """What each position reads."""
    outputs: Plane
    """What it predicts."""
    grids: Tensor
    """(B, N, 2) rows and columns of each picture of each sequence."""
    given: Tensor
    """(B, N) bool: the picture stands in the context and is not to be generated."""

    @property
    def shape(self) -> tuple[int, int]:
        batch, length = self.inputs.modality.shape
        return batch, length

    @property
    def is_real(self) -> Tensor:
        """(B, L) bool: not padding."""
        return self.inputs.modality != Modality.NONE

    def map(self, function: Callable[[Tensor], Tensor]) -> "ModalityLayout":
        return ModalityLayout(self.inputs.map(function), self.outputs.map(function), function(self.grids), function(self.given))

    def to(self, device: torch.device | str) -> "ModalityLayout":
        return self.map(lambda tensor: tensor.to(device))

    def __getitem__(self, positions: slice) -> "ModalityLayout":
        """A run of positions, every sequence; picture numbers and places stay those of the whole."""
        cut = lambda tensor: tensor[:, positions]  # noqa: E731
        return ModalityLayout(self.inputs.map(cut), self.outputs.map(cut), self.grids, self.given)


def lay_out(sequences: Sequence[Sequence[Span]], *, length: int | None = None, left: bool = False) -> ModalityLayout:
    """Planes of a batch, padded to `length` (default: the longest) on the right, or on the left.

    A sequence that ends inside a picture, `ImageSpan(..., present=n)` with n = 0 right after its begin token, predicts
    the next patch at its last position; otherwise the last position predicts text.

    Raises:
        LayoutError: a picture is unfinished and not at the end, has no patches, or a sequence is longer than `length`.
    """
    lengths = [sum(span.length for span in spans) for spans in sequences]
    length = max(lengths, default=0) if length is None else length
    batch, images = (
        len(sequences),
        max((sum(isinstance(s, ImageSpan) for s in spans) for spans in sequences), default=0),
    )
    grids = torch.zeros(batch, images, 2, dtype=torch.int64)
    given = torch.zeros(batch, images, dtype=torch.bool)
    # one position more than asked: the element after the last position, which only the outputs see
    planes = torch.full((4, batch, length + 1), -1, dtype=torch.int64)
    planes[0] = Modality.NONE
    starts = [length - n if left else 0 for n in lengths]
    for b, spans in enumerate(sequences):
        if lengths[b] > length:
            raise LayoutError(f"sequence {b} has {lengths[b]} positions, more than {length}")
        at, image = starts[b], 0
        for i, span in enumerate(spans):
            end = at + span.length
            if isinstance(span, TextSpan):
                planes[0, b, at:end] = Modality.TEXT
            else:
                whole = _check_image(span, b, at, last=i == len(spans) - 1)
                shown = min(whole, span.length + 1) if span.length < whole else whole
                raster = torch.arange(shown)
                planes[:, b, at : at + shown] = torch.stack(
                    (torch.full_like(raster, Modality.IMAGE), torch.full_like(raster, image),
                     raster // span.cols, raster % span.cols)
                )  # fmt: skip
                grids[b, image] = torch.tensor((span.rows, span.cols))
                given[b, image] = span.given
                image += 1
            at = end
        if lengths[b] and planes[0, b, at] == Modality.NONE:
            planes[0, b, at] = Modality.TEXT  # what the last position predicts
    inputs, outputs = planes[:, :, :-1].clone(), planes[:, :, 1:].clone()
    for b in range(batch):
        end = starts[b] + lengths[b]
        inputs[0, b, end:], inputs[1:, b, end:] = Modality.NONE, -1
        outputs[0, b, end:], outputs[1:, b, end:] = Modality.NONE, -1
        if starts[b]:  # left padding predicts nothing, also where its successor is real
            outputs[0, b, : starts[b]], outputs[1:, b, : starts[b]] = Modality.NONE, -1
    return ModalityLayout(Plane(*inputs), Plane(*outputs), grids, given)


def _check_image(span: ImageSpan, sequence: int, at: int, *, last: bool) -> int:
    whole = span.rows * span.cols
    if whole <= 0 or not 0 <= span.length <= whole:
        raise LayoutError(
            f"sequence {sequence}, position {at}: "
            f"a picture of {span.rows} x {span.cols} patches cannot have {span.length}"
        )
    if span.length < whole and not last:
        raise LayoutError(
            f"sequence {sequence}, position {at}: "
            f"a picture has {span.length} of its {whole} patches and is not the last span"
        )
    return whole


@dataclass(frozen=True)
class TokenSequence:
    """A document as one model reads it, before batching."""

    ids: Tensor
    """(L,) int64: text tokens and picture codes in the model's own numbering."""
    spans: tuple[Span, ...]
    is_target: Tensor
    """(L,) bool: True where element t is to be learnt, which the position before it does."""
    name: str | None = None
    """The document's id, for messages."""

    def __len__(self) -> int:
        return len(self.ids)
