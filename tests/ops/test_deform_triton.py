"""The kernels: in triton's interpreter on a CPU, compiled for absent GPUs, and on a present one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import weft.ops.deform_attn as ops
from tests.ops.interpret_deform_triton import gradients, with_leaves
from tests.ops.test_deform_attn import SIZES, Case, make_case
from weft.errors import UsageError

needs_triton = pytest.mark.skipif(not ops.HAS_TRITON, reason="triton is not installed: pip install 'weft[triton]'")
PYRAMID = ((32, 32), (16, 16), (8, 8))


@pytest.mark.slow
@needs_triton
def test_the_kernels_in_the_interpreter():
    file = Path(__file__).with_name("interpret_deform_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "target, dtype, fixed",
    [(("cuda", 80, 32), torch.float32, False), (("cuda", 90, 32), torch.bfloat16, False),
     (("cuda", 90, 32), torch.float16, True), (("hip", "gfx942", 64), torch.bfloat16, False)],
    ids=str,
)  # fmt: skip
def test_the_kernels_compile_for_a_device_that_is_not_here(target, dtype, fixed, monkeypatch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from weft.ops.deform_attn import triton as kernels

    class Absent:
        def get_current_target(self):
            return GPUTarget(*target)

        def get_current_device(self):
            return str(target)

        def get_current_stream(self, device):
            return 0

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    value, out = (torch.empty(1, *shape, 2, 64, dtype=dtype) for shape in ((2, 1344), (3,)))
    points, weights, pictures = (
        torch.empty(1, 3, 2, 2, 1, 8, 2),
        out.new_empty(1, 3, 2, 2, 3, 8),
        torch.zeros(1, 3, 2).long(),
    )
    inputs = (value, points, weights, pictures, tuple(side for shape in PYRAMID for side in shape))
    sums = torch.empty(value.shape, dtype=torch.int64 if fixed else torch.float32)
    sizes = kernels._sizes(value, points, weights)
    monkeypatch.setattr(driver, "_active", Absent())
    forward = kernels._forward.warmup(out, *inputs, grid=(1,), **sizes)
    backward = kernels._backward.warmup(
        sums, points, weights, out, torch.ones(()), *inputs, grid=(1,), **sizes, FIXED=fixed
    )
    if target[0] == "cuda":
        assert "ld.global.v4" in forward.asm["ptx"]  # rows are read 16 bytes at a time
        assert ("add.u64" in backward.asm["ptx"]) == fixed
        assert (".add.v4.f32" in backward.asm["ptx"]) == (target[1] >= 90 and not fixed)


def test_where_triton_is_missing_what_to_install_is_said(monkeypatch):
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    with pytest.raises(UsageError, match=r"weft\[triton\]"):
        make_case(SIZES[0]).run("triton")


def test_on_a_cpu_the_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(ops, "HAS_TRITON", True)
    with pytest.raises(UsageError, match="'triton' on cpu"):
        make_case(SIZES[0]).run("triton")


def test_on_a_gpu_the_kernels_are_chosen_where_triton_is(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "HAS_TRITON", True)
    for form in ops.IMPLS:
        monkeypatch.setitem(ops.IMPLS, form, lambda *_, form=form: asked.append(form))
    case = make_case((1, 9, 2, 2, 2, 2, 3, ((4, 4), (2, 2)), 1))
    with FakeTensorMode():
        Case(*(torch.empty(of.shape, device="cuda") if isinstance(of, Tensor) else of for of in case)).run("auto")
    assert asked == ["triton"]


@pytest.mark.gpu
@pytest.mark.skipif(not (ops.HAS_TRITON and torch.cuda.is_available()), reason="needs triton and a CUDA device")
@pytest.mark.parametrize(
    "dtype, rtol, atol",
    # float32: sums of some 100 to 10,000 products near 1; halves: the results are rounded once, here and there
    [(torch.float64, 0, 1e-9), (torch.float32, 1e-4, 1e-3), (torch.bfloat16, 8e-3, 1e-2), (torch.float16, 1e-3, 1e-2)],
    ids=str,
)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    "size", [*SIZES, (2, 300, 4, 4, 3, 8, 64, PYRAMID, 1), (1, 77, 3, 2, 2, 5, 80, PYRAMID, 3)], ids=str
)
def test_gpu_sums_and_gradients_are_the_reference_s(size, fixed, dtype, rtol, atol):
    drawn = make_case(size)
    # no point between two cells, where the gradient jumps and the last bit decides; exact in float32
    points = ((drawn.points * 512).round() + 0.5) / 512
    drawn = drawn._replace(value=drawn.value.to(dtype), points=points.to(dtype), weights=drawn.weights.to(dtype))
    case = Case(*(of.detach().cuda() if isinstance(of, Tensor) else of for of in drawn))
    case = with_leaves(case, value=case.value, points=case.points, weights=case.weights)
    wanted = gradients(case, "reference")
    torch.use_deterministic_algorithms(fixed)
    try:
        first, again = gradients(case, "triton"), gradients(case, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip(first, wanted, again, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
        assert a.equal(c) or not fixed
