"""Token sequences -> one padded batch: ids, the layout that everything below reads, and what is to be learnt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weft.errors import LayoutError
from weft.layout import FEATURE, ImageSpan, ModalityLayout, TokenSequence, lay_out

IGNORED = -100
"""A label where nothing is learnt."""


@dataclass(frozen=True)
class Pictures:
    """The M pictures of a batch as pixels, sequence by sequence; uint8."""

    seen: Tensor
    """(M, 3, side, side)"""
    painted: Tensor | None
    """(T, 3, side, side) those that are to be learnt, in the same order."""

    def to(self, device: torch.device | str) -> "Pictures":
        return Pictures(self.seen.to(device), None if self.painted is None else self.painted.to(device))


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    """(B, L) int64, padded on the right."""
    layout: ModalityLayout
    labels: Tensor
    """(B, L) int64: the element that each position is to predict, which is the next one, or `IGNORED`."""
    names: tuple[str | None, ...]
    """The documents' ids, for messages."""
    features: Tensor | None = None
    """(B, L, F) the vectors of the ids that are `FEATURE`, zero elsewhere; None where there are none."""
    pictures: Pictures | None = None
    """For models that look at pixels; None where there are none."""

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            self.ids.to(device),
            self.layout.to(device),
            self.labels.to(device),
            self.names,
            None if self.features is None else self.features.to(device),
            None if self.pictures is None else self.pictures.to(device),
        )


def collate(sequences: Sequence[TokenSequence], pad: int, *, isolated: bool = True) -> Batch:
    """Pad to the longest.

    Args:
        pad: id of the padding token.
        isolated: where a sequence is a row of documents, each is read as if it were alone; otherwise as one text.

    Raises:
        LayoutError: no sequence, an empty one, or one whose ids, targets and spans differ in length.
    """
    if not sequences:
        raise LayoutError("a batch needs at least one sequence")
    for sequence in sequences:
        _check(sequence)
    layout = lay_out([sequence.spans for sequence in sequences])
    if isolated and any(sequence.documents for sequence in sequences):
        layout = replace(layout, documents=_documents(sequences, layout.shape))
    ids = torch.full(layout.shape, pad, dtype=torch.int64)
    labels = torch.full(layout.shape, IGNORED, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        n = len(sequence)
        ids[row, :n] = sequence.ids
        labels[row, : n - 1] = sequence.ids[1:].masked_fill(~sequence.is_target[1:], IGNORED)
    names = tuple(sequence.name for sequence in sequences)
    return Batch(ids, layout, labels, names, _features(sequences, layout.shape), _pictures(sequences))


def _documents(sequences: Sequence[TokenSequence], shape: tuple[int, int]) -> Tensor:
    numbers = torch.full(shape, -1, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        lengths = torch.tensor(sequence.documents or (len(sequence),))
        numbers[row, : len(sequence)] = torch.arange(len(lengths)).repeat_interleave(lengths)
    return numbers


def _features(sequences: Sequence[TokenSequence], shape: tuple[int, int]) -> Tensor | None:
    dense = [sequence.dense_features() for sequence in sequences]
    width = next((rows.shape[1] for rows in dense if rows is not None), None)
    if width is None:
        return None
    features = torch.zeros(*shape, width)
    for row, rows in enumerate(dense):
        if rows is not None:
            features[row, : len(rows)] = rows
    return features


def _pictures(sequences: Sequence[TokenSequence]) -> Pictures | None:
    pixels = [picture for sequence in sequences for picture in sequence.pixels]
    if not pixels:
        return None
    painted = [picture.painted for picture in pixels if picture.painted is not None]
    return Pictures(torch.stack([picture.seen for picture in pixels]), torch.stack(painted) if painted else None)


def _check(sequence: TokenSequence) -> None:
    ids, targets, spans = len(sequence), len(sequence.is_target), sum(span.length for span in sequence.spans)
    if not ids or ids != targets or ids != spans:
        raise LayoutError(
            f"a sequence has {ids} ids, {targets} targets and spans of {spans} positions", where=sequence.name
        )
    if sequence.documents and sum(sequence.documents) != ids:
        raise LayoutError(f"a row of {ids} positions has documents of {sum(sequence.documents)}", where=sequence.name)
    if sequence.pixels:
        pictures = sum(isinstance(span, ImageSpan) for span in sequence.spans)
        if pictures != len(sequence.pixels):
            raise LayoutError(
                f"a sequence has pixels of {len(sequence.pixels)} pictures for {pictures}", where=sequence.name
            )
        return
    vectors = 0 if sequence.features is None else len(sequence.features)
    if vectors != (sequence.ids == FEATURE).sum():
        raise LayoutError(
            f"a sequence has {vectors} features for {int((sequence.ids == FEATURE).sum())} such elements",
            where=sequence.name,
        )
