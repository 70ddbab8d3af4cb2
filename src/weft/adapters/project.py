"""Down- and up-projections of adapted layers over whole sequences, in as few passes over C-wide data as there can be.

    down   x (N, C)            -> z of the text rows (T, R), z of the image rows (n, R), for one layer or for several
    up     out (N, E), both z  -> out, with each branch's update added at its rows

Layers with one input (q, k, v; gate, up) share one gather and one product with their stacked weights. Backward gathers
again instead of keeping copies, and gives x one gradient for all of them.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weft.adapters.branches import add_up, up_backward
from weft.ops.causal_conv import FORMS, causal_conv, choose
from weft.ops.grid import Patches, Window


@dataclass(frozen=True)
class Rows:
    """Where each branch reads and writes."""

    text: Tensor | None
    """(T,) flat positions; None is every position."""
    image: Tensor
    """(n,) flat positions, the rows of `patches`."""
    patches: Patches


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What the products are formed in: what autocast says, else the adapter's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def down(x: Tensor, rows: Rows, texts: list[Tensor], images: list[Tensor], window: Window) -> list[Tensor]:
    """z (T, R) for each of `texts`, each (R, C), then z (n, R) for each of `images`, each (taps * R, C)."""
    dtype = compute_dtype(x, (texts + images)[0])
    if torch.compiler.is_compiling():
        return _down_plain(x, rows, texts, images, window, dtype)
    return list(cast(tuple[Tensor, ...], _Down.apply(x, rows, len(texts), window, dtype, *texts, *images)))


def _down_plain(
    x: Tensor, rows: Rows, texts: list[Tensor], images: list[Tensor], window: Window, dtype: torch.dtype
) -> list[Tensor]:
    """`down` in differentiable operations: the definition, and what a compiler gets."""
    flat = x.reshape(-1, x.shape[-1])
    words = _gather(flat, rows.text, dtype) if texts else flat
    pictures = _gather(flat, rows.image, dtype) if images else flat
    return [F.linear(words, weight.to(dtype)) for weight in texts] + [
        causal_conv(pictures, weight.to(dtype), window, rows.patches) for weight in images
    ]


def _gather(flat: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (flat if rows is None else flat.index_select(0, rows)).to(dtype)


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Rows, count: int, window: Window, dtype: torch.dtype, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.rows, ctx.count, ctx.window, ctx.dtype = rows, count, window, dtype
        flat = x.reshape(-1, x.shape[-1])
        texts, images = weights[:count], weights[count:]
        found: list[Tensor] = []
        if texts:
            z = F.linear(_gather(flat, rows.text, dtype), _stack(texts, 1, dtype))
            found += z.split([len(w) for w in texts], 1)
        if images:
            pictures, taps = _gather(flat, rows.image, dtype), _stack(images, len(window.taps), dtype)
            ctx.form = choose(pictures, taps, window, rows.patches)
            z = FORMS[ctx.form].forward(pictures, taps, window, rows.patches)
            found += z.split([len(w) // len(window.taps) for w in images], 1)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dzs: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows, count, window, dtype = ctx.rows, ctx.count, ctx.window, ctx.dtype
        flat = x.reshape(-1, x.shape[-1])
        texts, images = weights[:count], weights[count:]
        parts: list[tuple[Tensor | None, Tensor]] = []
        grads: list[Tensor] = []
        if texts:
            dz = torch.cat([dz.to(dtype) for dz in dzs[:count]], 1) if count > 1 else dzs[0].to(dtype)
            parts.append((rows.text, dz @ _stack(texts, 1, dtype)))
            grads += _unstack(dz.T @ _gather(flat, rows.text, dtype), texts, 1)
        if images:
            dz = torch.cat([dz.to(dtype) for dz in dzs[count:]], 1)
            if len(dz):
                pictures, taps = _gather(flat, rows.image, dtype), _stack(images, len(window.taps), dtype)
                dpictures, dtaps = FORMS[ctx.form].backward(pictures, taps, dz, window, rows.patches)
                parts.append((rows.image, dpictures))
                grads += _unstack(dtaps, images, len(window.taps))
            else:  # zero and not missing, or distributed training would wait for it
                grads += [torch.zeros_like(weight) for weight in images]
        dx = _scatter(parts, flat).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, *grads


def _scatter(parts: list[tuple[Tensor | None, Tensor]], like: Tensor) -> Tensor:
    """(N, C) with every part at its rows, zero elsewhere."""
    everywhere = [part for rows, part in parts if rows is None]
    if everywhere:
        total = everywhere[0].to(like.dtype)
    elif sum(len(part) for _, part in parts) == len(like):
        total = torch.empty_like(like)  # a position takes one branch: all are written
    else:
        total = torch.zeros_like(like)
    for rows, part in parts:
        if rows is not None and everywhere:
            total.index_add_(0, rows, part.to(like.dtype))
        elif rows is not None:
            total.index_copy_(0, rows, part.to(like.dtype))
    return total


def _stack(weights: tuple[Tensor, ...] | list[Tensor], taps: int, dtype: torch.dtype) -> Tensor:
    """One (taps * sum of R, C), tap-major, out of several (taps * R, C)."""
    if len(weights) == 1:
        return weights[0].to(dtype)
    return torch.cat([w.to(dtype).unflatten(0, (taps, -1)) for w in weights], 1).flatten(0, 1)


def _unstack(grad: Tensor, weights: list[Tensor], taps: int) -> list[Tensor]:
    if len(weights) == 1:
        return [grad.to(weights[0].dtype)]
    parts = grad.unflatten(0, (taps, -1)).split([len(w) // taps for w in weights], 1)
    return [part.reshape(w.shape).to(w.dtype) for part, w in zip(parts, weights, strict=True)]


def up(
    out: Tensor, rows: Rows, text: tuple[Tensor, Tensor, float] | None, image: tuple[Tensor, Tensor, float] | None,
    *, in_place: bool,
) -> Tensor:  # fmt: skip
    """out (..., E) with the branches' updates.

    Args:
        text, image: z (n, R), the up-projection (E, R) and its scale, or None where there is no branch.
        in_place: nobody else needs `out`.
    """
    z_text, up_text, s_text = text or (None, None, 0.0)
    z_image, up_image, s_image = image or (None, None, 0.0)
    if torch.compiler.is_compiling():
        total = out.reshape(-1, out.shape[-1])
        for branch, where in ((text, rows.text), (image, rows.image)):
            if branch is not None:
                z, weight, scale = branch
                update = F.linear(z * scale, weight.to(z.dtype)).to(out.dtype)
                total = total + update if where is None else total.index_add(0, where, update)
        return total.view_as(out)
    return cast(Tensor, _Up.apply(out, rows, in_place, s_text, s_image, z_text, up_text, z_image, up_image))


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, rows: Rows, in_place: bool, s_text: float, s_image: float,
        z_text: Tensor | None, up_text: Tensor | None, z_image: Tensor | None, up_image: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(z_text, up_text, z_image, up_image)
        ctx.rows, ctx.scales = rows, (s_text, s_image)
        if in_place:
            ctx.mark_dirty(out)
        else:
            out = out.clone(memory_format=torch.contiguous_format)
        flat = out.view(-1, out.shape[-1])
        if z_text is not None and up_text is not None:
            add_up(flat, rows.text, z_text, up_text.to(z_text.dtype), s_text)
        if z_image is not None and up_image is not None:
            add_up(flat, rows.image, z_image, up_image.to(z_image.dtype), s_image)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z_text, up_text, z_image, up_image = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        grads: list[Tensor | None] = []
        for rows, z, weight, scale in (
            (ctx.rows.text, z_text, up_text, ctx.scales[0]),
            (ctx.rows.image, z_image, up_image, ctx.scales[1]),
        ):
            if z is None:
                grads += [None, None]
            else:
                dz, dweight = up_backward(flat, rows, z, weight.to(z.dtype), scale)
                grads += [dz, dweight.to(weight.dtype)]
        return g, None, None, None, None, *grads
