"""The kernels against the reference, in triton's interpreter on a CPU.

`test_deform_triton.py` runs this in a process of its own: the interpreter has to be asked for before triton is
imported.
"""

import math

import pytest
import torch
from torch import Tensor

import weft.ops.deform_attn as ops
from tests.ops.test_deform_attn import SIZES, Case, make_case


def gradients(case: Case, form: str, seed: int = 0) -> tuple[Tensor, ...]:
    """The sum and what comes back to value, points and weights, for a random gradient."""
    out = case.run(form)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out)
    return out, *torch.autograd.grad(out, case.learnt, weight, materialize_grads=True)


def with_leaves(case: Case, **changes: Tensor) -> Case:
    return case._replace(**{name: tensor.detach().requires_grad_() for name, tensor in changes.items()})


def assert_alike(case: Case, rtol: float = 0, atol: float = 1e-12) -> None:
    """Sums of fewer than 100 products of numbers near 1 are exact to about 1e-14 in float64, in whatever order."""
    names = ("out", "value", "points", "weights")
    for name, a, b in zip(names, gradients(case, "triton"), gradients(case, "reference"), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "size",
    [SIZES[0], (2, 2, 1, 3, 2, 2, 3, ((3, 5), (2, 2)), 2), (1, 1, 3, 2, 2, 1, 2, ((5, 1), (1, 4), (2, 3)), 1)],
    ids=str,
)
def test_sums_and_gradients_are_the_reference_s(size):
    assert_alike(make_case(size, seed=1))


def test_more_samples_than_fit_at_once_and_channels_of_no_power_of_two(monkeypatch):
    monkeypatch.setattr("weft.ops.deform_attn.triton.TILE", 32)  # 2 of 3 samples of 9 channels
    assert_alike(make_case((1, 1, 1, 1, 1, 3, 9, ((2, 3), (1, 1), (4, 1)), 3)))
    assert_alike(make_case((1, 1, 1, 1, 1, 3, 9, ((2, 3), (1, 1)), 1)))


@pytest.mark.parametrize("far", [-0.3, 1.4, 1e6, -1e30, math.inf, -math.inf])
def test_points_outside_read_nothing_and_nothing_comes_back(far):
    case = make_case((1, 1, 1, 1, 1, 2, 3, ((3, 2),), 1))._replace(pictures=torch.zeros(1, 1, 1, dtype=torch.int64))
    points = case.points.detach().clone()
    points[..., 0, 0] = far
    out, dvalue, dpoints, dweights = gradients(with_leaves(case, points=points), "triton")
    points[..., 0, 0] = -0.3
    inside = with_leaves(case, points=points)
    for a, b in zip((out, dvalue, dpoints, dweights), gradients(inside, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not dpoints[..., 0, :].any()
    assert not dweights[..., 0].any()


@pytest.mark.parametrize(
    "size",
    [(2, 0, 2, 2, 2, 1, 3, ((2, 2),), 1), (1, 2, 1, 3, 0, 1, 2, ((2, 2),), 1), (1, 2, 1, 0, 0, 1, 2, ((2, 2),), 1),
     (1, 2, 1, 2, 2, 1, 0, ((2, 2),), 1), (0, 2, 1, 2, 2, 1, 2, ((2, 2),), 1)],
    ids=["no query", "none listed", "no picture", "no channel", "no sequence"],
)  # fmt: skip
def test_without_anything_to_sum_all_is_zero(size):
    case = make_case(size)
    out, *back = gradients(case, "triton")
    assert out.shape == (*case.weights.shape[:3], size[6])
    assert [g.shape for g in back] == [of.shape for of in case.learnt]
    assert not any(of.any() for of in (out, *back))


def test_a_place_without_picture_counts_nothing_whatever_stands_there(deterministic):
    case = make_case((1, 3, 1, 2, 2, 1, 1, ((2, 3),), 1), seed=1)
    empty = (case.pictures < 0)[:, :, None, :, None, None]
    assert 0 < empty.sum() < empty.numel()
    spoilt = with_leaves(
        case,
        points=case.points.detach().masked_fill(empty.unsqueeze(-1), math.nan),
        weights=case.weights.detach().masked_fill(empty, math.nan),
    )
    for a, b in zip(gradients(spoilt, "triton"), gradients(case, "triton"), strict=True):
        assert a.equal(b)


def test_a_point_that_is_not_a_number_spoils_its_own_query_and_no_value():
    case = make_case((1, 3, 1, 1, 1, 1, 2, ((3, 3),), 1))._replace(pictures=torch.zeros(1, 3, 1, dtype=torch.int64))
    points = case.points.detach().clone()
    points[0, 1, ..., 0] = math.nan
    out, dvalue, dpoints, dweights = gradients(with_leaves(case, points=points), "triton")
    for of in (out, dpoints, dweights):
        assert of[0, [0, 2]].isfinite().all()
        assert of[0, 1].isnan().any()
    assert dvalue.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype):
    case = make_case((1, 2, 1, 2, 2, 4, 5, ((6, 4), (2, 2)), 1), dtype=dtype)
    wide = with_leaves(case, value=case.value.float(), points=case.points.float(), weights=case.weights.float())
    out = case.run("triton")
    narrow = torch.autograd.grad(out, case.learnt, torch.ones_like(out))
    wanted = wide.run("triton")
    for a, b in zip((out, *narrow), (wanted, *torch.autograd.grad(wanted.sum(), wide.learnt)), strict=True):
        assert a.dtype == dtype
        # the interpreter cuts a bfloat16 off where a device rounds it: one step
        step = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(a, b.to(dtype), rtol=step, atol=0)


def test_values_and_points_may_differ_in_precision_and_lie_anywhere_in_memory():
    case = make_case((1, 2, 2, 2, 2, 2, 3, ((3, 2), (2, 2)), 2), dtype=torch.float32)
    moved = with_leaves(
        case,
        value=case.value.detach().bfloat16().transpose(2, 4).contiguous().transpose(2, 4),
        points=case.points.detach().transpose(0, 5).contiguous().transpose(0, 5),
        weights=case.weights.detach().transpose(1, 3).contiguous().transpose(1, 3),
    )
    assert not any(of.is_contiguous() for of in moved.learnt)
    # out and dvalue are rounded to bfloat16, here as there
    assert_alike(moved, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


def test_deterministic_sums_are_the_reference_s(deterministic):
    assert_alike(make_case((2, 2, 1, 3, 2, 2, 3, ((3, 5),), 1), seed=2))


def test_deterministic_sums_do_not_depend_on_the_order_of_the_queries(deterministic):
    case = make_case((1, 5, 1, 1, 1, 4, 2, ((2, 2),), 1), dtype=torch.float32)
    case = case._replace(pictures=torch.zeros(1, 5, 1, dtype=torch.int64))
    turned = with_leaves(case, points=case.points.flip(1), weights=case.weights.flip(1))
    weight = torch.randn(1, 5, 1, 2, generator=torch.Generator().manual_seed(0))

    def dvalues() -> list[Tensor]:
        pairs = ((case, weight), (turned, weight.flip(1)))
        return [torch.autograd.grad(c.run("triton"), c.value, w)[0] for c, w in pairs]

    assert Tensor.equal(*dvalues())
    torch.use_deterministic_algorithms(False)
    assert not Tensor.equal(*dvalues())


@pytest.mark.parametrize("spoilt", [math.inf, math.nan])
def test_deterministic_sums_hide_no_number_that_is_not_finite(spoilt, deterministic):
    case = make_case(SIZES[0])._replace(pictures=torch.zeros(1, 1, 1, dtype=torch.int64))
    out = case.run("triton")
    (dvalue,) = torch.autograd.grad(out, case.value, torch.full_like(out, spoilt))
    assert not dvalue.isfinite().any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_deterministic_sums_keep_their_digits_at_every_size(scale, deterministic):
    case = make_case((1, 3, 1, 1, 1, 2, 2, ((2, 2),), 1), dtype=torch.float32)
    case = case._replace(pictures=torch.zeros(1, 3, 1, dtype=torch.int64))
    got, wanted = (
        torch.autograd.grad(out, case.value, torch.full_like(out, scale))[0] / scale
        for out in (case.run("triton"), case.run("reference"))
    )
    assert wanted.any()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_compiler_sees_one_operation_each_way():
    case = make_case((1, 2, 1, 2, 2, 1, 2, ((2, 3), (1, 1)), 1))
    compiled = torch.compile(
        lambda *case: ops.deform_attn(*case, impl="triton") * 2, backend="aot_eager", fullgraph=True
    )
    got, wanted = compiled(*case), case.run("reference") * 2
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(out.sum(), case.learnt) for out in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_operation_is_what_torch_is_told():
    from weft.ops.deform_attn.triton import _deform_attn

    case = make_case((1, 1, 1, 1, 1, 1, 2, ((2, 2),), 1))
    torch.library.opcheck(_deform_attn, (case.value, [2, 2], case.points, case.weights, case.pictures))
