"""Windows and the tables of neighbours."""

import pytest
import torch

from weft.ops.grid import MAX_KERNEL, Patches, Window

WINDOWS = [*(Window.of(kernel) for kernel in range(1, MAX_KERNEL + 1)), Window.of(3, "raster"), Window.of(4, "raster")]
each_window = pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.name)


@each_window
def test_every_tap_comes_earlier_in_raster_order_and_the_patch_itself_is_the_first(window):
    assert window.taps[0] == (0, 0)
    assert all(up > 0 or (up == 0 and left > 0) for up, left in window.taps[1:])
    assert len(set(window.taps)) == len(window.taps)


@pytest.mark.parametrize("kernel", range(1, MAX_KERNEL + 1))
def test_up_left_is_the_square_that_ends_at_the_patch(kernel):
    window = Window.of(kernel)
    assert set(window.taps) == {(up, left) for up in range(kernel) for left in range(kernel)}
    assert (window.up, window.left, window.right) == (kernel - 1, kernel - 1, 0)


def test_raster_is_the_square_around_the_patch_without_what_comes_later():
    assert set(Window.of(3, "raster").taps) == {(0, 0), (0, 1), (1, 1), (1, 0), (1, -1)}
    four = Window.of(4, "raster")
    square = {(up, left) for up in range(-1, 3) for left in range(-1, 3)}  # one further up and left than down and right
    assert set(four.taps) == {(up, left) for up, left in square if up > 0 or (up == 0 and left >= 0)}
    assert (four.up, four.left, four.right) == (2, 2, 1)


def test_windows_have_different_names_and_are_made_once():
    assert len({window.name for window in WINDOWS}) == len(WINDOWS)
    assert Window.of(3, "raster") is Window.of(3, "raster")


GROUPS = (((2, 3), 2), ((1, 4), 1), ((3, 1), 1), ((1, 1), 2))


def patches_one_by_one(groups) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
    """(row of the first patch, (row, column) of this one, grid) for every row, counted out."""
    found, at = [], 0
    for grid, pictures in groups:
        for _ in range(pictures):
            found += [(at, divmod(place, grid[1]), grid) for place in range(grid[0] * grid[1])]
            at += grid[0] * grid[1]
    return found


@each_window
def test_tables_name_the_neighbours_and_are_each_others_inverse(window):
    tables = Patches.dense(GROUPS, (window,)).tables[window.name]
    everyone = patches_one_by_one(GROUPS)
    n = len(everyone)
    for this, (first, (row, col), (_, cols)) in enumerate(everyone):
        for tap, (up, left) in enumerate(window.taps):
            inside = row >= up and 0 <= col - left < cols
            source = first + (row - up) * cols + col - left if inside else n
            assert tables.reads[this, tap] == source
            if inside:
                assert tables.read_by[source, tap] == this
    assert (tables.reads == n).sum() == (tables.read_by == n).sum()


@each_window
def test_tables_of_unfinished_pictures_are_those_of_whole_ones_without_the_missing_rows(window):
    whole = Patches.dense((((3, 4), 1),), (window,)).tables[window.name]
    for present in range(1, 12):
        place, grid = torch.arange(present), torch.tensor([[3, 4]]).expand(present, 2)
        tables = Patches.of((), torch.zeros_like(place), place, grid, (window,)).tables[window.name]
        outside_whole, outside = whole.reads[:present] == 12, tables.reads == present
        assert torch.equal(outside_whole, outside)
        assert torch.equal(whole.reads[:present][~outside_whole], tables.reads[~outside])
        known = (whole.read_by[:present] < present) == (tables.read_by < present)
        assert known.all(), "a row that is not there reads nothing"


def test_without_windows_there_are_no_tables():
    assert Patches.dense(GROUPS).tables == {}
