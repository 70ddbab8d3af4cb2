"""Which elements of which documents stand in which row: packing, known by numbers alone.

    extents of documents --best_fit | stream--> rows of (document, start, end)

best_fit  whole documents, the longest first, each into the fullest row that has room for it; longer than a row, they
          are cut in parts, of which all but the first have the document's first element again.
stream    one document after the other, cut wherever a row is full; what does not fill the last row is left over.

Neither cuts a picture. `planned` turns either into an endless sequence of rows that can be entered anywhere.
"""

import logging
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pydantic import PositiveInt

from weft.config import Config
from weft.errors import ContextError, UsageError

log = logging.getLogger(__name__)

Packing = Literal["none", "best_fit", "stream"]
WHOLE = 2**62
"""The end of a piece that goes to the end of its document, where the length is not known."""
MAX_WITHOUT_A_ROW = 100_000
"""Documents one after the other that give none: all are then taken to be of that kind."""
_ROWS = 2**32
"""More than there ever are."""


class RowsConfig(Config):
    """How rows are packed, each as long as `data.context`."""

    attention: Literal["isolated", "full"] = "isolated"
    """`isolated`: what a document reads and learns is what it would alone. `full`: text is read over the whole row."""
    max_images: PositiveInt | None = None
    """Pictures of one row, to bound memory: at least 1.5 times what a row has on average, or rows stay empty. None: no
    bound."""
    window: PositiveInt = 1000
    """Documents among which `best_fit` looks for what fits; at most a pass over the data. More gain nothing."""
    long: Literal["split", "drop"] = "split"
    """Of documents longer than a row, with `best_fit`."""
    cut: Literal["anywhere", "document"] = "anywhere"
    """Where `stream` ends a row: `document`: before the last document, unless that began the row."""
    without_images: Literal["keep", "drop"] = "keep"
    """Of rows without a picture."""


@dataclass(frozen=True)
class Extent:
    """A document as far as it matters to rows."""

    length: int
    pictures: tuple[tuple[int, int], ...] = ()
    """[start, end) of each with the tokens that open and close it, rising: it is not cut in between."""
    name: str | None = None
    """For messages."""


class Piece(NamedTuple):
    document: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Row:
    pieces: tuple[Piece, ...]
    length: int
    pictures: int


class Packed(NamedTuple):
    rows: list[Row]
    left: list[Piece]
    """What stands in no row: dropped, or the tail of a stream."""


def best_fit(
    extents: Sequence[Extent], length: int, *, max_images: int | None = None, long: Literal["split", "drop"] = "split"
) -> Packed:
    """Best-fit decreasing: whole documents in rows of at most `length` elements and so many pictures.

    Rows are in the order of their longest piece among the documents, so that a shuffled order stays one.

    Raises:
        ContextError: a picture alone is longer than a row.
    """
    most = WHOLE if max_images is None else max_images
    waiting: list[tuple[int, int, Piece]] = []  # length, pictures, piece
    left: list[Piece] = []
    for number, extent in enumerate(extents):
        size, pictures = extent.length, len(extent.pictures)
        if size <= length and pictures <= most:
            waiting.append((size, pictures, Piece(number, 0, size)))
        elif long == "drop":
            left.append(Piece(number, 0, size))
        else:
            for start, end in parts(extent, length, max_images):
                piece = Piece(number, start, end)
                waiting.append((end - start + (start > 0), pictures_in(extent, start, end), piece))
    waiting.sort(key=_size, reverse=True)
    rows: list[list[Piece]] = []
    counts: list[int] = []
    rooms: list[int] = []  # rows that are not full, rising: what is free * _ROWS + which
    for size, pictures, piece in waiting:
        at = bisect_left(rooms, size * _ROWS)
        while at < len(rooms) and counts[rooms[at] % _ROWS] + pictures > most:
            at += 1
        if at == len(rooms):
            rooms.append(length * _ROWS + len(rows))
            rows.append([])
            counts.append(0)
        room = rooms.pop(at)
        row = room % _ROWS
        rows[row].append(piece)
        counts[row] += pictures
        if room >= (size + 1) * _ROWS:
            insort(rooms, room - size * _ROWS)
    free = {room % _ROWS: room // _ROWS for room in rooms}
    order = sorted(range(len(rows)), key=lambda row: rows[row][0])
    return Packed([Row(tuple(sorted(rows[i])), length - free.get(i, 0), counts[i]) for i in order], left)


def stream(
    extents: Sequence[Extent],
    length: int,
    *,
    max_images: int | None = None,
    cut: Literal["anywhere", "document"] = "anywhere",
) -> Packed:
    """Documents in their order in full rows.

    Raises:
        ContextError: a picture alone is longer than a row.
    """
    filling, rows = _Filling(length, max_images), []
    for number, extent in enumerate(extents):
        rows += [row for row, _ in filling.put(number, extent, 0, cut)]
    return Packed(rows, filling.pieces)


@dataclass
class _Filling:
    """The row that a stream is filling."""

    length: int
    max_images: int | None
    pieces: list[Piece] = field(default_factory=list)
    used: int = 0
    pictures: int = 0

    def put(self, number: int, extent: Extent, start: int, cut: str) -> Iterator[tuple[Row, int]]:
        """Add a document from `start` on; each row that becomes full, and where in the document it ends."""
        while start < extent.length:
            end = self._reach(extent, start)
            is_full = end < extent.length
            if is_full and cut == "document" and self.pieces:
                end = start
            if end > start:
                self.pieces.append(Piece(number, start, end))
                self.used += end - start
                self.pictures += pictures_in(extent, start, end)
            elif not self.pieces:
                raise _too_long(extent, start, self.length)
            if is_full or self.used == self.length:
                yield Row(tuple(self.pieces), self.used, self.pictures), end
                self.pieces, self.used, self.pictures = [], 0, 0
            start = end

    def _reach(self, extent: Extent, start: int) -> int:
        pictures = None if self.max_images is None else self.max_images - self.pictures
        return reach(extent, start, self.length - self.used, pictures)


def reach(extent: Extent, start: int, room: int, pictures: int | None = None) -> int:
    """The furthest end of a piece from `start` on, of at most `room` elements and so many pictures; `start` if nothing
    fits."""
    end = min(start + room, extent.length)
    if pictures is not None:
        beyond = bisect_right(extent.pictures, start, key=_end) + pictures
        end = min([end, *(first for first, _ in extent.pictures[beyond : beyond + 1])])
    before = bisect_left(extent.pictures, end, key=_start) - 1
    if before >= 0 and end < extent.pictures[before][1]:
        end = extent.pictures[before][0]
    return max(start, end)


def parts(extent: Extent, length: int, max_images: int | None = None) -> Iterator[tuple[int, int]]:
    """[start, end) of the parts of a document, each as long as may be.

    All but the first are one element longer than that, because they begin with the document's first one.

    Raises:
        ContextError: a picture alone is longer.
    """
    start = 0
    while start < extent.length:
        room = length - (start > 0)
        end = reach(extent, start, room, max_images)
        if end == start:
            raise _too_long(extent, start, room)
        yield start, end
        start = end


def pictures_in(extent: Extent, start: int, end: int) -> int:
    """Pictures that begin in [start, end)."""
    return bisect_left(extent.pictures, end, key=_start) - bisect_left(extent.pictures, start, key=_start)


def utilisation(rows: Sequence[Row], length: int) -> float:
    """The share of the positions of rows that hold an element."""
    return sum(row.length for row in rows) / (len(rows) * length) if rows else 0.0


def _size(waiting: tuple[int, int, Piece]) -> int:
    return waiting[0]


def _start(picture: tuple[int, int]) -> int:
    return picture[0]


def _end(picture: tuple[int, int]) -> int:
    return picture[1]


def _too_long(extent: Extent, start: int, room: int) -> ContextError:
    needs = extent.pictures[bisect_right(extent.pictures, start, key=_end)][1] - start
    return ContextError(
        f"a picture needs {needs} positions with its begin and end, and there are {room}",
        where=extent.name,
        fix="raise the limit",
    )


# --- without end ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cursor:
    """Between two rows of an endless sequence. With the documents' order, all that is needed to go on."""

    place: int = 0
    """Documents of the order that are done with; of `best_fit`, before the window."""
    done: int = 0
    """Rows of the window, or elements of the next document, that are done with."""
    documents: int = 0
    """Begun so far."""


Extents = Callable[[range], Sequence[Extent]]
"""Of documents by their places in the order."""


def planned(
    packing: Packing, config: RowsConfig, length: int, epoch: int, extents: Extents, cursor: Cursor = Cursor()
) -> Iterator[tuple[Row, Cursor]]:
    """Rows without end, whose pieces name documents by their places in the order; and where each leads to.

    Without packing, every document is a row, however long it is.

    Args:
        length: elements of a row.
        epoch: documents of a pass over the data.
        extents: asked for runs of places, in rising order.

    Raises:
        ContextError: a picture alone is longer than a row.
        UsageError: the documents give no row.
    """
    if packing == "none":
        place = cursor.place
        while True:
            yield Row((Piece(place, 0, WHOLE),), 0, 0), Cursor(place + 1, 0, place + 1)
            place += 1
    rows = _streamed if packing == "stream" else _fitted
    last = cursor.place
    for row, after in rows(config, length, min(config.window, epoch), extents, cursor):
        if row is not None and (row.pictures or config.without_images == "keep"):
            last = after.place
            yield row, after
        elif after.place - last > MAX_WITHOUT_A_ROW:
            raise UsageError(
                f"{MAX_WITHOUT_A_ROW:,} documents give no row of {length} positions",
                fix="raise data.context, or data.rows: long: split, without_images: keep",
            )


def _fitted(
    config: RowsConfig, length: int, window: int, extents: Extents, cursor: Cursor
) -> Iterator[tuple[Row | None, Cursor]]:
    place, done, documents = cursor.place, cursor.done, cursor.documents
    while True:
        found = extents(range(place, place + window))
        rows, left = best_fit(found, length, max_images=config.max_images, long=config.long)
        if left:
            log.warning("%d of %d documents are longer than a row and are dropped", len(left), window)
        for number, row in enumerate(rows[done:], start=done + 1):
            documents += sum(piece.start == 0 for piece in row.pieces)
            is_last = number == len(rows)
            after = Cursor(place + window, 0, documents) if is_last else Cursor(place, number, documents)
            yield _from_place(row, place), after
        place, done = place + window, 0
        if not rows:
            yield None, Cursor(place, 0, documents)


def _from_place(row: Row, place: int) -> Row:
    pieces = tuple(Piece(place + number, start, end) for number, start, end in row.pieces)
    return Row(pieces, row.length, row.pictures)


def _streamed(
    config: RowsConfig, length: int, window: int, extents: Extents, cursor: Cursor
) -> Iterator[tuple[Row, Cursor]]:
    filling = _Filling(length, config.max_images)
    place, start, documents = cursor.place, cursor.done, cursor.documents
    while True:
        # asked for in runs, so that several processes can share the work of finding out
        for number, extent in enumerate(extents(range(place, place + window)), start=place):
            for row, end in filling.put(number, extent, start, config.cut):
                documents += sum(piece.start == 0 for piece in row.pieces)
                is_whole = end == extent.length
                yield row, Cursor(number + is_whole, 0 if is_whole else end, documents)
            start = 0
        place += window
