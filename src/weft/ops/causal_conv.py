"""Convolution over picture patches that reads only earlier ones, in exact forms of different speed.

    z[i, j] = sum over taps t = (a, b) of K[t] x[i - a, j - b]          x zero outside the picture

    x (n, C), the rows of `Patches`; taps (T * R, C), tap-major, the patch itself first; z (n, R)

    reference   the definition, tap by tap
    linear      the plain product, where the window is the patch itself
    conv2d      torch's convolution on each group of equal grids, channels last
    shifts      one product with all taps, then R-wide blocks shifted over the grid and added
    table       the same product, then blocks gathered by a table of neighbours: ragged and unfinished pictures too

Each form is a pair: `forward` out of differentiable operations, and `backward` from x alone, so that nothing C-wide is
kept but x. Source: Xu et al. 2024 (arXiv:2407.03604), section 3; windows are in `grid.py`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.ops.grid import Patches, Window

FormName = Literal["linear", "conv2d", "shifts", "table"]


class Form(NamedTuple):
    forward: Callable[[Tensor, Tensor, Window, Patches], Tensor]
    """x (n, C), taps (T * R, C) -> z (n, R)"""
    backward: Callable[[Tensor, Tensor, Tensor, Window, Patches], tuple[Tensor, Tensor]]
    """x (n, C), taps, dz (n, R) -> dx (n, C), dtaps"""


def causal_conv(x: Tensor, taps: Tensor, window: Window, patches: Patches, form: FormName | None = None) -> Tensor:
    """z (n, R) in the chosen form; between forward and backward only x and taps are kept."""
    name = form or choose(x, taps, window, patches)
    if torch.compiler.is_compiling():  # the compiler decides itself what to keep
        return FORMS[name].forward(x, taps, window, patches)
    return cast(Tensor, _CausalConv.apply(x, taps, window, patches, name))


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, window: Window, patches: Patches, name: FormName) -> Tensor:
        ctx.save_for_backward(x, taps)
        ctx.window, ctx.patches, ctx.name = window, patches, name
        return FORMS[name].forward(x, taps, window, patches)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, taps = ctx.saved_tensors
        dx, dtaps = FORMS[ctx.name].backward(x, taps, dz, ctx.window, ctx.patches)
        return dx, dtaps, None, None, None


def reference(x: Tensor, taps: Tensor, window: Window, patches: Patches) -> Tensor:
    """The definition, picture by picture and tap by tap; whole pictures only."""
    kernels = taps.view(len(window.taps), -1, taps.shape[1])
    done = []
    for (rows, cols), pictures in _images(x, patches):
        z = pictures.new_zeros(len(pictures), rows, cols, kernels.shape[1])
        for (a, b), kernel in zip(window.taps, kernels, strict=True):
            for i in range(a, rows):
                for j in range(max(b, 0), cols + min(b, 0)):
                    z[:, i, j] += pictures[:, i - a, j - b] @ kernel.T
        done.append(z.flatten(0, 2))
    return torch.cat(done)


def _images(x: Tensor, patches: Patches) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The rows group by group, as (M, rows, cols, ...)."""
    at = 0
    for (rows, cols), count in patches.groups:
        end = at + count * rows * cols
        yield (rows, cols), x[at:end].view(count, rows, cols, *x.shape[1:])
        at = end


def _conv2d(x: Tensor, taps: Tensor, window: Window, patches: Patches) -> Tensor:
    weight = _conv2d_weight(taps, window)
    done = [_crop(F.conv2d(_pad(pictures, window), weight), grid) for grid, pictures in _images(x, patches)]
    return done[0] if len(done) == 1 else torch.cat(done)


def _conv2d_backward(x: Tensor, taps: Tensor, dz: Tensor, window: Window, patches: Patches) -> tuple[Tensor, Tensor]:
    weight = _conv2d_weight(taps, window)
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
    for (grid, pictures), (_, out), (_, into) in zip(
        _images(x, patches), _images(dz, patches), _images(dx, patches), strict=True
    ):
        padded, cols = _pad(pictures, window), grid[1]
        dpadded, dw, _ = torch.ops.aten.convolution_backward(
            out.permute(0, 3, 1, 2), padded, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
            [True, True, False],
        )  # fmt: skip
        dweight += dw
        into.copy_(dpadded[:, :, window.up :, window.left : window.left + cols].permute(0, 2, 3, 1))
    # every tap's place in the kernel, as in `_conv2d_weight`
    at = [(window.up - a, window.left - b) for a, b in window.taps]
    return dx, torch.stack([dweight[:, :, i, j] for i, j in at]).view_as(taps)


def _conv2d_weight(taps: Tensor, window: Window) -> Tensor:
    """(R, C, up + 1, left + 1 + right): conv2d is a cross-correlation, so what reads further back comes first."""
    kernels = taps.view(len(window.taps), -1, taps.shape[1])
    height, width = window.up + 1, window.left + 1 + window.right
    if len(window.taps) == height * width:  # up_left: all of the rectangle
        return kernels.view(height, width, *kernels.shape[1:]).flip(0, 1).permute(2, 3, 0, 1)
    nothing = torch.zeros_like(kernels[0])
    found = {(window.up - a, window.left - b): kernel for (a, b), kernel in zip(window.taps, kernels, strict=True)}
    return torch.stack([found.get(divmod(at, width), nothing) for at in range(height * width)], -1).unflatten(
        -1, (height, width)
    )


def _pad(pictures: Tensor, window: Window) -> Tensor:
    """(M, rows, cols, C) -> (M, C, rows + up, left + cols + right), channels last in memory."""
    return F.pad(pictures, (0, 0, window.left, window.right, window.up, 0)).permute(0, 3, 1, 2)


def _crop(z: Tensor, grid: tuple[int, int]) -> Tensor:
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def _shifts(x: Tensor, taps: Tensor, window: Window, patches: Patches) -> Tensor:
    products = F.linear(x, taps).unflatten(1, (len(window.taps), -1))
    done = []
    for (rows, cols), blocks in _images(products, patches):
        z = blocks[..., 0, :].contiguous()
        for t, (a, b) in enumerate(window.taps):
            if t and a < rows and abs(b) < cols:
                left, right = max(b, 0), max(-b, 0)
                z[:, a:, left : cols - right] += blocks[:, : rows - a, right : cols - left, t]
        done.append(z.flatten(0, 2))
    return done[0] if len(done) == 1 else torch.cat(done)


def _shifts_backward(x: Tensor, taps: Tensor, dz: Tensor, window: Window, patches: Patches) -> tuple[Tensor, Tensor]:
    dproducts = dz.new_zeros(len(dz), len(window.taps), dz.shape[1])
    for ((rows, cols), blocks), (_, out) in zip(_images(dproducts, patches), _images(dz, patches), strict=True):
        for t, (a, b) in enumerate(window.taps):
            if a < rows and abs(b) < cols:
                left, right = max(b, 0), max(-b, 0)
                blocks[:, : rows - a, right : cols - left, t] = out[:, a:, left : cols - right]
    return _products_backward(x, taps, dproducts)


def _table(x: Tensor, taps: Tensor, window: Window, patches: Patches) -> Tensor:
    products = F.linear(x, taps).unflatten(1, (len(window.taps), -1))
    return _gather(products, patches.tables[window.name].reads).sum(1)


def _table_backward(x: Tensor, taps: Tensor, dz: Tensor, window: Window, patches: Patches) -> tuple[Tensor, Tensor]:
    read_by = patches.tables[window.name].read_by
    none = dz.new_zeros(1, dz.shape[1])
    return _products_backward(x, taps, torch.cat((dz, none))[read_by])


def _gather(products: Tensor, table: Tensor) -> Tensor:
    """(n, T, R) -> (n, T, R): entry (i, t) is block t of row table[i, t], zero where that is n."""
    n, t, rank = products.shape
    outside = table == n
    flat = table.clamp_max(max(n - 1, 0)) * t + torch.arange(t, device=table.device)
    found = products.reshape(-1, rank).index_select(0, flat.reshape(-1)).view(n, t, rank)
    return found.masked_fill(outside.unsqueeze(2), 0.0)


def _products_backward(x: Tensor, taps: Tensor, dproducts: Tensor) -> tuple[Tensor, Tensor]:
    flat = dproducts.flatten(1)
    return flat @ taps, flat.T @ x


FORMS: dict[FormName, Form] = {
    "linear": Form(lambda x, taps, *_: F.linear(x, taps), lambda x, taps, dz, *_: (dz @ taps, dz.T @ x)),
    "conv2d": Form(_conv2d, _conv2d_backward),
    "shifts": Form(_shifts, _shifts_backward),
    "table": Form(_table, _table_backward),
}

_forced: FormName | None = None


@contextlib.contextmanager
def use_form(name: FormName) -> Iterator[None]:
    """Take this form within the block, whatever the sizes; for whole pictures, as unfinished ones need the table."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(x: Tensor, taps: Tensor, window: Window, patches: Patches) -> FormName:
    """The fastest form for these sizes, as measured by `python -m benchmarks.causal_conv`.

    A rule and not a stopwatch: forms differ in their last bits, and a run that is resumed must choose as it did before.
    """
    if len(window.taps) == 1:
        return "linear"
    if torch.compiler.is_compiling():  # one graph for all grids and numbers of pictures
        return _forced or "table"
    if not patches.groups:
        return "table"
    return _forced or "shifts"
