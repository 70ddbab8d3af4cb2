"""What every position of a batch is: the only description of text and pictures that anything below the tokens sees.

A sequence is a run of spans: text positions, or the patches of one picture. From spans come two planes, one for what a
position's input is and one for what it predicts, which in a next-token model is the input of the next position:

    input    t8  t9  [IMG] p0  p1  ... p(P-1) [/IMG] t10
    predicts t9 [IMG] p0   p1  p2  ... [/IMG]  t10   ...

Made by the collator in training and by the engine in decoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from weft.errors import LayoutError

FEATURE = -1
"""The id of an element that is no token: it is the next row of its sequence's `features`."""


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
    before: int = 1
    """Text positions that open it and are never parted from it."""
    after: int = 1
    """Those that close it."""

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
    sight: Any = None
    """What synchronisers read of the pictures, `weft.synchronizer.sight.Sight`; None where there is none to read it."""
    documents: Tensor | None = None
    """(B, L) int64, rising: which document of its row a position belongs to, -1 at padding, where positions read their
    own document alone. None: each sequence is one."""

    @property
    def shape(self) -> tuple[int, int]:
        batch, length = self.inputs.modality.shape
        return batch, length

    @property
    def is_real(self) -> Tensor:
        """(B, L) bool: not padding."""
        return self.inputs.modality != Modality.NONE

    @property
    def places(self) -> Tensor:
        """(B, L) the place of every position in what it reads: its sequence, or its document of several."""
        if self.documents is None:
            return (self.is_real.cumsum(1) - 1).clamp_min(0)
        is_start = self.documents.diff(dim=1, prepend=self.documents[:, :1] - 1) != 0
        here = torch.arange(self.shape[1], device=is_start.device)
        return here - torch.where(is_start, here, 0).cummax(1).values

    @property
    def readable(self) -> Tensor:
        """What positions read of those up to them: (B, L) bool, the same for all; or, where documents are kept apart,
        (B, 1, L, L) bool, [b, 0, q, k] True where q reads k. There, padding reads padding: nothing reads nothing."""
        if self.documents is None:
            return self.is_real
        same = self.documents.unsqueeze(2) == self.documents.unsqueeze(1)
        return same.tril().unsqueeze(1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "ModalityLayout":
        """The same of other planes. What is seen is left out: it is put in last."""
        return ModalityLayout(
            self.inputs.map(function),
            self.outputs.map(function),
            function(self.grids),
            function(self.given),
            documents=None if self.documents is None else function(self.documents),
        )

    def seeing(self, sight: Any) -> "ModalityLayout":
        return replace(self, sight=sight)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "ModalityLayout":
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def __getitem__(self, positions: slice) -> "ModalityLayout":
        """A run of positions, every sequence; picture numbers and places stay those of the whole. Without `sight`."""
        cut = lambda tensor: tensor[:, positions]  # noqa: E731
        documents = None if self.documents is None else cut(self.documents)
        return ModalityLayout(self.inputs.map(cut), self.outputs.map(cut), self.grids, self.given, documents=documents)


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
            raise LayoutError(
                f"sequence {b} has {lengths[b]} positions, more than {length}",
                fix="cut or drop it, or raise the length",
            )
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
    if whole <= 0:
        raise LayoutError(
            f"sequence {sequence}, position {at}: a picture cannot have {span.rows} x {span.cols} patches",
            fix="give the rows and columns of this picture",
        )
    if not 0 <= span.length <= whole:
        raise LayoutError(
            f"sequence {sequence}, position {at}: "
            f"a picture of {span.rows} x {span.cols} patches cannot have {span.length}",
            fix="give the rows and columns of this picture",
        )
    if span.length < whole and not last:
        raise LayoutError(
            f"sequence {sequence}, position {at}: "
            f"a picture has {span.length} of its {whole} patches and is not the last span",
            fix="give the whole picture, or end the sequence inside it",
        )
    return whole


def layout_of_tokens(
    ids: Tensor, *, begin_image: int, grid: tuple[int, int], end_image: int | None = None, pad: int | None = None,
    given: Tensor | bool = False,
) -> ModalityLayout:  # fmt: skip
    """The layout of token ids in which every `begin_image` is followed by the patches of one picture, row by row.

    For whoever has nothing but ids. The begin and end tokens are text; a last picture may be unfinished.

    Args:
        ids: (B, L) integers.
        grid: rows and columns of every picture.
        end_image: what follows every whole picture and stands nowhere else; None: nothing is expected there.
        pad: leading or trailing run of this token is padding, the same side in all sequences.
        given: (B, L) bool, True at the `begin_image` of a picture that stands in the context and is not to be
            generated; or one answer for all.

    Returns:
        On the device of `ids`.

    Raises:
        LayoutError: names the sequence and the position where the ids do not fit.
    """
    if ids.dim() != 2 or ids.is_floating_point():
        raise LayoutError(
            f"token ids must be integers of shape (B, L), got {ids.dtype} of {tuple(ids.shape)}", fix="pass input_ids"
        )
    if isinstance(given, Tensor) and given.shape != ids.shape:
        raise LayoutError(
            f"`given` has shape {tuple(given.shape)}, the ids have {tuple(ids.shape)}",
            fix="mark the begin tokens in it",
        )
    rows = ids.tolist()
    is_given = given.tolist() if isinstance(given, Tensor) else [[given] * len(row) for row in rows]
    real = [_unpadded(row, pad) for row in rows]
    left = any(start for start, stop in real if start < stop)
    if left:
        # a single trailing token may be the end of text that also serves as padding
        both = next((b for b, (start, stop) in enumerate(real) if start < stop < len(rows[b]) - 1), None)
        if both is not None:
            raise LayoutError(
                f"sequence {both} is padded on the right, others on the left", fix="pad all sequences on one side"
            )
        real = [(start, len(rows[b])) for b, (start, _) in enumerate(real)]
    spans = [
        _spans_of(rows[b], is_given[b], b, start, stop, (begin_image, end_image), grid)
        for b, (start, stop) in enumerate(real)
    ]
    return lay_out(spans, length=ids.shape[1], left=left).to(ids.device)


def _unpadded(row: list[int], pad: int | None) -> tuple[int, int]:
    """First position that is not padding, and the one after the last."""
    start, stop = 0, len(row)
    while start < stop and row[start] == pad:
        start += 1
    while stop > start and row[stop - 1] == pad:
        stop -= 1
    return start, stop


def _spans_of(
    row: list[int], given: list[bool], sequence: int, start: int, stop: int, marks: tuple[int, int | None],
    grid: tuple[int, int],
) -> list[Span]:  # fmt: skip
    (begin, end), (rows, cols) = marks, grid
    spans: list[Span] = []
    ends: set[int] = set()
    at = start  # the first position that no span holds yet
    for here in (i for i in range(start, stop) if row[i] == begin):
        if here < at:
            raise LayoutError(
                f"sequence {sequence}, position {here}: a picture begins inside the {rows} x {cols} patches of another",
                fix="give the grid that these pictures have, or drop the ones that were cut",
            )
        present = min(rows * cols, stop - here - 1)
        whole = present == rows * cols
        spans += (TextSpan(here + 1 - at), ImageSpan(rows, cols, None if whole else present, given[here]))
        at = here + 1 + present
        if whole and at < stop:
            ends.add(at)
    if at < stop:
        spans.append(TextSpan(stop - at))
    wrong = ends ^ {i for i in range(start, stop) if row[i] == end} if end is not None else ()
    if wrong:
        what = "a picture should end here" if min(wrong) in ends else "the end of a picture where none ends"
        raise LayoutError(
            f"sequence {sequence}, position {min(wrong)}: {what} ({rows} x {cols} patches after each begin token)",
            fix="give the grid that these pictures have, or drop the ones that were cut",
        )
    return spans


@dataclass(frozen=True)
class Pixels:
    """A picture for a model that encodes pictures together with the text; (3, side, side) uint8 each."""

    seen: Tensor
    """As the model's eye takes it."""
    painted: Tensor | None = None
    """As it is to be painted, where that is to be learnt."""


@dataclass(frozen=True)
class TokenSequence:
    """A document as one model reads it, before batching; or several in a row."""

    ids: Tensor
    """(L,) int64: text tokens; picture code k as vocabulary + k; `FEATURE` for what has no id."""
    spans: tuple[Span, ...]
    is_target: Tensor
    """(L,) bool: True where element t is to be learnt, which the position before it does."""
    name: str | None = None
    """The document's id, for messages; of a row, the ids."""
    features: Tensor | None = None
    """(n, F) one row for each id that is `FEATURE`, in order; None where there is none, or where they come of `pixels`.
    """
    pixels: tuple[Pixels, ...] = ()
    """Of every picture, in order, for models that look at pixels; others have none."""
    documents: tuple[int, ...] = ()
    """The lengths of the documents in it, where it is a row of several."""

    def __len__(self) -> int:
        return len(self.ids)

    def dense_features(self) -> Tensor | None:
        """(L, F), zero where an element is no vector; None where none is."""
        if self.features is None:
            return None
        dense = self.features.new_zeros(len(self), self.features.shape[1])
        dense[self.ids == FEATURE] = self.features
        return dense
