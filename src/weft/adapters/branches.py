"""The arithmetic of the adapter branches: what is added to a frozen linear layer's output at one kind of position.

    linear   z = A x                                                  A (R, C)
    conv     z[i, j] = sum over taps (a, b) of K[a, b] x[i-a, j-b]    K (T * R, C), tap-major, the patch itself first
    sam      z = z' + sum over experts e of g_e GELU(conv_e z')       z' = A x; conv_e R -> R; g = 1 or softmax(G z')
    full     z = x
    all      delta = s B z                                            B (E, R)

Windows are causal in raster order (`ops/grid.py`); kernel 1 is the linear branch exactly. Which positions take which
branch is decided in `routing.py`. Source: Xu et al. 2024 (arXiv:2407.03604), section 3, and for sam Zhong et al. 2024
(arXiv:2401.17868), made causal; our departures are in docs/papers/moss.md.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.adapters.rings import StepTables
from weft.ops.causal_conv import causal_conv
from weft.ops.grid import Patches, Window


def sam_experts(
    z: Tensor, experts: Tensor, gate: Tensor | None, windows: Sequence[Window],
    convolve: Callable[[int, Tensor, Window], Tensor],
) -> Tensor:  # fmt: skip
    """The sam branch inside the rank space.

    Args:
        z: (n, R), A x.
        experts: (sum of T_e * R, R), the taps of every expert, one after another.
        gate: (number of experts, R), or None: experts are added as they are.
        convolve: number of the expert, its taps (T_e * R, R), its window -> (n, R).
    """
    rank, total, at = z.shape[1], z, 0
    experts = experts.to(z.dtype)
    weights = None if gate is None else F.softmax(F.linear(z, gate.to(z.dtype)), dim=1)
    for e, window in enumerate(windows):
        taps = experts[at : at + len(window.taps) * rank]
        found = F.gelu(convolve(e, taps, window))
        total = total + (found if weights is None else found * weights[:, e : e + 1])
        at += len(taps)
    return total


def sam(z: Tensor, experts: Tensor, gate: Tensor | None, windows: Sequence[Window], patches: Patches) -> Tensor:
    """`sam_experts` over whole pictures, (n, R) in the order of `patches`."""
    return sam_experts(z, experts, gate, windows, lambda _, taps, window: causal_conv(z, taps, window, patches))


def conv_step(x: Tensor, taps: Tensor, ring: Tensor, tables: StepTables) -> Tensor:
    """z of the conv branch for one new patch per row, and the partial sums it leaves for later ones.

    Every tap product of the new patch is formed once: its own completes this patch's sum, the others are added where
    later patches will need them. Equal to `causal_conv` up to the order of summation. Shapes depend on no value and
    nothing waits for the device.

    Args:
        x: (B, C), one patch of each of B rows; rows that are in no picture mean nothing and leave nothing.
        ring: (S * size + 1, R) partial sums, changed in place.

    Returns:
        (B, R).
    """
    products = F.linear(x, taps)
    ring.index_add_(0, tables.ahead, products.view(-1, ring.shape[1]))
    z = ring.index_select(0, tables.here)
    ring.index_fill_(0, tables.done, 0.0)
    return z


def add_up(out: Tensor, rows: Tensor | None, z: Tensor, up: Tensor, scale: float) -> None:
    """out (N, E) += scale * up z at `rows`, or everywhere, in place. z (n, R), up (E, R)."""
    if rows is not None and out.dtype is z.dtype:
        out.index_add_(0, rows, F.linear(z * scale, up))
    elif rows is not None:  # rounded once, as everywhere
        out.index_copy_(0, rows, out.index_select(0, rows).add(F.linear(z * scale, up)).to(out.dtype))
    elif out.dtype is z.dtype:
        out.addmm_(z, up.T, alpha=scale)
    else:
        out.add_(F.linear(z, up), alpha=scale)


def up_backward(g: Tensor, rows: Tensor | None, z: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of z (n, R) and up (E, R) from that of the output, (N, E)."""
    g = (g if rows is None else g.index_select(0, rows)).to(z.dtype)
    return (g @ up).mul_(scale), torch.mm(g.T, z).mul_(scale)
