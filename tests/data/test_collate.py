"""A batch's labels are the next elements that are to be learnt; cutting a long sequence loses and cuts nothing."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.backbones import load_backbone
from weft.backbones.base import encode_document
from weft.data.collate import IGNORED, collate
from weft.data.packing import split_to_fit
from weft.document import Document, Image, Turn, assistant, user
from weft.errors import ContextError, LayoutError
from weft.layout import ImageSpan, Modality, TextSpan, TokenSequence, lay_out

PAD, BEGIN, OPEN, CLOSE = 0, 1, 2, 3
_GRIDS = ((1, 1), (2, 3))


def sequence(pieces, targets=None) -> TokenSequence:
    """`pieces`: the number of text tokens, or the (rows, cols) of a picture between its begin and end tokens."""
    ids, spans = [BEGIN], [TextSpan(1)]

    def text(new):
        ids.extend(new)
        if isinstance(spans[-1], TextSpan):
            spans[-1] = TextSpan(spans[-1].length + len(new))
        else:
            spans.append(TextSpan(len(new)))

    for piece in pieces:
        if isinstance(piece, int):
            text(range(100 + len(ids), 100 + len(ids) + piece))
        else:
            rows, cols = piece
            text([OPEN])
            spans.append(ImageSpan(rows, cols))
            ids.extend(range(1000 + len(ids), 1000 + len(ids) + rows * cols))
            text([CLOSE])
    spans = [span for span in spans if span.length]
    learnt = torch.tensor([False, *(i % 3 > 0 for i in range(1, len(ids)))]) if targets is None else targets
    return TokenSequence(torch.tensor(ids), tuple(spans), learnt, "doc")


@pytest.mark.parametrize("pieces", [[5], [(2, 3)], [2, (1, 1), (2, 3), 1]])
def test_a_label_is_the_next_element_where_that_is_learnt(pieces):
    one, other = sequence(pieces), sequence([3])
    batch = collate([one, other], PAD)
    for row, s in enumerate((one, other)):
        for t in range(batch.ids.shape[1]):
            learnt = t + 1 < len(s) and bool(s.is_target[t + 1])
            assert batch.labels[row, t] == (s.ids[t + 1] if learnt else IGNORED)
            assert batch.ids[row, t] == (s.ids[t] if t < len(s) else PAD)
    assert torch.equal(batch.layout.outputs.modality, lay_out([one.spans, other.spans]).outputs.modality)
    assert batch.names == ("doc", "doc")


def test_labels_of_a_document_agree_with_its_layout():
    from tests.data.corpus import png

    nano = load_backbone("nano")
    answer = assistant("a", Image(png()), "b", Image(png(1)))
    document = Document((user("draw", Image(png(2))), answer, Turn("user", (Image(png()),)), assistant("c")))
    batch = collate([encode_document(nano, document), encode_document(nano, Document((answer,)))], nano.tokens.pad)
    learnt = batch.labels != IGNORED
    predicts_picture = batch.layout.outputs.modality == Modality.IMAGE
    is_code = batch.labels >= nano.config.vocabulary
    assert torch.equal(learnt & predicts_picture, is_code)
    assert is_code.sum(1).tolist() == [2 * nano.form.patches] * 2
    assert not learnt[~batch.layout.is_real].any()


def test_a_sequence_at_odds_with_itself_is_refused():
    s = sequence([4])
    for bad in (
        TokenSequence(s.ids, (TextSpan(4),), s.is_target, "doc"),
        TokenSequence(s.ids, s.spans, s.is_target[1:], "doc"),
        TokenSequence(s.ids[:0], (), s.is_target[:0], "doc"),
    ):
        with pytest.raises(LayoutError):
            collate([bad], PAD)
    with pytest.raises(LayoutError):
        collate([], PAD)


pieces = st.lists(st.one_of(st.integers(1, 9), st.sampled_from(_GRIDS)), max_size=8)


@settings(deadline=None, max_examples=200)
@given(pieces, st.integers(9, 40))
def test_split_cuts_no_picture_and_loses_nothing(pieces, limit):
    whole = sequence(pieces)
    parts = split_to_fit(whole, limit, "split")
    assert all(len(part) <= limit for part in parts)
    assert torch.equal(torch.cat([whole.ids[:1], *(part.ids[1:] for part in parts)]), whole.ids)
    assert torch.equal(torch.cat([whole.is_target[:1], *(part.is_target[1:] for part in parts)]), whole.is_target)
    for part in parts:
        assert part.ids[0] == BEGIN
        assert part.name == "doc"
        assert sum(span.length for span in part.spans) == len(part)
        at = 0
        for span in part.spans:
            if isinstance(span, ImageSpan):
                assert part.ids[at - 1] == OPEN
                assert part.ids[at + span.length] == CLOSE
                assert (part.ids[at : at + span.length] >= 1000).all()
            else:
                assert (part.ids[at : at + span.length] < 1000).all()
            at += span.length
    pictures = [span for part in parts for span in part.spans if isinstance(span, ImageSpan)]
    assert pictures == [span for span in whole.spans if isinstance(span, ImageSpan)]
    # as long as may be: no piece could have taken the first thing of the next
    for before, after in itertools.pairwise(parts):
        least = after.spans[1].length + 2 if after.ids[1] == OPEN else 1
        assert len(before) + least > limit


def test_overflow_is_dropped_or_refused_as_asked():
    s = sequence([8])
    assert split_to_fit(s, 9, "error") == [s]
    assert split_to_fit(s, 8, "drop") == []
    with pytest.raises(ContextError, match="9 positions, more than 8"):
        split_to_fit(s, 8, "error")
    with pytest.raises(ContextError, match="picture needs 8"):
        split_to_fit(sequence([1, (2, 3), 1]), 8, "split")
    assert len(split_to_fit(sequence([1, (2, 3), 1]), 9, "split")) == 3
