"""The arithmetic of the branches against definitions written out here, in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from weft.adapters.branches import add_up, conv_step, sam, sam_experts, up_backward
from weft.adapters.rings import RingCache
from weft.adapters.routing import Rule, StepRoutes, route, route_step
from weft.layout import ImageSpan, Modality, TextSpan, lay_out
from weft.ops.causal_conv import reference
from weft.ops.grid import Patches, Window

WINDOWS = [*(Window.of(kernel) for kernel in (1, 2, 3, 4)), Window.of(3, "raster"), Window.of(4, "raster")]
each_window = pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.name)
EXPERTS = {
    "2 and 4": (Window.of(2), Window.of(4)),
    "1 and 3": (Window.of(1), Window.of(3)),
    "raster": (Window.of(2), Window.of(3, "raster"), Window.of(4, "raster")),
}
each_expert = pytest.mark.parametrize("windows", EXPERTS.values(), ids=EXPERTS)
each_gate = pytest.mark.parametrize("gated", [False, True], ids=["added", "gated"])
RANK = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expert_parameters(windows: tuple[Window, ...], gated: bool) -> tuple[Tensor, Tensor | None]:
    return draw(sum(len(w.taps) for w in windows) * RANK, RANK, seed=1), draw(len(windows), RANK) if gated else None


def sam_by_hand(z: Tensor, experts: Tensor, gate: Tensor | None, windows: tuple[Window, ...]) -> Tensor:
    """One picture, (rows, cols, R), patch by patch and tap by tap."""
    kernels, out = iter(experts.view(-1, RANK, RANK)), z.clone()
    by_expert = [[next(kernels) for _ in window.taps] for window in windows]
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            scores = [math.exp(float(g @ z[i, j])) for g in gate] if gate is not None else None
            for e, window in enumerate(windows):
                total = torch.zeros(RANK, dtype=z.dtype)
                for (a, b), kernel in zip(window.taps, by_expert[e], strict=True):
                    if i >= a and 0 <= j - b < z.shape[1]:
                        total += kernel @ z[i - a, j - b]
                gelu = total * (1 + torch.erf(total / math.sqrt(2))) / 2
                out[i, j] += gelu * (scores[e] / sum(scores) if scores else 1)
    return out


@each_gate
@each_expert
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (3, 5)], ids=str)
def test_sam_is_z_and_its_experts(grid, windows, gated):
    rows, cols = grid
    z, (experts, gate) = draw(2 * rows * cols, RANK), expert_parameters(windows, gated)
    got = sam(z, experts, gate, windows, Patches.dense(((grid, 2),), windows))
    pictures = z.view(2, rows, cols, RANK)
    wanted = torch.cat([sam_by_hand(picture, experts, gate, windows).flatten(0, 1) for picture in pictures])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@each_gate
@each_expert
def test_sam_gives_the_gradients_of_its_definition(windows, gated):
    parameters = [draw(6, RANK, seed=2), *(p for p in expert_parameters(windows, gated) if p is not None)]
    patches = Patches.dense((((2, 3), 1),), windows)
    wrapped = lambda z, experts, gate=None: sam(z, experts, gate, windows, patches)  # noqa: E731
    assert torch.autograd.gradcheck(wrapped, [p.requires_grad_() for p in parameters])


@each_gate
@each_expert
def test_sam_never_reads_a_later_patch(windows, gated):
    patches, (experts, gate) = Patches.dense((((3, 4), 1),), windows), expert_parameters(windows, gated)
    z = draw(12, RANK)
    full = sam(z, experts, gate, windows, patches)
    for cut in range(12):
        changed = torch.cat((z[:cut], draw(12 - cut, RANK, seed=9)))
        assert torch.equal(sam(changed, experts, gate, windows, patches)[:cut], full[:cut])


def test_the_weights_of_a_token_gate_add_up_to_one():
    """Several times the same expert, gated in whatever way, are that expert once."""
    window, n = Window.of(2), 3
    patches, z = Patches.dense((((3, 4), 1),), (window,)), draw(12, RANK)
    expert = draw(4 * RANK, RANK, seed=1)
    alone = sam(z, expert, None, (window,), patches)
    gated = sam(z, expert.repeat(n, 1), draw(n, RANK, seed=5), (window,) * n, patches)
    torch.testing.assert_close(gated, alone, rtol=0, atol=1e-12)
    added = sam(z, expert.repeat(n, 1), None, (window,) * n, patches)
    torch.testing.assert_close(added - z, n * (alone - z), rtol=0, atol=1e-12)


# Pictures of several grids, at different places of their sequences at any one time, one after the other in a slot.
SEQUENCES = [
    [TextSpan(1), ImageSpan(3, 4), TextSpan(2), ImageSpan(2, 2), TextSpan(1)],
    [TextSpan(4), ImageSpan(4, 4)],
    [TextSpan(2), ImageSpan(1, 3), ImageSpan(5, 1), TextSpan(1), ImageSpan(4, 2, present=3)],
    [TextSpan(9)],
]
SLOTS, COLUMNS = torch.tensor([4, 0, 2, 1]), 4


class Decoder:
    """Feeds x (B, L, C) position by position to whatever takes one step of all rows."""

    def __init__(self, windows: tuple[Window, ...], *, reset: bool = True) -> None:
        self.layout = lay_out(SEQUENCES)
        self.rings, self.windows, self.reset = RingCache(6, COLUMNS), windows, reset

    def routes(self, t: int) -> StepRoutes:
        now = self.layout[t : t + 1]
        begins = (now.outputs.row == 0) & (now.outputs.col == 0)
        if self.reset:
            self.rings.reset(SLOTS[begins[:, 0]].tolist())
        return route_step(now, SLOTS, self.rings, Rule(), self.windows)

    def run(self, x: Tensor, step) -> Tensor:
        """(B, L, R)"""
        return torch.stack([step(x[:, t], self.routes(t)) for t in range(self.layout.shape[1])], 1)

    @property
    def is_patch(self) -> Tensor:
        return self.layout.outputs.modality == Modality.IMAGE


def decode_conv(decoder: Decoder, x: Tensor, taps: Tensor, window: Window) -> Tensor:
    ring = decoder.rings.ring("layer", window, taps, RANK)
    return decoder.run(x, lambda now, routes: conv_step(now, taps, ring, routes.tables[window.name]))


def whole_pictures(decoder: Decoder, x: Tensor) -> tuple[Tensor, Tensor, Patches]:
    """(flat positions, rows of x, patches) where the unfinished picture is completed by zeros."""
    full = lay_out([[*spans[:-1], ImageSpan(4, 2)] if spans is SEQUENCES[2] else spans for spans in SEQUENCES])
    # the longest sequence is another one: completing adds no position
    assert full.shape[1] == decoder.layout.shape[1]
    routes = route(full, Rule(), decoder.windows)
    shown = decoder.is_patch.flatten()[routes.image].unsqueeze(1)
    return routes.image, x.flatten(0, 1)[routes.image] * shown, routes.patches


@each_window
def test_rings_equal_the_whole_pictures_for_pictures_at_different_places(window):
    decoder, taps = Decoder((window,)), draw(len(window.taps) * RANK, 5)
    x = draw(*decoder.layout.shape, 5, seed=1)
    got = decode_conv(decoder, x, taps, window)
    positions, rows, patches = whole_pictures(decoder, x)
    wanted = x.new_zeros(x[..., 0].numel(), RANK).index_copy(0, positions, reference(rows, taps, window, patches))
    here = decoder.is_patch
    assert here.sum() == 12 + 4 + 16 + 3 + 5 + 4
    torch.testing.assert_close(got[here], wanted.view_as(got)[here], rtol=0, atol=1e-12)


@each_gate
@each_expert
def test_rings_of_experts_equal_the_whole_pictures(windows, gated):
    decoder, (experts, gate) = Decoder(windows), expert_parameters(windows, gated)
    z = draw(*decoder.layout.shape, RANK, seed=1)
    rings = [decoder.rings.ring(e, window, experts, RANK) for e, window in enumerate(windows)]
    got = decoder.run(
        z,
        lambda now, routes: sam_experts(
            now, experts, gate, windows, lambda e, taps, w: conv_step(now, taps, rings[e], routes.tables[w.name])
        ),
    )
    positions, rows, patches = whole_pictures(decoder, z)
    found = sam(rows, experts, gate, windows, patches)
    wanted = z.new_zeros(z[..., 0].numel(), RANK).index_copy(0, positions, found)
    torch.testing.assert_close(got[decoder.is_patch], wanted.view_as(got)[decoder.is_patch], rtol=0, atol=1e-12)


@each_window
@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
def test_rows_that_are_in_no_picture_leave_nothing(window, value):
    taps = draw(len(window.taps) * RANK, 5)
    x = draw(*Decoder(()).layout.shape, 5, seed=1)
    clean = decode_conv(Decoder((window,)), x, taps, window)
    decoder = Decoder((window,))
    here = decoder.is_patch
    dirty = decode_conv(decoder, torch.where(here.unsqueeze(2), x, value), taps, window)
    assert torch.equal(dirty[here], clean[here])
    ring = decoder.rings.ring("layer", window, taps, RANK)
    size = decoder.rings.size(window)
    assert ring.isfinite().all() and not ring[-1].any(), "what has no place is cleared at every step"
    for unused in (1, 3, 5):  # the slot of the sequence without pictures, and slots without a row
        assert not ring[unused * size : (unused + 1) * size].any()


def test_a_slot_must_be_reset_when_a_picture_starts_in_it():
    window = Window.of(3)
    taps, x = draw(9 * RANK, 5), draw(*Decoder(()).layout.shape, 5, seed=1)
    fresh = decode_conv(Decoder((window,)), x, taps, window)
    stale = decode_conv(Decoder((window,), reset=False), x, taps, window)
    here = Decoder(()).is_patch
    first = here & (Decoder(()).layout.outputs.image == 0)
    assert torch.equal(stale[first], fresh[first])
    assert not torch.allclose(stale[here], fresh[here], atol=1e-3)


@each_window
def test_after_reordering_a_row_goes_on_from_the_picture_it_was_given(window):
    """Three beams of one picture; at patch 5 the first and the last go on as copies of the second."""
    spans, cut, order = [[ImageSpan(3, 4)]] * 3, 5, torch.tensor([1, 1, 1])
    layout, taps, x = lay_out(spans), draw(len(window.taps) * RANK, 5), draw(3, 12, 5, seed=1)
    rings, rule = RingCache(3, 4), Rule("input")
    ring = rings.ring("layer", window, taps, RANK)
    got = []
    for t in range(12):
        if t == cut:
            rings.reorder(order)
        tables = route_step(layout[t : t + 1], torch.arange(3), rings, rule, (window,)).tables[window.name]
        got.append(conv_step(x[:, t], taps, ring, tables))
    whole = torch.cat((x[order][:, :cut], x[:, cut:]), 1).flatten(0, 1)
    wanted = reference(whole, taps, window, Patches.dense((((3, 4), 3),))).view(3, 12, RANK)
    torch.testing.assert_close(torch.stack(got, 1)[:, cut:], wanted[:, cut:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("rows", [None, [5, 0, 2]], ids=["everywhere", "at rows"])
def test_the_up_projection_adds_in_place_and_has_the_gradients_of_its_equation(rows, scale):
    index = None if rows is None else torch.tensor(rows)
    out, z, up = draw(6, 4), draw(6 if rows is None else 3, RANK, seed=1), draw(4, RANK, seed=2)
    wanted = out.clone()
    for number, row in enumerate(rows or range(6)):
        wanted[row] += scale * (up @ z[number])
    changed = out.clone()
    add_up(changed, index, z, up, scale)
    torch.testing.assert_close(changed, wanted, rtol=0, atol=1e-12)

    g = draw(6, 4, seed=3)
    z.requires_grad_(), up.requires_grad_()
    update = scale * F.linear(z, up)
    total = (update * (g if index is None else g[index])).sum()
    for got, by_autograd in zip(up_backward(g, index, z, up, scale), torch.autograd.grad(total, (z, up)), strict=True):
        torch.testing.assert_close(got, by_autograd, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [None, [1, 3]], ids=["everywhere", "at rows"])
def test_the_up_projection_keeps_the_dtype_of_the_frozen_layers_output(rows):
    index = None if rows is None else torch.tensor(rows)
    out, z, up = draw(4, 4).bfloat16(), draw(4 if rows is None else 2, RANK).float(), draw(4, RANK).float()
    wanted = out.clone()
    wanted[slice(None) if rows is None else index] += (0.5 * z @ up.T).bfloat16()
    add_up(out, index, z, up, 0.5)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, wanted, rtol=0, atol=2.0**-7 * wanted.abs().max().item())
