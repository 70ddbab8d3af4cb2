"""Two evaluations of the same samples: the difference of each number, and whether n settles its sign.

Paired: both are taken over the samples that both have, drawn again together, so that easy and hard samples cancel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from weft.evaluation.bootstrap import LEVEL, RESAMPLES, general_draws, mean_draws, units_of
from weft.evaluation.journal import EvaluationError
from weft.evaluation.metric import Metric, means
from weft.evaluation.records import Record
from weft.evaluation.run import Run
from weft.evaluation.summary import SEED, row_of


@dataclass(frozen=True)
class Difference:
    metric: str
    value: str
    first: float
    second: float
    difference: float
    """Second minus first."""
    low: float | None
    high: float | None
    p: float | None
    """Share of draws on the other side of zero, twice."""
    n: int
    """Samples that both have."""
    better: str
    """`first`, `second`, or `not resolved`."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    first: Run, second: Run, metrics: Mapping[str, Metric], *, resamples: int = RESAMPLES, seed: int = SEED
) -> list[Difference]:
    """
    Raises:
        EvaluationError: they are not of the same data, or have no metric or no sample in common.
    """
    _check_same_data(first, second)
    a, b = first.read_records(), second.read_records()
    names = [name for name in a if name in b]
    if not names:
        raise EvaluationError(
            f"no metric is in both: {', '.join(a) or 'none'} and {', '.join(b) or 'none'}",
            where=f"{first.folder}, {second.folder}",
            fix="score both with the same metrics and the same judge",
        )
    found: list[Difference] = []
    for name in names:
        common = [each for each in a[name] if each in b[name]]
        if not common:
            raise EvaluationError(f"no sample has a record of {name} in both", where=str(second.folder))
        rows = [a[name][each] for each in common], [b[name][each] for each in common]
        found += _differences(name, row_of(name, metrics), *rows, resamples=resamples, seed=seed)
    return found


def _check_same_data(first: Run, second: Run) -> None:
    one, other = (run.facts()["samples"]["data"] for run in (first, second))
    if one != other:
        raise EvaluationError(
            f"these are evaluations of different data: {one[:12]} and {other[:12]}",
            where=f"{first.folder}, {second.folder}",
            fix="compare runs of one task and split, made from the same files",
        )


def _differences(
    name: str, metric: Metric, a: Sequence[Record], b: Sequence[Record], *, resamples: int, seed: int
) -> list[Difference]:
    values = metric.aggregate(a), metric.aggregate(b)
    drawn = _paired_draws(metric, a, b, resamples=resamples, seed=seed) if metric.intervals else {}
    found = []
    for value in values[0]:
        if value not in values[1]:
            continue
        one, other = values[0][value], values[1][value]
        low = high = p = None
        known = drawn.get(value, np.zeros(0))
        known = known[np.isfinite(known)]
        if len(known) > 1:
            low, high = map(float, np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
            p = float(min(1.0, 2 * min((known <= 0).mean(), (known >= 0).mean())))
        found.append(Difference(name, value, one, other, other - one, low, high, p, len(a), _better(metric, low, high)))
    return found


def _better(metric: Metric, low: float | None, high: float | None) -> str:
    if low is None or high is None or low <= 0 <= high:
        return "not resolved"
    return "second" if (low > 0) != metric.lower_is_better else "first"


def _paired_draws(
    metric: Metric, a: Sequence[Record], b: Sequence[Record], *, resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """(resamples,) differences; the same seed draws the same units for both."""
    units = units_of(a)
    if len(units) < 2:
        return {}
    if metric.aggregate is means:
        names = [name for name in means(a) if name in means(b)]
        one, other = (mean_draws(each, units, names, seed=seed, resamples=resamples) for each in (a, b))
    else:
        one, other = (general_draws(each, units, metric.aggregate, seed=seed, resamples=resamples) for each in (a, b))
    return {name: other[name] - one[name] for name in one if name in other}
