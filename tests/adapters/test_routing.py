"""The rule: which position takes which branch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.adapters.routing import RingCache, RoutingState, route
from weft.errors import LayoutError, RoutingError
from weft.layout import ImageSpan, Modality, TextSpan, lay_out

PICTURE = ImageSpan(2, 3)


def test_output_modality_decides():
    # t t [IMG] p0..p5 [/IMG] t: the position of [IMG] predicts patch 0, that of p5 predicts text
    layout = lay_out([[TextSpan(3), PICTURE, TextSpan(2)]], length=13)
    routes = route(layout)
    assert routes.text.tolist() == [0, 1, 8, 9, 10]
    (group,) = routes.images
    assert group.grid == (2, 3) and group.whole
    assert group.index.tolist() == [[2, 3, 4, 5, 6, 7]]


def test_padding_takes_no_branch_on_either_side():
    spans = [[TextSpan(2)], [TextSpan(1), PICTURE, TextSpan(1)]]
    for left in (False, True):
        routes = route(lay_out(spans, left=left))
        taken = torch.cat((routes.text, *(g.index.flatten() for g in routes.images)))
        real = lay_out(spans, left=left).is_real.flatten().nonzero().squeeze(1)
        assert sorted(taken.tolist()) == real.tolist()


def test_pictures_of_different_grids_are_grouped():
    routes = route(lay_out([[TextSpan(1), PICTURE, TextSpan(2), ImageSpan(1, 2), TextSpan(1)], [TextSpan(1), PICTURE]]))
    assert {group.grid: len(group.index) for group in routes.images} == {(2, 3): 2, (1, 2): 1}


def test_a_sequence_may_end_inside_a_picture():
    layout = lay_out([[TextSpan(1), ImageSpan(2, 3, present=2)]])
    (group,) = route(layout).images
    assert not group.whole
    assert group.index.tolist() == [[0, 1, 2, 3, 3, 3]]
    with pytest.raises(LayoutError, match="not the last span"):
        lay_out([[TextSpan(1), ImageSpan(2, 3, present=2), TextSpan(1)]])


def test_a_chunk_that_starts_inside_a_picture_is_refused():
    layout = lay_out([[TextSpan(1), PICTURE, TextSpan(1)]])
    with pytest.raises(RoutingError, match="sequence 0, position 0"):
        route(layout[3:])


SPANS = st.lists(
    st.one_of(
        st.integers(1, 4).map(TextSpan),
        st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda g: ImageSpan(*g)),
    ),
    min_size=1,
    max_size=6,
).map(lambda spans: [TextSpan(1), *spans])


@given(st.lists(SPANS, min_size=1, max_size=3), st.booleans())
@settings(max_examples=500, deadline=None)
def test_every_real_position_takes_exactly_one_branch(sequences, left):
    layout = lay_out(sequences, left=left)
    routes = route(layout)
    taken = torch.cat((routes.text, *(g.index.flatten() for g in routes.images)))
    assert sorted(taken.tolist()) == layout.is_real.flatten().nonzero().squeeze(1).tolist()
    # an image always owns exactly its P positions: those before its patches
    inputs = layout.inputs
    for group in routes.images:
        for picture in group.index.tolist():
            for place, position in enumerate(picture):
                b, t = divmod(position, layout.shape[1])
                assert inputs.modality[b, t + 1] == Modality.IMAGE
                assert inputs.row[b, t + 1] * group.grid[1] + inputs.col[b, t + 1] == place


def test_running_without_a_layout_or_with_another_batchs_raises():
    state = RoutingState()
    with pytest.raises(RoutingError, match="without the layout"):
        state.of(torch.Size((1, 4, 8)))
    state.set(lay_out([[TextSpan(4)]]))
    state.of(torch.Size((1, 4, 8)))
    with pytest.raises(RoutingError, match="1 x 4 positions"):
        state.of(torch.Size((1, 5, 8)))
    assert copy.deepcopy(state).routes is None


def test_rings_reset_and_reorder_by_slot():
    rings = RingCache(3, columns=2)
    ring = rings.ring(rings, "default", 4, torch.zeros(2, 5), 2)
    ring[0], ring[1], ring[2] = 1.0, 2.0, 3.0
    rings.reorder(torch.tensor([2, 2, 0]))
    assert rings.ring(rings, "default", 4, ring, 2)[:, 0, 0].tolist() == [3, 3, 1]
    rings.reset([1])
    assert rings.ring(rings, "default", 4, ring, 2)[:, 0, 0].tolist() == [3, 0, 1]
