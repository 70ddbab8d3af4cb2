"""Documents as token sequences, encoded when first asked for and kept."""

import logging

from weft.backbones.base import Backbone, encode_document
from weft.data import Dataset
from weft.data.packing import split_to_fit
from weft.layout import TokenSequence

log = logging.getLogger(__name__)

KEPT_POSITIONS = 50_000_000
"""Positions kept in memory, about 10 bytes each, vectors and pixels of pictures counted like them; documents beyond
them are encoded again each time."""


class Examples:
    """A dataset as one backbone reads it; documents longer than `context` are cut in parts that fit."""

    def __init__(self, dataset: Dataset, backbone: Backbone, context: int) -> None:
        self._dataset, self._backbone, self._context = dataset, backbone, context
        self._kept: dict[int, tuple[TokenSequence, ...]] = {}
        self._room = KEPT_POSITIONS

    def __getitem__(self, number: int) -> tuple[TokenSequence, ...]:
        """The parts of one document, at least one; more than one means it was too long.

        Raises:
            ImageError: a picture cannot be decoded.
            ContextError: a part that cannot be cut, such as one picture, is longer than the context.
        """
        found = self._kept.get(number)
        if found is None:
            found = self._encode(number)
            size = sum(map(_size, found))
            if size <= self._room:
                self._kept[number] = found
                self._room -= size
        return found

    def _encode(self, number: int) -> tuple[TokenSequence, ...]:
        sequence = encode_document(self._backbone, self._dataset[number])
        if not sequence.is_target[1:].any():
            log.warning("document %s has nothing to learn: no turn of the assistant", sequence.name or number)
        parts = split_to_fit(sequence, self._context, "split")
        # a part of nothing but context would cost a forward and teach nothing
        return tuple(part for part in parts if part.is_target[1:].any()) or (parts[0],)


def _size(part: TokenSequence) -> int:
    """In positions."""
    vectors = 0 if part.features is None else part.features.nbytes
    pixels = sum(p.seen.nbytes + (0 if p.painted is None else p.painted.nbytes) for p in part.pixels)
    return len(part) + (vectors + pixels) // 10
