"""Layouts that are read from token ids."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import LayoutError
from weft.layout import ImageSpan, ModalityLayout, TextSpan, lay_out, layout_of_tokens

PAD, BEGIN, END, WORD, PATCH = 0, 1, 2, 3, 4


def ids_and_spans(words, grid, ended, cut):
    """A sequence with a picture after each run of words but the last; `cut` patches of the last one are missing."""
    rows, cols = grid
    ids, spans = [], []
    for i, length in enumerate(words):
        ids += [WORD] * length
        spans.append(TextSpan(length))
        if i + 1 < len(words):
            ids += [BEGIN] + [PATCH] * (rows * cols) + [END] * ended
            spans += [TextSpan(1), ImageSpan(rows, cols), TextSpan(int(ended))]
    if cut and len(words) > 1 and not words[-1] and cut <= rows * cols:
        spans = [*spans[:-3], ImageSpan(rows, cols, present=rows * cols - cut)]
        ids = ids[: -cut - ended]
    return ids, spans


def assert_same(found: ModalityLayout, wanted: ModalityLayout):
    assert torch.equal(found.grids, wanted.grids) and torch.equal(found.given, wanted.given)
    for plane in ("inputs", "outputs"):
        for fact in fields(getattr(found, plane)):
            got, want = (getattr(getattr(layout, plane), fact.name) for layout in (found, wanted))
            assert torch.equal(got, want), (plane, fact.name)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3),
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 2),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_ids_give_the_layout_of_the_spans_they_were_made_of(words, grid, ended, left, cut, extra):
    made = [ids_and_spans(w, grid, ended, cut) for w in words]
    length = max(len(ids) for ids, _ in made) + extra
    padded = [[PAD] * (length - len(ids)) + ids if left else ids + [PAD] * (length - len(ids)) for ids, _ in made]
    ids = torch.tensor(padded, dtype=torch.int64).view(len(made), length)
    found = layout_of_tokens(ids, begin_image=BEGIN, end_image=END if ended else None, grid=grid, pad=PAD)
    assert_same(found, lay_out([spans for _, spans in made], length=length, left=left))


def test_pictures_of_the_prompt_are_marked_at_their_begin():
    ids = torch.tensor([[BEGIN, PATCH, WORD, BEGIN, PATCH], [WORD, BEGIN, PATCH, WORD, WORD]])
    mask = torch.tensor([[True, False, False, False, False], [False, True, True, True, True]])
    arguments = {"begin_image": BEGIN, "grid": (1, 1)}
    assert layout_of_tokens(ids, **arguments, given=mask).given.tolist() == [[True, False], [True, False]]
    assert layout_of_tokens(ids, **arguments, given=True).given.tolist() == [[True, True], [True, False]]


def test_a_closing_token_that_also_pads_is_text_where_padding_is_on_the_left():
    ids = torch.tensor([[PAD, WORD, WORD, PAD], [WORD, WORD, WORD, PAD]])
    layout = layout_of_tokens(ids, begin_image=BEGIN, grid=(1, 1), pad=PAD)
    assert layout.is_real.tolist() == [[False, True, True, True], [True, True, True, True]]


@pytest.mark.parametrize(
    "ids,message",
    [
        ([[WORD] * 6, [BEGIN, PATCH, PATCH, BEGIN, PATCH, PATCH]], "sequence 1, position 3: a picture begins inside"),
        ([[BEGIN, PATCH, PATCH, PATCH, PATCH, WORD]], "sequence 0, position 5: a picture should end here"),
        ([[BEGIN, PATCH, PATCH, END, PATCH, PATCH]], "sequence 0, position 3: the end of a picture where none ends"),
        ([[WORD, END]], "sequence 0, position 1: the end of a picture where none ends"),
        ([[PAD, PAD, WORD, WORD], [WORD, WORD, PAD, PAD]], "sequence 1 is padded on the right, others on the left"),
        ([WORD, WORD], "integers of shape"),
        ([[0.5]], "integers of shape"),
    ],
)
def test_ids_that_do_not_fit_are_refused_with_their_place(ids, message):
    with pytest.raises(LayoutError, match=message) as caught:
        layout_of_tokens(torch.tensor(ids), begin_image=BEGIN, end_image=END, grid=(2, 2), pad=PAD)
    assert caught.value.fix


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(LayoutError, match="`given` has shape"):
        layout_of_tokens(torch.ones(1, 3, dtype=torch.int64), begin_image=9, grid=(1, 1), given=torch.ones(3) > 0)
