"""Sequences longer than the context: split where no picture is cut, dropped, or refused."""

from collections.abc import Iterator
from itertools import compress
from typing import Literal

import torch

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
    return [_piece(sequence, start, end) for start, end in _runs(sequence, limit - 1)]


def _runs(sequence: TokenSequence, room: int) -> Iterator[tuple[int, int]]:
    """[start, end) of the elements after the first, each run as long as it may be."""
    cuts = _cuts(sequence)
    start = end = 1
    for cut in cuts:
        if cut - start > room:
            if end > start:
                yield start, end
                start = end
            if cut - start > room:
                raise ContextError(
                    f"a picture needs {cut - start} positions with its begin and end, and there are {room}",
                    where=sequence.name,
                    fix="raise the limit",
                )
        end = cut
    yield start, end


def _cuts(sequence: TokenSequence) -> list[int]:
    """Positions before which the sequence may be cut, and its end."""
    may_cut = torch.ones(len(sequence) + 1, dtype=torch.bool)
    at = 0
    for span in sequence.spans:
        if isinstance(span, ImageSpan):
            # after the first of the tokens that open the picture, up to the last of those that close it
            may_cut[at - span.before + 1 : at + span.length + span.after] = False
        at += span.length
    may_cut[:2] = False  # the first token is repeated, never a piece of its own
    may_cut[-1] = True
    return may_cut.nonzero().flatten().tolist()


def _piece(sequence: TokenSequence, start: int, end: int) -> TokenSequence:
    keep = torch.cat((torch.tensor([0]), torch.arange(start, end)))
    spans: list[Span] = []
    kept: list[bool] = []
    at = 0
    for span in sequence.spans:
        first, last = max(at, start), min(at + span.length, end)
        if isinstance(span, ImageSpan):
            kept.append(first < last)
            if kept[-1]:
                spans.append(span)
        else:
            # the first token belongs to the first span of every piece
            length = max(0, last - first) + (at == 0)
            if length and spans and isinstance(spans[-1], TextSpan):
                spans[-1] = TextSpan(spans[-1].length + length)
            elif length:
                spans.append(TextSpan(length))
        at += span.length
    features = sequence.features
    if features is not None:
        is_feature = sequence.ids == FEATURE
        first, count = int(is_feature[:start].sum()), int(is_feature[start:end].sum())
        features = features[first : first + count] if count else None
    pixels = sequence.pixels and tuple(compress(sequence.pixels, kept))
    return TokenSequence(sequence.ids[keep], tuple(spans), sequence.is_target[keep], sequence.name, features, pixels)
