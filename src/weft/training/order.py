"""Which documents are kept for validation, and from what random numbers are drawn: pure functions of the seed, so that
a resumed run needs no replay. In which order documents are learnt from is in `weft.data.mixture`.
"""

import numpy as np

from weft.data.mixture import permutation

_SPLIT = 2**63
"""The stream that chooses validation documents; no other reaches it."""


def split(seed: int, count: int, validation: float) -> tuple[list[int], list[int]]:
    """Numbers of the documents to train on and to validate on, both rising; `validation` is a share or a number."""
    size = round(validation * count) if validation < 1 else round(validation)
    kept = set(permutation(seed, _SPLIT, count)[:size])
    return [i for i in range(count) if i not in kept], sorted(kept)


def derive_seed(seed: int, *place: int) -> int:
    """An independent 63-bit seed for one place (step, process, ...) of a run."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0] >> 1)
