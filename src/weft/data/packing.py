"""Sequences cut and joined: pieces of documents in a row, and documents longer than the context.

Which piece stands where is decided in `rows.py`.
"""

from collections.abc import Sequence
from itertools import compress
from typing import Literal

import torch

from weft.data.rows import Extent, parts
from weft.errors import ContextError
from weft.layout import FEATURE, ImageSpan, Span, TextSpan, TokenSequence

OnOverflow = Literal["split", "drop", "error"]


def split_to_fit(sequence: TokenSequence, limit: int, on_overflow: OnOverflow) -> list[TokenSequence]:
    """The sequence in pieces of at most `limit` elements; itself if it fits, none if it was dropped.

    A picture stays whole, together with the tokens that open and close it. Every piece starts with the sequence's first
    token; everything else appears once, in order, with its target.

    Raises:
        ContextError: it does not fit and `on_overflow` is `error`, or one picture alone does not fit.
    """
    if len(sequence) <= limit:
        return [sequence]
    if on_overflow == "drop":
        return []
    if on_overflow == "error":
        raise ContextError(
            f"a sequence has {len(sequence)} positions, more than {limit}",
            where=sequence.name,
            fix="split or drop such sequences (on_overflow), or shorten the document",
        )
    return [cut(sequence, start, end, again=True) for start, end in parts(extent_of(sequence), limit)]


def extent_of(sequence: TokenSequence) -> Extent:
    """A picture takes the tokens that open it and those that close it along."""
    pictures, at = [], 0
    for span in sequence.spans:
        if isinstance(span, ImageSpan):
            pictures.append((at - span.before, min(at + span.length + span.after, len(sequence))))
        at += span.length
    return Extent(len(sequence), tuple(pictures), sequence.name)


def join(pieces: Sequence[TokenSequence]) -> TokenSequence:
    """Several sequences as the documents of one row. What begins a document is not learnt."""
    targets = [piece.is_target.clone() for piece in pieces]
    for target in targets:
        target[0] = False
    features = [piece.features for piece in pieces if piece.features is not None]
    return TokenSequence(
        torch.cat([piece.ids for piece in pieces]),
        tuple(span for piece in pieces for span in piece.spans),
        torch.cat(targets),
        ", ".join(piece.name or "?" for piece in pieces),
        torch.cat(features) if features else None,
        tuple(picture for piece in pieces for picture in piece.pixels),
        tuple(map(len, pieces)),
    )


def cut(sequence: TokenSequence, start: int, end: int, *, again: bool) -> TokenSequence:
    """Elements [start, end), which part no picture.

    Args:
        again: the first element of all stands before them, wherever they start.
    """
    end = min(end, len(sequence))
    if start == 0 and end == len(sequence):
        return sequence
    again = again and start > 0
    spans: list[Span] = [TextSpan(1)] if again else []
    kept: list[bool] = []
    at = 0
    for span in sequence.spans:
        length = min(at + span.length, end) - max(at, start)
        if isinstance(span, ImageSpan):
            kept.append(length > 0)
        if length > 0 and isinstance(span, TextSpan) and spans and isinstance(spans[-1], TextSpan):
            spans[-1] = TextSpan(spans[-1].length + length)
        elif length > 0:
            spans.append(span if isinstance(span, ImageSpan) else TextSpan(length))
        at += span.length
    keep = torch.arange(start, end)
    if again:
        keep = torch.cat((torch.tensor([0]), keep))
    features = sequence.features
    if features is not None:
        is_feature = sequence.ids == FEATURE
        first, count = int(is_feature[:start].sum()), int(is_feature[start:end].sum())
        features = features[first : first + count] if count else None
    pixels = sequence.pixels and tuple(compress(sequence.pixels, kept))
    return TokenSequence(sequence.ids[keep], tuple(spans), sequence.is_target[keep], sequence.name, features, pixels)
