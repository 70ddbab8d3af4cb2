"""In which order documents come: every one once in a pass, sets as often as they weigh, found without a replay."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data.mixture import LARGEST_BLOCK, Joined, Mixture, quotas

small = st.integers(1, 40)
weights = st.one_of(st.integers(1, 5), st.sampled_from([0.5, 0.25, 1.5]))


@given(seed=st.integers(0, 2**63), count=small)
@settings(max_examples=60, deadline=None)
def test_every_pass_over_one_set_has_each_document_once_in_a_new_order(seed, count):
    order = Mixture([range(count)], [1.0], seed)
    passes = [[order[place] for place in range(epoch * count, (epoch + 1) * count)] for epoch in range(3)]
    assert all(sorted(each) == list(range(count)) for each in passes)
    if count > 12:
        assert passes[0] != passes[1] != passes[2]


def test_the_order_is_the_same_on_every_machine():
    # golden: what a stored run was trained on must stay what it was
    assert [Mixture([range(8)], [1.0], 7)[place] for place in range(8)] == [4, 1, 6, 3, 2, 7, 5, 0]
    two = Mixture([range(3), range(10, 14)], [1, 2], 7)
    assert [two[place] for place in range(9)] == [1, 10, 13, 11, 2, 12, 0, 11, 13]


@given(st.lists(st.tuples(small, weights), min_size=1, max_size=4), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_sets_come_as_often_as_they_weigh_and_each_goes_through_all_its_documents(sets, seed):
    first = 0
    numbers, weigh = [], []
    for count, weight in sets:
        numbers.append(range(first, first + count))
        weigh.append(weight)
        first += count
    order, block = Mixture(numbers, weigh, seed), sum(quotas(weigh))
    assert len(order) == first
    drawn = [order[place] for place in range(6 * block)]
    which = [next(i for i, own in enumerate(numbers) if number in own) for number in drawn]
    for at in range(0, 6 * block, block):
        assert Counter(which[at : at + block]) == dict(enumerate(quotas(weigh)))
    for own in numbers:
        of_set = [number for number in drawn if number in own]
        for at in range(0, len(of_set) - len(own) + 1, len(own)):
            assert sorted(of_set[at : at + len(own)]) == list(own)
    # any place by itself, in any order
    fresh = Mixture(numbers, weigh, seed)
    assert [fresh[place] for place in reversed(range(6 * block))] == drawn[::-1]


def test_places_far_away_are_found_at_once():
    order = Mixture([range(1000), range(1000, 5000)], [1, 2], 0)
    near = [order[place] for place in range(10**12, 10**12 + 12_000)]
    # 8,000 of the second set are two passes over it or parts of three
    assert Counter(Counter(n for n in near if n >= 1000).values()).keys() <= {1, 2, 3}
    assert {n < 1000 for n in near} == {True, False}


@pytest.mark.parametrize(
    "weights,wanted",
    [
        ([2, 1, 1, 1], (2, 1, 1, 1)),
        ([1.0], (1,)),
        ([0.5, 0.25], (2, 1)),
        ([0.1, 0.2], (1, 2)),
        ([3.0, 6.0], (1, 2)),
        ([1 / 3, 2 / 3], (1, 2)),
        ([0.12341, 0.87659], (617, 4383)),
        ([1e-9, 1.0], (1, 10_000)),
    ],
)
def test_weights_are_whole_numbers_in_their_relation(weights, wanted):
    assert quotas(weights) == wanted
    assert sum(wanted) <= LARGEST_BLOCK + len(weights)


class Few:
    def __init__(self, name: str, count: int) -> None:
        self.fingerprint, self.documents = name, [f"{name}{i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> str:
        return self.documents[index]


def test_datasets_are_joined_one_after_the_other():
    joined = Joined([Few("a", 2), Few("b", 3)])
    assert [joined[i] for i in range(len(joined))] == ["a0", "a1", "b0", "b1", "b2"]
    assert [joined.locate(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert joined.apart([0, 2, 4]) == [[0], [2, 4]]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            joined[index]


def test_a_fingerprint_is_of_the_content_and_its_order():
    a, b = Few("a", 2), Few("b", 2)
    prints = [Joined(each).fingerprint for each in ([a], [b], [a, b], [b, a], [a, a])]
    assert len(set(prints)) == 5
    assert Joined([a]).fingerprint == a.fingerprint
