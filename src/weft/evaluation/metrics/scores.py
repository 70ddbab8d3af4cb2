"""What a metric answers: one value per sample, and the aggregate computed from the samples, never from batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weft.errors import UsageError


@dataclass(frozen=True)
class Scores:
    per_sample: tuple[float, ...]
    """In the order of the samples."""
    value: float
    """The aggregate, unrounded."""


def mean_of(values: Sequence[float]) -> Scores:
    """The plain mean over samples, which is NaN for none."""
    return Scores(tuple(values), math.fsum(values) / len(values) if values else math.nan)


def same_length(where: str, **columns: Sequence[object]) -> None:
    """Raises UsageError when the columns do not speak of the same samples."""
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{count} {name}" for name, count in sizes.items())
        raise UsageError(f"samples do not match: {told}", where=where, fix="one of each for every sample, in order")
