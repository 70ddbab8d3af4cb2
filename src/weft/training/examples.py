"""Documents as token sequences, encoded when first asked for and kept."""

import hashlib
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from weft.backbones.base import Backbone, encode_document
from weft.codecs.pixels import to_picture
from weft.data.mixture import Joined, Mixture
from weft.data.packing import cut, extent_of, join, split_to_fit
from weft.data.rows import Extent, Packing, Row
from weft.data.token_cache import TokenCache
from weft.document import Document, Image, Text, Turn, assistant, user
from weft.images import encode_png
from weft.layout import TokenSequence

log = logging.getLogger(__name__)

KEPT_POSITIONS = 50_000_000
"""Positions kept in memory, about 10 bytes each, vectors and pixels of pictures counted like them; documents beyond
them are encoded again each time, or read from the cache on disk."""


class Examples:
    """Datasets as one backbone reads them; documents longer than `context` are cut in parts that fit.

    May be read by several threads.
    """

    def __init__(self, dataset: Joined, backbone: Backbone, context: int, cache: Path | None = None) -> None:
        """
        Args:
            cache: a folder where encoded documents are kept for other runs.
        """
        self._dataset, self._backbone, self._context = dataset, backbone, context
        self._caches: Sequence[TokenCache] = ()
        if cache is not None:
            reader = {"model": backbone.name, "weights": backbone.fingerprint, "reading": fingerprint(backbone)}
            self._caches = [TokenCache(cache, data=each.fingerprint, **reader) for each in dataset.datasets]
        self._kept: dict[int, TokenSequence] = {}
        self._room = KEPT_POSITIONS
        self._reading = threading.Lock()

    def __getitem__(self, number: int) -> tuple[TokenSequence, ...]:
        """The parts of one document, at least one; more than one means it was too long.

        Raises:
            ImageError: a picture cannot be decoded.
            ContextError: a part that cannot be cut, such as one picture, is longer than the context.
        """
        parts = split_to_fit(self.whole(number), self._context, "split")
        # a part of nothing but context would cost a forward and teach nothing
        return tuple(part for part in parts if part.is_target[1:].any()) or (parts[0],)

    def whole(self, number: int) -> TokenSequence:
        """One document, however long."""
        found = self._kept.get(number)
        if found is None:
            found = self._find(number)
            if _size(found) <= self._room:
                self._room -= _size(found)
                self._kept[number] = found
        return found

    def extent(self, number: int) -> Extent:
        return extent_of(self.whole(number))

    def row(self, packing: Packing, row: Row, order: Mixture) -> tuple[TokenSequence, ...]:
        """The sequences of a row whose pieces name documents by their places in an order."""
        if packing == "none":
            return tuple(part for piece in row.pieces for part in self[order[piece.document]])
        again = packing == "best_fit"
        pieces = [cut(self.whole(order[place]), start, end, again=again) for place, start, end in row.pieces]
        return (join(pieces),)

    def flush(self) -> None:
        """Write what the cache has not on disk yet."""
        for cache in self._caches:
            cache.flush()

    def _find(self, number: int) -> TokenSequence:
        which, inner = self._dataset.locate(number)
        cache = self._caches[which] if self._caches else None
        found = None if cache is None else cache.get(inner)
        if found is None:
            with self._reading:  # datasets keep what they read last
                document = self._dataset[number]
            found = encode_document(self._backbone, document)
            if cache is not None:
                cache.put(inner, found)
        if not found.is_target[1:].any():
            log.warning("document %s has nothing to learn: no turn of the assistant", found.name or number)
        return found


def fingerprint(backbone: Backbone) -> str:
    """Hash of how a backbone reads: of small documents as it encodes them, so that a change of tokenizer, chat format,
    codec or of the code for them changes it; and of the types its weights are in."""
    rows, cols = torch.meshgrid(torch.linspace(0, 255, 48), torch.linspace(0, 255, 64), indexing="ij")
    picture = Image(encode_png(to_picture(torch.stack((rows, cols, 255 - rows)))))
    text = "Ein Bild, 3 Sätze: “naïve café”\n\t你好 <s> [IMG]"
    turns = (Turn("system", (Text(text),)), user(text, picture), assistant(text, picture, "."), user(text))
    dtypes = sorted({str(parameter.dtype) for parameter in backbone.parameters()})
    digest = hashlib.sha256(repr(dtypes).encode())
    for document in (Document(turns), Document(turns[:-1])):  # what follows a turn depends on whether it is the last
        sequence = encode_document(backbone, document)
        for tensor in (sequence.ids, sequence.is_target, *_tensors_of_pixels(sequence)):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        # the vectors' own bits depend on the device; what makes them is in the hash of the weights
        shape = None if sequence.features is None else tuple(sequence.features.shape)
        digest.update(repr((sequence.spans, shape)).encode())
    return digest.hexdigest()


def _tensors_of_pixels(sequence: TokenSequence) -> Iterable[torch.Tensor]:
    return (tensor for pixels in sequence.pixels for tensor in (pixels.seen, pixels.painted) if tensor is not None)


def _size(sequence: TokenSequence) -> int:
    """In positions."""
    vectors = 0 if sequence.features is None else sequence.features.nbytes
    pixels = sum(tensor.nbytes for tensor in _tensors_of_pixels(sequence))
    return len(sequence) + (vectors + pixels) // 10
