"""In which order documents are learnt from: a pure function of a seed, also over several datasets with weights.

    place  0 1 2 3 4 | 5 6 7 8 9 | ...        weights 2, 1, 2: blocks of 5 places, each with 2, 1 and 2 of them
    of set 2 0 0 1 2 | 0 2 1 0 2 | ...        shuffled within; every set by itself goes through all its documents anew

A place is found without those before it, so that a run goes on anywhere without a replay. Built on Philox, whose raw
stream numpy keeps the same between versions.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import gcd, lcm

import numpy as np

from weft.data.dataset import Dataset
from weft.document import Document

LARGEST_BLOCK = 10_000
"""Places after which weights must come out even; finer ones are rounded to that."""
_BLOCKS = 2**62
"""The first of the streams that shuffle blocks; those that shuffle documents lie below."""
_EPOCHS = 2**40
"""Streams of one set."""


@lru_cache(maxsize=4)
def permutation(seed: int, stream: int, count: int) -> tuple[int, ...]:
    """The numbers below `count` in an order of their own for every stream, such as an epoch."""
    keys = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(count)
    return tuple(np.argsort(keys, kind="stable").tolist())


class Mixture:
    """Which document stands at which place of an endless order.

    One set alone is gone through epoch by epoch, each in another order.
    """

    def __init__(self, sets: Sequence[Sequence[int]], weights: Sequence[float], seed: int) -> None:
        """
        Args:
            sets: numbers of documents, none of them empty.
            weights: how often documents of each set are drawn, in relation to each other.
        """
        self._sets, self._seed, self._quotas = sets, seed, quotas(weights)
        self._epochs: dict[int, tuple[int, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        """Documents, each counted once."""
        return sum(map(len, self._sets))

    def __getitem__(self, place: int) -> int:
        """The number of the document at a place from 0 on."""
        which, draw = self._draw(place)
        own = self._sets[which]
        epoch, at = divmod(draw, len(own))
        known, order = self._epochs.get(which, (-1, ()))
        if known != epoch:
            order = permutation(self._seed, which * _EPOCHS + epoch, len(own))
            self._epochs[which] = (epoch, order)
        return own[order[at]]

    def _draw(self, place: int) -> tuple[int, int]:
        """The set at a place, and how many of that set are drawn before it."""
        block, at = divmod(place, sum(self._quotas))
        which, before = _block(self._quotas, self._seed, block)[at]
        return which, block * self._quotas[which] + before


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the relation of the weights, at least 1 each and as small as they can be.

    Exact unless they would sum to more than `LARGEST_BLOCK`.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(weight * lcm(*(each.denominator for each in exact))) for weight in exact]
    if sum(whole) // gcd(*whole) > LARGEST_BLOCK:
        whole = [max(1, round(LARGEST_BLOCK * weight / sum(exact))) for weight in exact]
    return tuple(each // gcd(*whole) for each in whole)


@lru_cache(maxsize=4)
def _block(quotas: tuple[int, ...], seed: int, block: int) -> tuple[tuple[int, int], ...]:
    """(set, how many of it stand before in the block) of every place of a block."""
    sorted_sets = [which for which, quota in enumerate(quotas) for _ in range(quota)]
    found, counts = [], [0] * len(quotas)
    for at in permutation(seed, _BLOCKS + block, len(sorted_sets)) if len(quotas) > 1 else range(len(sorted_sets)):
        which = sorted_sets[at]
        found.append((which, counts[which]))
        counts[which] += 1
    return tuple(found)


class Joined:
    """Several datasets as one, their documents numbered on from one to the next."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = tuple(datasets)
        self._ends = list(accumulate(map(len, datasets)))
        own = [dataset.fingerprint for dataset in datasets]
        self.fingerprint = own[0] if len(own) == 1 else hashlib.sha256(json.dumps(own).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        which, number = self.locate(index)
        return self.datasets[which][number]

    def locate(self, index: int) -> tuple[int, int]:
        """Which dataset a document is of, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect_right(self._ends, index)
        return which, index - (self._ends[which - 1] if which else 0)

    def apart(self, numbers: Sequence[int]) -> list[list[int]]:
        """Numbers of documents by dataset."""
        sets: list[list[int]] = [[] for _ in self.datasets]
        for number in numbers:
            sets[self.locate(number)[0]].append(number)
        return sets
