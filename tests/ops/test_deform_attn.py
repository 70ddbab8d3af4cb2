"""Deformable attention against a loop over samples, in float64, gradients included.

Sums of fewer than 100 products of numbers near 1 are exact to about 1e-14 in float64, in whatever order.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.errors import UsageError
from weft.ops.deform_attn import IMPLS, deform_attn
from weft.ops.deform_attn.reference import Shapes

VECTOR = Path(__file__).parents[3] / "shared" / "data" / "eval" / "ms_deform_attn" / "small.npz"
FORMS = ("reference", "bags", "rows")
each_form = pytest.mark.parametrize("form", FORMS)


class Case(NamedTuple):
    value: Tensor
    shapes: Shapes
    points: Tensor
    weights: Tensor
    pictures: Tensor

    @property
    def learnt(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.points, self.weights

    def run(self, form: str) -> Tensor:
        return deform_attn(*self, impl=form)


SIZES = [
    # B, Q, H, N, M, K, C, shapes, scales of the points
    (1, 1, 1, 1, 1, 1, 1, ((1, 1),), 1),
    (2, 3, 2, 3, 2, 2, 3, ((3, 5), (2, 2)), 2),
    (2, 2, 3, 2, 2, 1, 2, ((5, 1), (1, 4), (2, 3)), 1),
    (1, 5, 2, 5, 3, 3, 1, ((2, 3),), 1),
]


def make_case(size, seed: int = 0, dtype=torch.float64) -> Case:
    b, q, h, n, m, k, c, shapes, scales = size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    # a third of the points lies outside of the picture
    points = torch.rand(b, q, h, m, scales, k, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    order = torch.rand(b, q, n, generator=generator).argsort(2)[..., :m]
    pictures = torch.where(torch.rand(b, q, m, generator=generator) < 0.3, -1, order)
    return Case(
        draw(b, n, sum(rows * cols for rows, cols in shapes), h, c), shapes, points.to(dtype).requires_grad_(),
        draw(b, q, h, m, len(shapes), k), pictures,
    )  # fmt: skip


def one_sample(maps: Tensor, point: Tensor) -> Tensor:
    """maps (rows, cols, C), a point (x, y) -> (C,)"""
    rows, cols, _ = maps.shape
    x, y = point[0] * cols - 0.5, point[1] * rows - 0.5
    left, top = math.floor(x.item()), math.floor(y.item())
    total = maps.new_zeros(maps.shape[2])
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < rows and 0 <= j < cols:
                total = total + maps[i, j] * (1 - (y - i).abs()) * (1 - (x - j).abs())
    return total


def loop(case: Case) -> Tensor:
    """The sum in the contract, one sample after another."""
    value, shapes, points, weights, pictures = case
    b, q, h, m, s, k = weights.shape
    starts = [sum(rows * cols for rows, cols in shapes[:i]) for i in range(len(shapes))]
    out = {}
    for at in torch.cartesian_prod(*(torch.arange(n) for n in (b, q, h, m, s, k))).view(-1, 6).tolist():
        ib, iq, ih, im, scale, ik = at
        picture = int(pictures[ib, iq, im])
        total = out.setdefault((ib, iq, ih), value.new_zeros(value.shape[4]))
        if picture < 0:
            continue
        rows, cols = shapes[scale]
        maps = value[ib, picture, starts[scale] : starts[scale] + rows * cols, ih].view(rows, cols, -1)
        point = points[ib, iq, ih, im, min(scale, points.shape[4] - 1), ik]
        out[ib, iq, ih] = total + weights[tuple(at)] * one_sample(maps, point)
    return torch.stack(list(out.values())).view(b, q, h, -1)


@each_form
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_form_is_the_sum_over_samples_and_so_are_its_gradients(form, size, seed):
    case = make_case(size, seed)
    got, wanted = case.run(form), loop(case)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    names = ("value", "points", "weights")
    gradients = [
        torch.autograd.grad((out * weight).sum(), case.learnt, materialize_grads=True) if out.requires_grad else None
        for out in (got, wanted)
    ]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    if gradients[1] is None:  # no query reads any picture
        assert not any(g.any() for g in gradients[0])
        return
    for name, a, b in zip(names, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@each_form
@pytest.mark.skipif(not VECTOR.is_file(), reason="../shared/data/eval/ms_deform_attn is not there")
def test_the_published_core_gives_the_same_for_one_picture(form):
    stored = {name: torch.from_numpy(array) for name, array in np.load(VECTOR).items()}
    shapes = tuple((int(rows), int(cols)) for rows, cols in stored["spatial_shapes"])
    # one picture each: an axis of length 1 where ours counts pictures
    value = stored["value"].unsqueeze(1).requires_grad_()
    points, weights = (
        stored[name].unsqueeze(3).requires_grad_() for name in ("sampling_locations", "attention_weights")
    )
    out = deform_attn(value, shapes, points, weights, impl=form).flatten(2)
    torch.testing.assert_close(out, stored["output"], rtol=0, atol=1e-10)
    gradients = torch.autograd.grad(out, (value, points, weights), stored["grad_output"])
    for found, name in zip(gradients, ("value", "sampling_locations", "attention_weights"), strict=True):
        torch.testing.assert_close(
            found.squeeze(1 if name == "value" else 3), stored[f"grad_{name}"], rtol=0, atol=1e-10
        )


@each_form
def test_gradients_are_those_of_finite_differences(form):
    case = make_case(SIZES[1], seed=5)
    _, shapes, _, _, pictures = case
    torch.autograd.gradcheck(lambda v, p, w: deform_attn(v, shapes, p, w, pictures, impl=form), case.learnt)


@each_form
def test_the_centre_of_a_cell_reads_it_and_far_outside_is_nothing(form):
    shapes = ((2, 3),)
    value = torch.arange(1.0, 7.0).view(1, 1, 6, 1, 1)
    inside = [((j + 0.5) / 3, (i + 0.5) / 2) for i in range(2) for j in range(3)]
    outside = [(-0.3, 0.5), (1.3, 0.5), (0.5, -0.6), (0.5, 1.6), (1e6, -1e6), (-math.inf, 0.5), (0.5, math.inf)]
    points = torch.tensor(inside + outside).view(1, -1, 1, 1, 1, 1, 2)
    if form != "bags":  # the others take infinity for no number
        points = points.clamp(-1e6, 1e6)
    found = deform_attn(value, shapes, points, torch.ones(points.shape[:-1]), impl=form).flatten()
    torch.testing.assert_close(found[:6], value.flatten(), rtol=0, atol=1e-5)  # 1 / 3 is not a float
    assert not found[6:].any()


@each_form
def test_half_a_cell_outside_fades_to_nothing(form):
    points = torch.tensor([[0.0, 0.5], [-0.25, 0.5], [-0.5, 0.5], [1.0, 0.5], [1.5, 0.5]]).view(1, 5, 1, 1, 1, 1, 2)
    found = deform_attn(torch.ones(1, 1, 1, 1, 1), ((1, 1),), points, torch.ones(1, 5, 1, 1, 1, 1), impl=form)
    assert found.flatten().tolist() == [0.5, 0.25, 0.0, 0.5, 0.0]


@pytest.mark.parametrize("at_once", [1, 20, 1 << 20])
def test_how_many_heads_are_taken_at_once_changes_nothing(at_once, monkeypatch):
    case = make_case((2, 3, 5, 3, 2, 2, 3, ((3, 5), (2, 2)), 1))
    wanted = torch.autograd.grad(case.run("reference").square().sum(), case.learnt)
    monkeypatch.setattr("weft.ops.deform_attn.bags.SAMPLES_AT_ONCE", at_once)
    for a, b in zip(torch.autograd.grad(case.run("bags").square().sum(), case.learnt), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@each_form
def test_every_picture_in_order_is_the_default(form):
    case = make_case((2, 3, 2, 3, 3, 2, 3, ((3, 5), (2, 2)), 2))
    named = case._replace(pictures=torch.arange(3).expand(2, 3, 3))
    assert deform_attn(*case[:4], impl=form).equal(named.run(form))


@each_form
def test_a_place_without_picture_has_no_gradient_and_no_effect(form):
    case = make_case(SIZES[3], seed=1)
    empty = (case.pictures < 0).nonzero()
    assert 0 < len(empty) < case.pictures.numel()
    out = case.run(form)
    _, dpoints, dweights = torch.autograd.grad(out.square().sum(), case.learnt)
    with torch.no_grad():
        for b, q, m in empty.tolist():
            assert not dpoints[b, q, :, m].any()
            assert not dweights[b, q, :, m].any()
            case.points[b, q, :, m] += 0.1
            case.weights[b, q, :, m] += 1.0
    assert case.run(form).equal(out)


@each_form
@pytest.mark.parametrize("pictures, slots", [(3, 0), (0, 0), (3, 2)], ids=["none listed", "none there", "none read"])
def test_without_pictures_the_sum_is_zero(form, pictures, slots):
    case = make_case((2, 3, 2, pictures, slots, 2, 3, ((3, 5), (2, 2)), 2))
    out = case._replace(pictures=torch.full_like(case.pictures, -1)).run(form)
    assert out.shape == (2, 3, 2, 3)
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), case.learnt, materialize_grads=True))


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_rounded_once(form, dtype):
    case = make_case((1, 3, 2, 3, 3, 4, 5, ((6, 4), (2, 2)), 2), dtype=dtype)
    wide = Case(
        *(t.detach().float().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in case)
    )
    out, wanted = case.run(form), wide.run(form)
    assert out.equal(wanted.to(dtype))
    weight = torch.ones_like(out)
    got = torch.autograd.grad(out, case.learnt, weight)
    for a, b in zip(got, torch.autograd.grad(wanted, wide.learnt, weight.float()), strict=True):
        assert a.dtype == dtype
        # points of several scales are added up, and rounded, one by one
        torch.testing.assert_close(a.float(), b, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


def test_values_and_points_may_differ_in_precision():
    case = make_case(SIZES[1], dtype=torch.float32)
    mixed = case._replace(value=case.value.detach().bfloat16().requires_grad_())
    out = mixed.run("bags")
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(out.sum(), mixed.learnt)] == [torch.bfloat16] + [torch.float32] * 2


@each_form
def test_a_point_that_is_not_a_number_spoils_its_own_query_only(form):
    case = make_case((1, 3, 1, 1, 1, 2, 2, ((3, 3),), 1))._replace(pictures=torch.zeros(1, 3, 1, dtype=torch.int64))
    with torch.no_grad():
        case.points[0, 1, 0, 0, 0, 0, 0] = math.nan
    out = case.run(form)
    assert out[0, [0, 2]].isfinite().all()
    if form != "reference":  # grid_sample takes it for a point outside
        assert out[0, 1].isnan().all()


@pytest.mark.parametrize(
    "wrong, named",
    [
        (lambda c: c._replace(shapes=((3, 5), (2, 3))), "value, axis 2"),
        (lambda c: c._replace(shapes=((19, 1),)), "weights"),
        (lambda c: c._replace(weights=c.weights[:, :2]), "points"),
        (lambda c: c._replace(points=c.points[..., :1]), "points"),
        (lambda c: c._replace(pictures=c.pictures[:, :, :1]), "pictures"),
        (lambda c: c._replace(value=c.value[0]), "takes value"),
    ],
)
def test_sizes_that_disagree_are_named(wrong, named):
    with pytest.raises(UsageError, match=named):
        wrong(make_case(SIZES[1])).run("auto")


def test_a_form_that_cannot_run_here_is_refused():
    case = make_case(SIZES[1])
    with pytest.raises(UsageError, match="triton"):
        case.run("triton")
    on_meta = Case(*(t.to("meta") if isinstance(t, Tensor) else t for t in case))
    with pytest.raises(UsageError, match="meta"):
        on_meta.run("bags")


@pytest.mark.parametrize("queries, wanted", [(1, "rows"), (9, "bags")])
def test_few_samples_are_read_straight_from_the_values(queries, wanted, monkeypatch):
    case = make_case((1, queries, 2, 2, 2, 2, 3, ((4, 4), (2, 2)), 1))
    asked = []
    for form in ("bags", "rows", "reference"):
        monkeypatch.setitem(IMPLS, form, lambda *_, form=form: asked.append(form))
    case.run("auto")
    assert asked == [wanted]
