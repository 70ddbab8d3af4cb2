"""What happens to one record between a source and the dataset, and the count of what got lost on the way.

A stage is a function from documents to documents: it returns the document to go on with, or None, and names everything
it took away. `run_window` wraps the counting around it: for records, texts and images alike,

    read = kept + dropped,    and every dropped thing is one `Drop`, one line of the ledger.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from weft.document import Document, Text
from weft.errors import DocumentError, WeftError

What = Literal["file", "unit", "record", "text", "image"]


@dataclass(frozen=True)
class Count:
    """How many records, and how many texts and images they hold."""

    records: int = 0
    texts: int = 0
    images: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.records + other.records, self.texts + other.texts, self.images + other.images)

    def __sub__(self, other: "Count") -> "Count":
        return Count(self.records - other.records, self.texts - other.texts, self.images - other.images)


@dataclass(frozen=True)
class Loss:
    """One thing taken away; a lost record takes its texts and images with it."""

    what: What
    reason: str
    """A short code, the same for the same cause: ledgers are grouped by it."""
    message: str
    field: str | None = None
    image: str | None = None
    value: float | None = None
    """What was measured, where that decided."""
    threshold: float | None = None
    """What it was compared with."""


Outcome = tuple[Document | None, tuple[Loss, ...]]
"""What a stage leaves of a document, and what it took. Without a document there is exactly one loss: the record."""

Stage = Callable[[Document], Outcome]


@dataclass(frozen=True)
class Together:
    """A stage that takes several documents at once, so that a network sees a batch, or a server many requests.

    It gives one outcome for each, in order. An outcome depends on its own document alone: how many come together is not
    promised, and changes from one attempt at a unit of work to the next.
    """

    stage: Callable[[Sequence[Document]], Sequence[Outcome]]


@dataclass(frozen=True)
class Writes:
    """A stage that may add texts of its own, such as an instruction: like those of a source, they are in no count."""

    stage: Stage


AnyStage = Stage | Together | Writes
Stages = Sequence[tuple[str, AnyStage]]
"""Stages by name, in order."""

OnStep = Callable[[str, int | None, int], None]
"""Told before every step: a stage's name, the place in the window of the record that it takes and 1; or None, and how
many it takes together."""


class Record(NamedTuple):
    """One record as a source read it; without a document its first loss says why. `file` is relative to the source."""

    file: str
    line: int | None
    document: Document | None
    read: Count
    """What the record held, also what was lost while it was read."""
    losses: tuple[Loss, ...] = ()
    added: int = 0
    """Texts of the document that the source or a stage wrote itself (an instruction): not counted."""


@dataclass(frozen=True)
class Drop:
    """A loss, with the stage, the place and the size of it: one line of the ledger."""

    loss: Loss
    stage: str
    file: str
    line: int | None
    id: str | None
    count: Count

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.loss.what,
            "stage": self.stage,
            "reason": self.loss.reason,
            "message": self.loss.message,
            "file": self.file,
            "line": self.line,
            "id": self.id,
            "field": self.loss.field,
            "image": self.loss.image,
            "value": self.loss.value,
            "threshold": self.loss.threshold,
            "texts": self.count.texts,
            "images": self.count.images,
        }


class Processed(NamedTuple):
    """A record after all stages."""

    record: Record
    document: Document | None
    drops: tuple[Drop, ...]

    @property
    def kept(self) -> Count:
        if self.document is None:
            return Count()
        if self.document is self.record.document and not self.drops:
            return self.record.read  # the count of it, or the first stage had not been reached
        return count(self.document, self.record.added)


class RecordError(DocumentError):
    """A record that cannot be read, with the code that the ledger files it under."""

    def __init__(self, reason: str, what: str, *, field: str | None = None) -> None:
        super().__init__(what)
        self.reason, self.field = reason, field


def count(document: Document, added: int = 0) -> Count:
    """What a document holds.

    Args:
        added: how many of its texts do not count, see `Record`.
    """
    texts = images = 0
    for turn in document.turns:
        for part in turn.parts:
            if isinstance(part, Text):
                texts += 1
            else:
                images += 1
    return Count(1, texts - added, images)


def rejected(file: str, line: int | None, error: RecordError) -> Record:
    """The record in whose place `error` was met."""
    return Record(file, line, None, Count(records=1), (Loss("record", error.reason, error.what, error.field),))


def drop_record(item: Processed, stage: str, loss: Loss) -> Processed:
    """The same record, dropped by a stage with all it still has."""
    assert item.document is not None
    drop = Drop(loss, stage, item.record.file, item.record.line, item.document.id, item.kept)
    return Processed(item.record, None, (*item.drops, drop))


def run_stages(record: Record, stages: Iterable[tuple[str, AnyStage]]) -> Processed:
    """Take one record through the named stages, as far as it gets.

    Raises:
        WeftError: a stage took something without naming it.
    """
    (item,) = run_window([record], tuple(stages))
    return item


def run_window(
    records: Sequence[Record], stages: Stages, on_step: OnStep = lambda stage, place, number: None
) -> list[Processed]:
    """Take records through the named stages together, each as far as it gets.

    Raises:
        WeftError: the source or a stage took something without naming it, or a stage gave too many outcomes or too few.
    """
    items = [_as_read(record) for record in records]
    for name, stage in stages:
        if isinstance(stage, Together):
            _take_together(items, name, stage, on_step)
            continue
        alone, writes = (stage.stage, True) if isinstance(stage, Writes) else (stage, False)
        for i, item in enumerate(items):
            if item.document is not None:
                on_step(name, i, 1)
                outcome = alone(item.document)
                if outcome[0] is not item.document or outcome[1]:
                    items[i] = _changed(item, name, outcome, writes)
    return items


def _as_read(record: Record) -> Processed:
    left = Count() if record.document is None else count(record.document, record.added)
    if (left + _total(record.losses, record.read) if record.losses else left) != record.read:
        raise WeftError(
            f"the source counted {record.read}, but gave {left} and named losses of "
            f"{_total(record.losses, record.read)}",
            where=record.file + (f", line {record.line}" if record.line else ""),
        )
    identity = None if record.document is None else record.document.id
    return Processed(record, record.document, _placed(record, "read", identity, record.losses, record.read))


def _take_together(items: list[Processed], name: str, stage: Together, on_step: OnStep) -> None:
    left = [(i, item.document) for i, item in enumerate(items) if item.document is not None]
    if not left:
        return
    on_step(name, left[0][0] if len(left) == 1 else None, len(left))
    outcomes = stage.stage([document for _, document in left])
    if len(outcomes) != len(left):
        raise WeftError(f"stage {name} gave {len(outcomes)} outcomes for {len(left)} documents")
    for (i, document), outcome in zip(left, outcomes, strict=True):
        if outcome[0] is not document or outcome[1]:
            items[i] = _changed(items[i], name, outcome, writes=False)


def _changed(item: Processed, name: str, outcome: Outcome, writes: bool) -> Processed:
    """The record after a stage that left something else of it; one left untouched needs no counting."""
    (record, document, drops), (after, losses) = item, outcome
    assert document is not None
    if after is None and len(losses) == 1 and losses[0].what == "record":
        return drop_record(item, name, losses[0])
    before = count(document)
    wrote = (Count() if after is None else count(after)) - (before - _total(losses, before))
    if wrote != Count() and not (writes and wrote == Count(texts=max(wrote.texts, 0))):
        raise WeftError(f"stage {name} took parts of document {document.id} without naming them", where=record.file)
    readable = before - Count(0, record.added, 0)
    placed = _placed(record, name, document.id, losses, readable)
    # texts that go when none that was read is left are ones that a stage had written: nothing of the source
    written = max(0, sum(drop.count.texts for drop in placed) - readable.texts)
    record = record._replace(added=record.added + wrote.texts - written)
    return Processed(record, after, (*drops, *_without_texts(placed, written)))


def _placed(record: Record, stage: str, identity: str | None, losses: Sequence[Loss], whole: Count) -> tuple[Drop, ...]:
    return tuple([Drop(loss, stage, record.file, record.line, identity, _size(loss, whole)) for loss in losses])


def _without_texts(drops: Sequence[Drop], number: int) -> Sequence[Drop]:
    """The same, the last `number` of single texts among them with nothing to count."""
    if not number:
        return drops
    of_texts = [i for i, drop in enumerate(drops) if drop.count == Count(texts=1)]
    free = set(of_texts[len(of_texts) - number :])
    return [replace(drop, count=Count()) if i in free else drop for i, drop in enumerate(drops)]


_ONE = {"text": Count(texts=1), "image": Count(images=1)}


def _total(losses: Iterable[Loss], whole: Count) -> Count:
    return sum((_size(loss, whole) for loss in losses), Count())


def _size(loss: Loss, whole: Count) -> Count:
    return whole if loss.what == "record" else _ONE.get(loss.what, Count())
