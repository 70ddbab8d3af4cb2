"""The state that carries the rule to the layers of one model, and the rings of cached decoding."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weft.adapters.rings import RingCache
from weft.adapters.routing import RoutingState, Rule, route_step
from weft.errors import RoutingError
from weft.layout import ImageSpan, TextSpan, lay_out
from weft.ops.grid import Window

PICTURE = ImageSpan(2, 3)
WINDOWS = (Window.of(2), Window.of(3, "raster"))
NOTHING_SET = "without the layout of its input"


def state_of(*rules: Rule) -> RoutingState:
    state = RoutingState()
    for number, rule in enumerate(rules or (Rule(),)):
        state.register(f"adapter {number}", rule, WINDOWS)
    return state


TEXT_4 = lay_out([[TextSpan(4)]])
MIXED = lay_out([[TextSpan(2), PICTURE, TextSpan(2)]])


def test_running_without_a_layout_or_with_another_batchs_raises():
    state = state_of()
    with pytest.raises(RoutingError, match=NOTHING_SET):
        state.of("adapter 0", torch.Size((1, 4, 8)))
    state.set(TEXT_4)
    for shape in ((1, 4, 8), (4, 8)):
        state.of("adapter 0", torch.Size(shape))
    for shape in ((1, 5, 8), (2, 4, 8), (3, 8)):
        with pytest.raises(RoutingError, match="describes 1 x 4 positions"):
            state.of("adapter 0", torch.Size(shape))


def test_a_second_forward_needs_a_layout_of_its_own():
    state = state_of()
    with pytest.raises(RoutingError, match=NOTHING_SET):
        state.begin(None)
    state.set(TEXT_4)
    state.begin(None)
    with pytest.raises(RoutingError, match=NOTHING_SET):
        state.begin(None)
    state.begin(TEXT_4)
    state.of("adapter 0", torch.Size((1, 4, 8)))
    with pytest.raises(RoutingError, match=NOTHING_SET):
        state.begin(None)


def test_an_adapter_with_one_branch_for_all_needs_no_layout():
    RoutingState().begin(None)


def test_adapters_of_one_model_are_each_routed_by_their_own_rule():
    state = state_of(Rule(), Rule("input"))
    state.set(MIXED)
    size = torch.Size((1, 10, 8))
    assert state.of("adapter 0", size).image.tolist() == [1, 2, 3, 4, 5, 6]
    assert state.of("adapter 1", size).image.tolist() == [2, 3, 4, 5, 6, 7]


def test_text_only_stands_for_the_layout_of_a_text_of_any_size():
    state = state_of()
    with state.text_only():
        for shape in ((1, 4, 8), (2, 3, 8)):
            state.begin(None)
            routes = state.of("adapter 0", torch.Size(shape))
            assert routes.all_text and routes.shape == shape[:2] and not len(routes.image)
        state.begin(MIXED)  # a layout that is given counts, once
        assert len(state.of("adapter 0", torch.Size((1, 10, 8))).image) == 6
        state.begin(None)
        assert state.of("adapter 0", torch.Size((1, 10, 8))).all_text
    with pytest.raises(RoutingError, match=NOTHING_SET):
        state.begin(None)
    with pytest.raises(RoutingError, match=NOTHING_SET):
        state.of("adapter 0", torch.Size((1, 10, 8)))


def test_text_only_forgets_a_layout_that_was_set_for_a_forward_that_never_came():
    state = state_of()
    state.set(MIXED)
    with state.text_only():
        state.begin(None)
        assert state.of("adapter 0", torch.Size((1, 10, 8))).all_text


def test_text_only_routes_lie_where_the_input_does():
    state = state_of()
    meta = torch.device("meta")
    with state.text_only():
        state.begin(None)
        routes = state.of("adapter 0", torch.Size((1, 4, 8)), meta)
    assert routes.text.device == routes.image.device == meta


def test_a_layout_on_another_device_than_the_input_is_refused():
    state = state_of()
    state.set(MIXED)
    with pytest.raises(RoutingError, match="the layout is on cpu, the model's input on meta"):
        state.of("adapter 0", torch.Size((1, 10, 8)), torch.device("meta"))


def test_text_only_ends_also_when_it_fails():
    state = state_of()
    with pytest.raises(ZeroDivisionError), state.text_only():
        raise ZeroDivisionError
    with pytest.raises(RoutingError, match=NOTHING_SET):
        state.begin(None)


def test_layers_run_again_in_backward_find_the_routes_of_their_own_forward():
    state, seen = state_of(), []

    def layer(x: Tensor) -> Tensor:
        seen.append(len(state.of("adapter 0", x.shape).image))
        return x.sin()

    outs = []
    for layout in (MIXED, TEXT_4, MIXED[:2]):
        state.begin(layout)
        x = torch.zeros(*layout.shape, 8, requires_grad=True)
        outs.append(checkpoint(layer, x, use_reentrant=False, context_fn=state.checkpoint_context).sum())
    assert seen == [6, 0, 1]
    sum(outs).backward()
    assert sorted(seen[3:]) == [0, 1, 6]
    assert len(state.of("adapter 0", torch.Size((1, 2, 8))).image) == 1, "the last forward's routes are back"


def test_a_copy_knows_the_rules_and_no_layout():
    state = state_of(Rule("input"))
    state.set(MIXED)
    other = copy.deepcopy(state)
    with pytest.raises(RoutingError, match=NOTHING_SET):
        other.begin(None)
    other.begin(MIXED)
    assert other.of("adapter 0", torch.Size((1, 10, 8))).image.tolist() == [2, 3, 4, 5, 6, 7]
    other.begin(lay_out([[TextSpan(10)]]))
    assert len(state.of("adapter 0", torch.Size((1, 10, 8))).image) == 6, "the original keeps its own"


@pytest.mark.parametrize(
    "kinds,only", [("tt", "text"), ("pp", "image"), ("tp", None), ("tn", None), ("pn", None), ("nn", None)]
)
def test_a_step_knows_when_all_rows_take_one_branch(kinds, only):
    spans = {"t": [TextSpan(1)], "p": [ImageSpan(1, 1)], "n": []}
    layout = lay_out([spans[kind] for kind in kinds], length=1)
    step = route_step(layout, torch.arange(2), RingCache(2, 1), Rule("input"))
    assert (step.only, step.is_text.tolist()) == (only, [kind == "t" for kind in kinds])


def test_cached_decoding_feeds_one_position_per_row():
    with pytest.raises(RoutingError, match="one position per row, got 10"):
        state_of().set(MIXED, RingCache(1, 3))


def test_a_picture_wider_than_the_rings_is_refused():
    state, now = state_of(Rule("input")), lay_out([[TextSpan(1)], [ImageSpan(1, 5, present=1)]])
    state.set(now, RingCache(2, 5))
    with pytest.raises(RoutingError, match="row 1 writes a picture of 5 columns, the rings hold 4"):
        state.set(now, RingCache(2, 4))


@pytest.mark.parametrize("window", [Window.of(2), Window.of(4), Window.of(3, "raster")], ids=lambda w: w.name)
def test_a_ring_is_as_long_as_its_window_reaches_and_no_longer(window):
    """Every patch that a new one will be read by has a place of its own until it is written."""
    columns, rings = 5, RingCache(1, 5)
    ahead = {up * columns + left for up, left in window.taps}
    assert rings.size(window) == max(ahead) + 1
    assert rings.ring("layer", window, torch.zeros(1, 1), 3).shape == (max(ahead) + 2, 3)


def test_rings_reset_and_reorder_by_slot():
    rings, window = RingCache(3, columns=2), Window.of(2)
    size = rings.size(window)
    ring = rings.ring("layer", window, torch.zeros(1, 1), 2)
    for slot in range(3):
        ring[slot * size : (slot + 1) * size] = slot + 1.0

    def held() -> list[float]:
        again = rings.ring("layer", window, torch.zeros(1, 1), 2)
        assert not again[-1].any()
        return [again[slot * size : (slot + 1) * size].mean().item() for slot in range(3)]

    rings.reorder(torch.tensor([2, 2, 0]))
    assert held() == [3, 3, 1]
    rings.reset([1])
    assert held() == [3, 0, 1]
    rings.reset([])
    assert held() == [3, 0, 1]
    assert rings.nbytes == ring.nbytes
