"""Which documents make up which step: pure functions of the seed, so that a resumed run needs no replay.

Built on Philox, whose raw stream numpy keeps the same between versions.
"""

from functools import lru_cache

import numpy as np

_SPLIT = 2**63
"""The stream that chooses validation documents; epochs count from 0 and never reach it."""


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """The numbers below `count` in the order of one epoch."""
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return tuple(np.argsort(keys, kind="stable").tolist())


def batch_of_step(seed: int, step: int, batch: int, count: int) -> list[int]:
    """Places, among `count` documents, of those that step 1, 2, ... learns from; an epoch has each exactly once."""
    places = range((step - 1) * batch, step * batch)
    return [permutation(seed, place // count, count)[place % count] for place in places]


def split(seed: int, count: int, validation: float) -> tuple[list[int], list[int]]:
    """Numbers of the documents to train on and to validate on, both rising; `validation` is a share or a number."""
    size = round(validation * count) if validation < 1 else round(validation)
    kept = set(permutation(seed, _SPLIT, count)[:size])
    return [i for i in range(count) if i not in kept], sorted(kept)


def derive_seed(seed: int, *place: int) -> int:
    """An independent 63-bit seed for one place (step, process, ...) of a run."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0] >> 1)
