"""The rule: which position takes which branch."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.adapters.rings import RingCache
from weft.adapters.routing import Routes, Rule, route, route_step
from weft.errors import LayoutError, RoutingError
from weft.layout import ImageSpan, Modality, ModalityLayout, TextSpan, lay_out
from weft.ops.grid import Window

PICTURE = ImageSpan(2, 3)
RULES = [Rule(*options) for options in itertools.product(("output", "input"), ("image", "text", "none"))]
WINDOWS = (Window.of(2), Window.of(3, "raster"))


def test_output_modality_decides():
    # t t [IMG] p0..p5 [/IMG] t: the position of [IMG] predicts patch 0, that of p5 predicts text
    routes = route(lay_out([[TextSpan(3), PICTURE, TextSpan(2)]], length=13))
    assert routes.text.tolist() == [0, 1, 8, 9, 10]
    assert routes.image.tolist() == [2, 3, 4, 5, 6, 7]
    assert routes.patches.groups == (((2, 3), 1),)


def test_input_modality_decides_where_that_is_asked_for():
    routes = route(lay_out([[TextSpan(3), PICTURE, TextSpan(2)]], length=13), Rule("input"))
    assert routes.text.tolist() == [0, 1, 2, 9, 10]
    assert routes.image.tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "context_images,text,image",
    [
        ("image", [0, 7, 8, 12, 13], [1, 2, 3, 4, 5, 6, 9, 10, 11]),
        ("text", [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13], [9, 10, 11]),
        ("none", [0, 7, 8, 12, 13], [9, 10, 11]),
    ],
)
def test_pictures_of_the_context_take_what_the_rule_says(context_images, text, image):
    given_one = dataclasses.replace(PICTURE, given=True)
    layout = lay_out([[TextSpan(2), given_one, TextSpan(2), ImageSpan(1, 3), TextSpan(1)]])
    routes = route(layout, Rule(context_images=context_images))
    assert (routes.text.tolist(), sorted(routes.image.tolist())) == (text, image)


def test_padding_takes_no_branch_on_either_side():
    spans = [[TextSpan(2)], [TextSpan(1), PICTURE, TextSpan(1)]]
    for left in (False, True):
        layout = lay_out(spans, left=left)
        routes = route(layout)
        real = layout.is_real.flatten().nonzero().squeeze(1).tolist()
        assert sorted((*routes.text.tolist(), *routes.image.tolist())) == real


def test_pictures_of_one_grid_follow_each_other():
    routes = route(lay_out([[TextSpan(1), PICTURE, TextSpan(2), ImageSpan(1, 2), TextSpan(1)], [TextSpan(1), PICTURE]]))
    assert routes.patches.groups == (((1, 2), 1), ((2, 3), 2))
    assert routes.image.tolist() == [8, 9, *range(6), *range(12, 18)]


def test_a_sequence_may_end_inside_a_picture():
    routes = route(lay_out([[TextSpan(1), ImageSpan(2, 3, present=2)]]), windows=WINDOWS)
    assert routes.image.tolist() == [0, 1, 2]
    assert routes.patches.groups == (), "not for the forms that want whole pictures"
    assert set(routes.patches.tables) == {window.name for window in WINDOWS}


def test_all_text_means_padding_included():
    assert route(lay_out([[TextSpan(3)], [TextSpan(3)]])).all_text
    assert not route(lay_out([[TextSpan(3)], [TextSpan(2)]])).all_text
    assert not route(lay_out([[TextSpan(3), PICTURE]])).all_text


@st.composite
def sequence(draw) -> list:
    picture = st.builds(ImageSpan, st.integers(1, 3), st.integers(1, 4), given=st.booleans())
    spans = draw(st.lists(st.integers(1, 4).map(TextSpan) | picture, min_size=1, max_size=5))
    if isinstance(spans[-1], ImageSpan) and draw(st.booleans()):
        spans[-1] = dataclasses.replace(spans[-1], present=draw(st.integers(0, spans[-1].length)))
    return [TextSpan(1), *spans]  # a begin token: every patch has a position that predicts it


@st.composite
def layouts(draw) -> ModalityLayout:
    sequences = draw(st.lists(sequence(), min_size=1, max_size=3))
    longest = max(sum(span.length for span in spans) for spans in sequences)
    return lay_out(sequences, length=longest + draw(st.integers(0, 2)), left=draw(st.booleans()))


def one_by_one(layout: ModalityLayout, rule: Rule) -> tuple[list[int], dict[tuple[int, int], dict]]:
    """Flat text positions, and for each (sequence, picture) the flat position of every (row, column)."""
    plane = layout.outputs if rule.routing == "output" else layout.inputs
    text, pictures = [], {}
    for b, t in itertools.product(*map(range, layout.shape)):
        modality, flat = plane.modality[b, t], b * layout.shape[1] + t
        picture, place = int(plane.image[b, t]), (int(plane.row[b, t]), int(plane.col[b, t]))
        is_given = modality == Modality.IMAGE and bool(layout.given[b, picture])
        if modality == Modality.TEXT or (is_given and rule.context_images == "text"):
            text.append(flat)
        elif modality == Modality.IMAGE and not (is_given and rule.context_images == "none"):
            pictures.setdefault((b, picture), {})[place] = flat
    return text, pictures


def neighbours(routes: Routes, window: Window) -> Tensor:
    """(n, T) flat positions that each row's taps read, -1 for none."""
    return torch.cat((routes.image, torch.tensor([-1])))[routes.patches.tables[window.name].reads]


@given(layouts(), st.sampled_from(RULES))
@settings(max_examples=200, deadline=None)
def test_routes_are_those_of_a_position_by_position_definition(layout, rule):
    routes = route(layout, rule, WINDOWS)
    text, pictures = one_by_one(layout, rule)
    assert routes.text.tolist() == text
    where = {flat: (picture, place) for picture, places in pictures.items() for place, flat in places.items()}
    assert sorted(routes.image.tolist()) == sorted(where)
    grids = {(b, picture): tuple(layout.grids[b, picture].tolist()) for b, picture in pictures}
    for window in WINDOWS:
        for flat, reads in zip(routes.image.tolist(), neighbours(routes, window).tolist(), strict=True):
            picture, (row, col) = where[flat]
            assert reads == [pictures[picture].get((row - up, col - left), -1) for up, left in window.taps]
    # as the dense forms read the rows: group after group, picture after picture, in raster order
    if all(len(places) == grids[picture][0] * grids[picture][1] for picture, places in pictures.items()):
        rows = iter(routes.image.tolist())
        for (height, width), count in routes.patches.groups:
            for _ in range(count):
                first = next(rows)
                picture, place = where[first]
                assert grids[picture] == (height, width) and place == (0, 0)
                assert [first, *itertools.islice(rows, height * width - 1)] == list(pictures[picture].values())
        assert next(rows, None) is None
    else:
        assert routes.patches.groups == ()


@given(st.lists(sequence(), min_size=2, max_size=4), st.randoms(use_true_random=False), st.sampled_from(RULES))
@settings(max_examples=100, deadline=None)
def test_permuting_the_sequences_permutes_the_routes(sequences, rng, rule):
    order = list(range(len(sequences)))
    rng.shuffle(order)
    plain, permuted = route(lay_out(sequences), rule), route(lay_out([sequences[b] for b in order]), rule)
    length = plain.shape[1]
    back = lambda flat: sorted(order[i // length] * length + i % length for i in flat.tolist())  # noqa: E731
    assert back(permuted.text) == sorted(plain.text.tolist())
    assert back(permuted.image) == sorted(plain.image.tolist())


WHOLE = sequence().map(
    lambda spans: [dataclasses.replace(s, present=None) if isinstance(s, ImageSpan) else s for s in spans]
)


@given(st.lists(WHOLE, min_size=2, max_size=3), st.sampled_from(RULES))
@settings(max_examples=100, deadline=None)
def test_packed_sequences_are_routed_as_separate_ones(sequences, rule):
    separate, packed = lay_out(sequences), lay_out([[span for spans in sequences for span in spans]])
    starts = [0, *itertools.accumulate(sum(span.length for span in spans) for spans in sequences)]
    length = separate.shape[1]
    moved = lambda flat: [starts[i // length] + i % length for i in flat.tolist()]  # noqa: E731
    one, many = route(packed, rule, WINDOWS), route(separate, rule, WINDOWS)
    assert one.text.tolist() == moved(many.text)
    assert one.image.tolist() == moved(many.image)
    assert one.patches.groups == many.patches.groups
    for window in WINDOWS:
        assert torch.equal(one.patches.tables[window.name].reads, many.patches.tables[window.name].reads)


@given(layouts(), st.sampled_from(RULES))
@settings(max_examples=200, deadline=None)
def test_a_step_routes_each_position_as_the_whole_forward_does(layout, rule):
    batch, length = layout.shape
    routes, rings = route(layout, rule), RingCache(batch, columns=4)
    text, image = set(routes.text.tolist()), set(routes.image.tolist())
    for t in range(length):
        step = route_step(layout[t : t + 1], torch.arange(batch), rings, rule, WINDOWS)
        flat = [b * length + t for b in range(batch)]
        assert step.is_text.tolist() == [i in text for i in flat]
        assert step.is_image.tolist() == [i in image for i in flat]
        alike = [name for name, taken in (("text", text), ("image", image)) if taken.issuperset(flat)]
        assert step.only == (alike[0] if alike else None)
        for window in WINDOWS:
            tables = step.tables[window.name]
            nowhere = batch * rings.size(window)
            assert [(here != nowhere) for here in tables.here.tolist()] == step.is_image.tolist()
            assert (tables.done[:-1] == tables.here).all() and tables.done[-1] == nowhere


def corrupted(positions: slice | int, **facts: int | list[int]) -> ModalityLayout:
    """Sequence 1 of two, `t [IMG] p0 .. p3 [/IMG] t` with 2 x 2 patches, other facts at some of its positions."""
    layout = lay_out([[TextSpan(8)], [TextSpan(2), ImageSpan(2, 2), TextSpan(2)]])
    plane = layout.inputs.map(torch.clone)
    for name, values in facts.items():
        getattr(plane, name)[1, positions] = torch.tensor(values)
    return dataclasses.replace(layout, inputs=plane)


UNSTARTED = "does not start at its first patch, or has a gap"
UNFINISHED = "an unfinished picture that is not at the end"
OUTSIDE = "a patch outside its picture's grid"
NO_GRID = "a patch of a picture without a grid"
NO_PATCH = {"modality": Modality.TEXT, "image": -1, "row": -1, "col": -1}
MALFORMED = {
    "a picture number that has no grid": (corrupted(4, image=1), 4, NO_GRID),
    "a patch without a picture number": (corrupted(3, image=-1), 3, NO_GRID),
    "a row below the grid": (corrupted(5, row=2), 5, OUTSIDE),
    "a column right of the grid": (corrupted(3, col=2), 3, OUTSIDE),
    "a patch without a place": (corrupted(2, row=-1, col=-1), 2, OUTSIDE),
    "a run one longer than its grid": (corrupted(6, modality=Modality.IMAGE, image=0, row=2, col=0), 6, OUTSIDE),
    "the last patch twice": (corrupted(6, modality=Modality.IMAGE, image=0, row=1, col=1), 6, UNSTARTED),
    "no first patch": (corrupted(2, **NO_PATCH), 3, UNSTARTED),
    "text inside": (corrupted(3, **NO_PATCH), 4, UNSTARTED),
    "padding inside": (corrupted(3, **NO_PATCH | {"modality": Modality.NONE}), 4, UNSTARTED),
    "a token between patches": (
        corrupted(slice(4, 7), modality=[1, 2, 2], image=[-1, 0, 0], row=[-1, 1, 1], col=[-1, 0, 1]),
        5,
        UNSTARTED,
    ),
    "patches out of order": (corrupted(slice(3, 5), row=[1, 0], col=[0, 1]), 3, UNSTARTED),
    "a patch skipped": (corrupted(slice(3, 5), row=[1, 1], col=[0, 1]), 3, UNSTARTED),
    "a run one shorter than its grid": (corrupted(5, **NO_PATCH), 4, UNFINISHED),
    "started again before it was finished": (corrupted(slice(4, 6), row=[0, 0], col=[0, 1]), 3, UNFINISHED),
    "unfinished, then padding, then text": (corrupted(5, **NO_PATCH | {"modality": Modality.NONE}), 4, UNFINISHED),
}


@pytest.mark.parametrize("layout,position,message", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_layout_is_refused_with_its_place(layout, position, message):
    with pytest.raises(RoutingError, match=f"sequence 1, position {position}: .*{message}") as caught:
        route(layout, Rule("input"))
    assert caught.value.fix


@pytest.mark.parametrize("context_images", ["text", "none"])
def test_a_given_picture_must_be_well_formed_whatever_it_takes(context_images):
    layout = corrupted(3, **NO_PATCH)
    layout = dataclasses.replace(layout, given=torch.ones_like(layout.given))
    with pytest.raises(RoutingError, match="sequence 1, position 4"):
        route(layout, Rule("input", context_images))


def test_patches_in_a_batch_without_any_grid_are_refused():
    layout = corrupted(0)
    bare = dataclasses.replace(layout, grids=layout.grids[:, :0], given=layout.given[:, :0])
    with pytest.raises(RoutingError, match=f"sequence 1, position 2: {NO_GRID}"):
        route(bare, Rule("input"))


def test_half_of_one_picture_is_not_completed_by_half_of_the_next():
    layout = lay_out([[ImageSpan(2, 2), ImageSpan(2, 2)]])
    halves = layout.inputs.map(lambda fact: torch.cat((fact[:, :2], fact[:, 6:]), 1))
    with pytest.raises(RoutingError, match=f"sequence 0, position 2: .*{UNSTARTED}"):
        route(dataclasses.replace(layout, inputs=halves, outputs=halves))


def test_pictures_do_not_run_from_one_sequence_into_the_next():
    layout = lay_out([[ImageSpan(2, 2)]])
    cut = layout.inputs.map(lambda fact: fact.view(2, 2))
    two = dataclasses.replace(
        layout, inputs=cut, outputs=cut, grids=layout.grids.expand(2, 1, 2), given=layout.given.expand(2, 1)
    )
    with pytest.raises(RoutingError, match=f"sequence 1, position 0: .*{UNSTARTED}"):
        route(two)


def test_a_chunk_that_starts_inside_a_picture_is_refused():
    layout = lay_out([[TextSpan(1), PICTURE, TextSpan(1)]])
    with pytest.raises(RoutingError, match="sequence 0, position 0"):
        route(layout[3:])


def test_an_unfinished_picture_in_the_middle_cannot_even_be_laid_out():
    with pytest.raises(LayoutError, match="not the last span"):
        lay_out([[TextSpan(1), ImageSpan(2, 3, present=2), TextSpan(1)]])
