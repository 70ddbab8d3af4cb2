"""Layouts: what every position is."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import LayoutError
from weft.layout import ImageSpan, Modality, TextSpan, lay_out

PICTURE = ImageSpan(2, 2)


def test_outputs_are_the_inputs_of_the_next_position():
    layout = lay_out([[TextSpan(2), PICTURE, TextSpan(2)]])
    assert layout.inputs.modality.tolist() == [[1, 1, 2, 2, 2, 2, 1, 1]]
    assert layout.outputs.modality.tolist() == [[1, 2, 2, 2, 2, 1, 1, 1]]
    assert layout.inputs.row.tolist() == [[-1, -1, 0, 0, 1, 1, -1, -1]]
    assert layout.outputs.col.tolist() == [[-1, 0, 1, 0, 1, -1, -1, -1]]
    assert layout.grids.tolist() == [[[2, 2]]]


@pytest.mark.parametrize("present,last", [(0, (0, 0)), (1, (0, 1)), (3, (1, 1)), (4, None)])
def test_the_last_position_predicts_the_next_patch_of_an_unfinished_picture(present, last):
    layout = lay_out([[TextSpan(2), ImageSpan(2, 2, present=present)]])
    outputs = layout.outputs
    expected = (Modality.TEXT, -1, -1) if last is None else (Modality.IMAGE, *last)
    assert (outputs.modality[0, -1], outputs.row[0, -1], outputs.col[0, -1]) == expected


SPANS = st.lists(
    st.one_of(st.integers(1, 3).map(TextSpan), st.builds(ImageSpan, st.integers(1, 3), st.integers(1, 3))),
    min_size=1,
    max_size=5,
)


@given(st.lists(SPANS, min_size=1, max_size=4), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_padding_on_either_side_changes_no_real_position(sequences, extra):
    length = max(sum(s.length for s in spans) for spans in sequences) + extra
    right, left = lay_out(sequences, length=length), lay_out(sequences, length=length, left=True)
    for b, spans in enumerate(sequences):
        n = sum(span.length for span in spans)
        alone = lay_out([spans])
        for side, real in ((right, slice(0, n)), (left, slice(length - n, length))):
            for plane in ("inputs", "outputs"):
                for fact in ("modality", "image", "row", "col"):
                    got = getattr(getattr(side, plane), fact)[b]
                    assert torch.equal(got[real], getattr(getattr(alone, plane), fact)[0])
                    padding = torch.ones(length, dtype=torch.bool)
                    padding[real] = False
                    assert (got[padding] == (Modality.NONE if fact == "modality" else -1)).all()


@pytest.mark.parametrize(
    "spans,message",
    [
        ([ImageSpan(0, 2)], "0 x 2"),
        ([ImageSpan(2, 2, present=5)], "cannot have 5"),
        ([TextSpan(3), ImageSpan(2, 2, present=1), TextSpan(1)], "sequence 0, position 3"),
    ],
)
def test_malformed_pictures_are_refused_with_their_place(spans, message):
    with pytest.raises(LayoutError, match=message):
        lay_out([spans])


def test_a_sequence_longer_than_asked_is_refused():
    with pytest.raises(LayoutError, match="sequence 1 has 5 positions, more than 4"):
        lay_out([[TextSpan(2)], [TextSpan(5)]], length=4)


def test_what_is_given_is_known_for_each_picture_of_each_sequence():
    shown = ImageSpan(2, 2, given=True)
    layout = lay_out([[TextSpan(1), shown, PICTURE, shown], [PICTURE], [TextSpan(2)]])
    assert layout.given.dtype is torch.bool
    assert layout.given.tolist() == [[True, False, True], [False, False, False], [False, False, False]]
    assert lay_out([[TextSpan(2)]]).given.shape == (1, 0)


@given(st.lists(SPANS, min_size=1, max_size=4), st.booleans())
@settings(max_examples=100, deadline=None)
def test_being_given_changes_no_other_fact(sequences, left):
    shown = [[replace(s, given=True) if isinstance(s, ImageSpan) else s for s in spans] for spans in sequences]
    plain, other = lay_out(sequences, left=left), lay_out(shown, left=left)
    assert not plain.given.any()
    for b, spans in enumerate(sequences):
        pictures = sum(isinstance(span, ImageSpan) for span in spans)
        assert other.given[b].tolist() == [i < pictures for i in range(other.given.shape[1])]
    for got, wanted in ((other.inputs, plain.inputs), (other.outputs, plain.outputs)):
        for fact in fields(got):
            assert torch.equal(getattr(got, fact.name), getattr(wanted, fact.name))
    assert torch.equal(other.grids, plain.grids)


def test_what_is_given_stays_with_a_part_and_a_moved_copy():
    layout = lay_out([[TextSpan(1), ImageSpan(2, 2, given=True), TextSpan(1), PICTURE]])
    assert layout[6:].given.tolist() == [[True, False]], "picture numbers are those of the whole"
    assert layout.to("meta").given.device.type == "meta"
