"""The arithmetic of the adapter branches: what is added to a frozen linear layer's output at one kind of position.

    linear   z = A x                                                       A (R, C)
    conv     z[i, j] = sum over a, b < k of K[a, b] x[i - a, j - b]        K (k * k * R, C), tap-major, tap a * k + b
    both     delta = s B z                                                 B (E, R)

The window reaches k - 1 patches up and left, so it is causal in raster order; outside the grid x is zero. k = 1 is the
linear branch exactly. Which positions take which branch is decided in `routing.py`.
Source: Xu et al. 2024 (arXiv:2407.03604), section 3; our departures are in docs/papers/moss.md.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

NARROW = 512
"""Channels below which the product with all taps is faster than a convolution: 1.6 times at C = 128, R = 8 on a CPU."""


def causal_conv(x: Tensor, taps: Tensor, kernel: int, grid: tuple[int, int]) -> Tensor:
    """z of the conv branch for whole pictures.

    Args:
        x: (M, P, C), the patches row by row; P = rows * cols of `grid`.
        taps: (k * k * R, C).
        grid: (rows, cols).

    Returns:
        (M, P, R).
    """
    if kernel == 1:
        return F.linear(x, taps)
    if x.shape[-1] < NARROW:
        return causal_conv_by_taps(x, taps, kernel, grid)
    (rows, cols), channels = grid, x.shape[-1]
    # conv2d is a cross-correlation: its last tap is the patch itself
    weight = taps.view(kernel, kernel, -1, channels).flip(0, 1).permute(2, 3, 0, 1)
    images = x.reshape(-1, rows, cols, channels).permute(0, 3, 1, 2)  # channels-last, a view
    z = F.conv2d(F.pad(images, (kernel - 1, 0, kernel - 1, 0)), weight)
    return z.permute(0, 2, 3, 1).reshape(x.shape[0], rows * cols, -1)


def causal_conv_by_taps(x: Tensor, taps: Tensor, kernel: int, grid: tuple[int, int]) -> Tensor:
    """`causal_conv` as one product with all taps, then sums of its R-wide blocks shifted over the grid."""
    rows, cols = grid
    products = F.linear(x, taps).view(x.shape[0], rows, cols, kernel, kernel, -1)
    z = products[:, :, :, 0, 0]
    for a in range(min(kernel, rows)):
        for b in range(min(kernel, cols)):
            if a or b:
                z = z + F.pad(products[:, : rows - a, : cols - b, a, b], (0, 0, b, 0, a, 0))
    return z.reshape(x.shape[0], rows * cols, -1)


def causal_conv_reference(x: Tensor, taps: Tensor, kernel: int, grid: tuple[int, int]) -> Tensor:
    """The definition of `causal_conv`, term by term."""
    (rows, cols), rank = grid, taps.shape[0] // kernel**2
    images, z = x.reshape(-1, rows, cols, x.shape[-1]), x.new_zeros(x.shape[0], rows, cols, rank)
    for a in range(min(kernel, rows)):
        for b in range(min(kernel, cols)):
            tap = taps[(a * kernel + b) * rank :][:rank]
            z[:, a:, b:] += images[:, : rows - a, : cols - b] @ tap.T
    return z.reshape(x.shape[0], rows * cols, rank)


def ring_size(kernel: int, cols: int) -> int:
    """Slots of partial sums that one picture row by row needs: a patch reaches (k - 1) rows and k - 1 patches ahead."""
    return (kernel - 1) * cols + kernel


def ring_step(
    x: Tensor, taps: Tensor, kernel: int, ring: Tensor, slots: Tensor, place: Tensor, cols: Tensor, active: Tensor
) -> Tensor:
    """z of the conv branch for one new patch per picture, and the partial sums it leaves for later ones.

    Every tap product of the new patch is formed once: the self tap completes this patch's sum, the others are added
    where later patches will need them. Equal to `causal_conv` up to the order of summation. Shapes depend on no value
    and nothing waits for the device.

    Args:
        x: (n, C), one patch of each of n pictures.
        ring: (S, size, R) partial sums of all cache slots, changed in place.
        slots: (n,) distinct slots in `ring`.
        place: (n,) raster index of the patch.
        cols: (n,) columns of its grid; `ring_size(kernel, cols)` <= size.
        active: (n,) bool. Other rows leave their slot as it is, and their z means nothing.

    Returns:
        (n, R).
    """
    size, rank = ring.shape[1:]
    products = F.linear(x, taps).view(-1, kernel, kernel, rank)
    here = place % size
    waiting = ring[slots, here]
    z = waiting + products[:, 0, 0]
    ring[slots, here] = waiting * ~active.unsqueeze(1)
    place, cols = place[:, None, None], cols[:, None, None]
    a = torch.arange(kernel, device=x.device)[:, None]
    b = torch.arange(kernel, device=x.device)
    reaches = (place % cols.clamp_min(1) + b < cols) & ((a > 0) | (b > 0))  # (n, k, k): later, not past the right edge
    ahead = slots[:, None, None] * size + (place + a * cols + b) % size
    left = products * (reaches & active[:, None, None]).unsqueeze(-1)
    ring.view(-1, rank).index_add_(0, ahead.reshape(-1), left.view(-1, rank))
    return z
