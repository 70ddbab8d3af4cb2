"""Tables of positions against their formula, one entry at a time."""

import math

import pytest
import torch

from weft.ops.positions import grid_sin_cos, resize_table, sin_cos


@pytest.mark.parametrize("width", [2, 6])
def test_sines_stand_before_cosines_and_slow_down(width):
    half = width // 2
    wanted = [[f(p * 10000 ** (-k / half)) for f in (math.sin, math.cos) for k in range(half)] for p in (0, 1, 2, 2047)]
    table = sin_cos(torch.tensor([0, 1, 2, 2047]), width)
    torch.testing.assert_close(table, torch.tensor(wanted), rtol=0, atol=1e-7)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 2)])
def test_a_grid_says_its_row_then_its_column(grid):
    table = grid_sin_cos(*grid, 8)
    assert table.shape == (grid[0] * grid[1], 8)
    for i, place in enumerate(table):
        row, col = divmod(i, grid[1])
        torch.testing.assert_close(place, torch.cat((sin_cos(torch.tensor(row), 4), sin_cos(torch.tensor(col), 4))))


def test_tables_are_real_where_weights_are_not():
    with torch.device("meta"):
        table = grid_sin_cos(2, 2, 4)
    assert torch.equal(table, grid_sin_cos(2, 2, 4))


def test_the_same_grid_is_left_alone():
    table = torch.randn(9, 4)
    assert resize_table(table, 3, 3, align_corners=False) is table


def test_aligned_corners_keep_their_values():
    table = torch.randn(9, 2, dtype=torch.float64)
    resized = resize_table(table, 5, 7, align_corners=True).view(5, 7, 2)
    corners = resized[::4, ::6].flatten(0, 1)
    torch.testing.assert_close(corners, table[[0, 2, 6, 8]], rtol=0, atol=1e-12)
    other = resize_table(table, 5, 7, align_corners=False).view(5, 7, 2)[::4, ::6].flatten(0, 1)
    assert not torch.allclose(other, table[[0, 2, 6, 8]])


@pytest.mark.parametrize("align_corners", [True, False])
def test_rows_stay_rows(align_corners):
    """What only depends on the row does so after resizing; half precision keeps its dtype."""
    table = torch.tensor([0.0, 1.0, 2.0]).repeat_interleave(3).unsqueeze(1)
    resized = resize_table(table.bfloat16(), 2, 6, align_corners=align_corners)
    assert resized.dtype == torch.bfloat16
    rows = resized.view(2, 6)
    assert (rows == rows[:, :1]).all() and rows[0, 0] < rows[1, 0]
