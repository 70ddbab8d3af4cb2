"""Which documents are kept for validation, and where random numbers come from; the order is tested in tests/data."""

from hypothesis import given, settings
from hypothesis import strategies as st

from weft.training.order import derive_seed, permutation, split

small = st.integers(1, 40)


def test_orders_differ_by_seed_and_epoch_and_not_by_anything_else():
    orders = {(seed, epoch): permutation(seed, epoch, 50) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    permutation.cache_clear()
    assert permutation(1, 2, 50) == orders[1, 2]


def test_the_order_is_the_same_on_every_machine():
    # golden: what a stored run was trained on must stay what it was
    assert permutation(7, 0, 8) == (4, 1, 6, 3, 2, 7, 5, 0)


@given(seed=st.integers(0, 9), count=small, validation=st.one_of(st.floats(0, 0.9), st.integers(1, 20)))
@settings(max_examples=60, deadline=None)
def test_split_is_a_partition(seed, count, validation):
    training, kept = split(seed, count, validation)
    assert sorted(training + kept) == list(range(count))
    assert len(kept) == min(count, round(validation * count) if validation < 1 else validation)


def test_derived_seeds_do_not_repeat():
    seeds = {derive_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(4)}
    assert len(seeds) == 1000
