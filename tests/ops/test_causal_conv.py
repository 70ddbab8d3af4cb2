"""All forms of the causal convolution against its definition, in float64, gradients included.

Sums of fewer than 200 products of numbers near 1 are exact to about 1e-14 in float64, in whatever order.
"""

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from weft.ops.causal_conv import FORMS, causal_conv, choose, reference, use_form
from weft.ops.grid import Patches, Window

WINDOWS = [*(Window.of(kernel) for kernel in (1, 2, 3, 4)), Window.of(3, "raster"), Window.of(4, "raster")]
FAST = ("conv2d", "shifts", "table")
LAYOUTS = 504
each_window = pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.name)
each_form = pytest.mark.parametrize("form", FAST)


class Case(NamedTuple):
    x: Tensor
    taps: Tensor
    patches: Patches
    weight: Tensor
    """(n, R): what the outputs are summed with, so that every one has a gradient of its own."""


def make_case(groups, window: Window, seed: int = 0, *, channels: int = 5, rank: int = 3) -> Case:
    generator = torch.Generator().manual_seed(seed)
    n = sum(rows * cols * pictures for (rows, cols), pictures in groups)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, taps = draw(n, channels).requires_grad_(), draw(len(window.taps) * rank, channels).requires_grad_()
    return Case(x, taps, Patches.dense(groups, (window,)), draw(n, rank))


def random_groups(rng: random.Random) -> tuple[tuple[tuple[int, int], int], ...]:
    """One to three grids, strips among them, each of one to three pictures."""
    side = lambda: rng.randint(1, 5)  # noqa: E731
    return tuple(
        (rng.choice([(side(), side()), (1, side()), (side(), 1)]), rng.randint(1, 3)) for _ in range(rng.randint(1, 3))
    )


def with_gradients(z: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return (z, *torch.autograd.grad((z * case.weight).sum(), (case.x, case.taps)))


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], what: str) -> None:
    for name, a, b in zip(("z", "dx", "dtaps"), got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{what}, {name}: {m}")


@each_window
def test_all_forms_agree_with_the_definition_over_random_layouts(window):
    rng = random.Random(window.name)
    forms = (*FAST, "linear") if len(window.taps) == 1 else FAST
    for seed in range(LAYOUTS // len(WINDOWS)):
        groups = random_groups(rng)
        case = make_case(groups, window, seed)
        wanted = with_gradients(reference(case.x, case.taps, window, case.patches), case)
        for form in forms:
            by_hand = causal_conv(case.x, case.taps, window, case.patches, form)
            by_autograd = FORMS[form].forward(case.x, case.taps, window, case.patches)
            assert_same(with_gradients(by_hand, case), wanted, f"{form}, own backward, {groups}")
            assert_same(with_gradients(by_autograd, case), wanted, f"{form}, autograd, {groups}")


def test_the_definition_is_the_papers_sum():
    """Element by element, indices written out; the only thing that the definition itself is held against."""
    window, rows, cols = Window.of(2), 3, 4
    case = make_case((((rows, cols), 1),), window)
    x, taps = case.x.detach().view(rows, cols, -1), case.taps.detach().view(2, 2, 3, -1)
    z = torch.zeros(rows, cols, 3, dtype=torch.float64)
    for i in range(rows):
        for j in range(cols):
            for a in range(2):
                for b in range(2):
                    if i >= a and j >= b:
                        z[i, j] += taps[a, b] @ x[i - a, j - b]
    torch.testing.assert_close(reference(case.x, case.taps, window, case.patches), z.view(-1, 3), rtol=0, atol=1e-12)


@each_window
def test_stock_convolution_has_each_tap_where_the_paper_puts_it(window):
    """As a cross-correlation: weight[:, :, up - a, left - b] = K[a, b]."""
    case = make_case((((4, 3), 2),), window)
    weight = torch.zeros(3, 5, window.up + 1, window.left + 1 + window.right, dtype=torch.float64)
    for (a, b), tap in zip(window.taps, case.taps.detach().view(-1, 3, 5), strict=True):
        weight[:, :, window.up - a, window.left - b] = tap
    maps = case.x.detach().view(2, 4, 3, 5).permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(maps, (window.left, window.right, window.up, 0))
    z = torch.nn.functional.conv2d(padded, weight).permute(0, 2, 3, 1).reshape(-1, 3)
    torch.testing.assert_close(reference(case.x, case.taps, window, case.patches), z, rtol=0, atol=1e-12)


@each_window
@each_form
@pytest.mark.parametrize("grid", [(1, 5), (5, 1), (3, 4)], ids=str)
def test_a_patch_reaches_its_window_and_no_other_picture(grid, form, window):
    case = make_case(((grid, 2),), window)
    (rows, cols), x = grid, case.x.detach()
    full = causal_conv(x, case.taps, window, case.patches, form)
    for changed in range(len(x)):
        other = x.clone()
        other[changed] += 1
        moved = (causal_conv(other, case.taps, window, case.patches, form) - full).abs().amax(1) > 1e-9
        picture, place = divmod(changed, rows * cols)
        row, col = divmod(place, cols)
        reached = {(row + a, col + b) for a, b in window.taps if row + a < rows and 0 <= col + b < cols}
        assert moved.nonzero().squeeze(1).tolist() == sorted(picture * rows * cols + i * cols + j for i, j in reached)


@each_window
def test_unfinished_pictures_are_whole_ones_whose_missing_patches_are_zero(window):
    rng = random.Random(window.name)
    for seed in range(30):
        grids = [(rng.randint(1, 4), rng.randint(1, 4)) for _ in range(rng.randint(1, 4))]
        present = [rng.randint(1, rows * cols) for rows, cols in grids]
        whole = make_case(tuple((grid, 1) for grid in grids), window, seed)
        shown = torch.cat([torch.arange(r * c) < n for (r, c), n in zip(grids, present, strict=True)]).unsqueeze(1)
        z = reference(whole.x * shown, whole.taps, window, whole.patches)
        wanted = with_gradients(z * shown, whole)

        kept = shown.squeeze(1)
        place = torch.cat([torch.arange(n) for n in present])
        grid = torch.cat([torch.tensor([g]).expand(n, 2) for g, n in zip(grids, present, strict=True)])
        ragged = Patches.of((), torch.arange(len(place)) - place, place, grid, (window,))
        case = whole._replace(x=whole.x.detach()[kept].requires_grad_(), patches=ragged, weight=whole.weight[kept])
        form = choose(case.x, case.taps, window, ragged)
        assert form == ("linear" if len(window.taps) == 1 else "table"), "the others know whole pictures only"
        got = with_gradients(causal_conv(case.x, case.taps, window, ragged), case)
        assert_same(got, (wanted[0][kept], wanted[1][kept], wanted[2]), f"{grids}, {present}")
        assert not wanted[1][~kept].any()


@each_window
def test_no_patch_at_all_gives_nothing_and_a_zero_gradient(window):
    case, none = make_case((((1, 1), 1),), window), torch.empty(0, dtype=torch.int64)
    patches = Patches.of((), none, none, none.view(0, 1).expand(0, 2), (window,))
    case = case._replace(x=case.x.detach()[:0].requires_grad_(), patches=patches, weight=case.weight[:0])
    z, dx, dtaps = with_gradients(causal_conv(case.x, case.taps, window, patches), case)
    assert z.shape == (0, 3) and dx.shape == (0, 5)
    assert dtaps.shape == case.taps.shape and not dtaps.any()


@each_window
@each_form
def test_between_forward_and_backward_only_x_and_the_taps_are_kept(form, window):
    case, kept = make_case((((3, 4), 2),), window), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = causal_conv(case.x, case.taps, window, case.patches, form)
    assert not any(isinstance(value, Tensor) for value in vars(z.grad_fn).values()), "nor past autograd's own list"
    assert sum(tensor.nbytes for tensor in kept) == case.x.nbytes + case.taps.nbytes
    assert {tensor.data_ptr() for tensor in kept} == {case.x.data_ptr(), case.taps.data_ptr()}


@each_form
def test_in_float32_a_form_is_as_near_as_float32_is(form):
    window = Window.of(3)
    case = make_case((((4, 4), 2),), window, channels=64)
    single = causal_conv(case.x.float(), case.taps.float(), window, case.patches, form)
    assert single.dtype is torch.float32
    wanted = reference(case.x, case.taps, window, case.patches)
    # sums of 9 * 64 products, each near 1: 24 ulp of the largest sums
    torch.testing.assert_close(single.double(), wanted, rtol=0, atol=24 * 2.0**-23 * wanted.abs().max().item())


def test_a_window_of_one_patch_is_the_plain_product_bit_for_bit():
    case = make_case((((3, 3), 2),), Window.of(1))
    x, taps = case.x.detach().float(), case.taps.detach().float()
    got = causal_conv(x, taps, Window.of(1), case.patches)
    assert torch.equal(got, torch.nn.functional.linear(x, taps))


def chosen(case: Case, window: Window) -> str:
    return choose(case.x, case.taps, window, case.patches)


def test_a_form_can_be_forced_for_a_while():
    window = Window.of(2)
    case = make_case((((2, 2), 1),), window)
    usual = chosen(case, window)
    with use_form("conv2d"):
        assert chosen(case, window) == "conv2d"
        with use_form("table"):
            assert chosen(case, window) == "table"
        assert chosen(case, window) == "conv2d"
    assert chosen(case, window) == usual
    with pytest.raises(ZeroDivisionError), use_form("table"):
        raise ZeroDivisionError
    assert chosen(case, window) == usual, "also where the block fails"


@each_form
def test_forcing_a_form_never_makes_it_do_what_it_cannot(form):
    window, place = Window.of(2), torch.arange(3)
    unfinished = Patches.of((), torch.zeros_like(place), place, torch.tensor([[2, 2]]).expand(3, 2), (window,))
    case = make_case((((1, 3), 1),), window)._replace(patches=unfinished)
    with use_form(form):
        assert chosen(case, window) == "table"
        assert chosen(make_case((((2, 2), 1),), Window.of(1)), Window.of(1)) == "linear"


@pytest.mark.parametrize("channels", [8, 512, 1024])
@each_window
def test_what_is_chosen_depends_on_sizes_alone_and_is_what_runs(window, channels):
    groups = (((2, 3), 2),)
    one, other = (make_case(groups, window, seed, channels=channels) for seed in (0, 1))
    x, taps = one.x.detach().float(), one.taps.detach().float()
    name = choose(x, taps, window, one.patches)
    assert name == choose(other.x.detach().float(), other.taps.detach().float(), window, other.patches)
    assert torch.equal(causal_conv(x, taps, window, one.patches), FORMS[name].forward(x, taps, window, one.patches))
