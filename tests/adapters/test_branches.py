"""The arithmetic of the branches, in float64."""

import pytest
import torch
from torch import randn

from weft.adapters import branches
from weft.adapters.branches import causal_conv, causal_conv_by_taps, causal_conv_reference, ring_size, ring_step

GRIDS = [(1, 1), (2, 2), (3, 5), (5, 2), (1, 4)]
KERNELS = [1, 2, 3, 4]


def taps_of(kernel: int, rank: int = 3, channels: int = 5) -> torch.Tensor:
    return randn(kernel**2 * rank, channels, dtype=torch.float64)


def by_hand(x: torch.Tensor, taps: torch.Tensor, kernel: int, grid: tuple[int, int]) -> torch.Tensor:
    """The paper's sum, element by element."""
    rank, z = taps.shape[0] // kernel**2, torch.zeros(x.shape[0], x.shape[1], taps.shape[0] // kernel**2, dtype=x.dtype)
    for i in range(grid[0]):
        for j in range(grid[1]):
            for a in range(kernel):
                for b in range(kernel):
                    if i >= a and j >= b:
                        tap = taps[(a * kernel + b) * rank : (a * kernel + b + 1) * rank]
                        z[:, i * grid[1] + j] += x[:, (i - a) * grid[1] + j - b] @ tap.T
    return z


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_forms_agree_with_the_equation_gradients_included(grid, kernel, monkeypatch):
    monkeypatch.setattr(branches, "NARROW", 0)  # so that causal_conv is the convolution
    torch.manual_seed(0)
    taps = taps_of(kernel).requires_grad_()
    x = randn(2, grid[0] * grid[1], 5, dtype=torch.float64, requires_grad=True)
    weight = randn(2, grid[0] * grid[1], 3, dtype=torch.float64)
    results = []
    for form in (by_hand, causal_conv_reference, causal_conv_by_taps, causal_conv):
        z = form(x, taps, kernel, grid)
        results.append((z, *torch.autograd.grad((z * weight).sum(), (x, taps))))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_conv_never_reads_a_later_patch_nor_outside_its_window(grid, kernel):
    torch.manual_seed(1)
    taps, patches = taps_of(kernel), grid[0] * grid[1]
    x = randn(1, patches, 5, dtype=torch.float64)
    full = causal_conv(x, taps, kernel, grid)
    for changed in range(patches):
        other = x.clone()
        other[:, changed] += 1
        moved = (causal_conv(other, taps, kernel, grid) - full).abs().amax((0, 2)) > 1e-12
        row, col = divmod(changed, grid[1])
        reached = [
            0 <= p // grid[1] - row < kernel and 0 <= p % grid[1] - col < kernel for p in range(patches)
        ]  # fmt: skip
        assert moved.tolist() == reached


@pytest.mark.parametrize("kernel", KERNELS)
def test_ring_equals_the_whole_picture_for_pictures_at_different_places_in_one_batch(kernel):
    torch.manual_seed(2)
    grids = [(3, 4), (2, 2), (4, 4)]
    size = max(ring_size(kernel, cols) for _, cols in grids)
    pictures = [randn(1, rows * cols, 5, dtype=torch.float64) for rows, cols in grids]
    taps, ring = taps_of(kernel), torch.zeros(4, size, 3, dtype=torch.float64)
    slots, starts = [2, 0, 3], [0, 3, 1]
    got: list[list[torch.Tensor]] = [[], [], []]
    for step in range(20):
        live = [n for n in range(3) if 0 <= step - starts[n] < pictures[n].shape[1]]
        if live:
            place = torch.tensor([step - starts[n] for n in live])
            x = torch.stack([pictures[n][0, step - starts[n]] for n in live])
            cols = torch.tensor([grids[n][1] for n in live])
            # an inactive neighbour in the last slot must not disturb anything
            x, place, cols = (torch.cat((t, t[:1])) for t in (x, place, cols))
            rows, active = torch.tensor([*(slots[n] for n in live), 1]), torch.tensor([*(True for _ in live), False])
            z = ring_step(x, taps, kernel, ring, rows, place, cols, active)[:-1]
            for n, row in zip(live, z, strict=True):
                got[n].append(row)
    for n, grid in enumerate(grids):
        wanted = causal_conv_reference(pictures[n], taps, kernel, grid)[0]
        torch.testing.assert_close(torch.stack(got[n]), wanted, rtol=0, atol=1e-12)
    assert not ring[1].any(), "an unused slot stays empty"


def test_kernel_one_is_the_linear_branch_bit_for_bit():
    torch.manual_seed(3)
    taps, x = torch.randn(4, 6), torch.randn(2, 9, 6)
    assert torch.equal(causal_conv(x, taps, 1, (3, 3)), torch.nn.functional.linear(x, taps))
