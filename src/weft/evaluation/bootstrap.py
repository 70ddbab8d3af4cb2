"""How well n answers know a number: percentile intervals from drawing the answers again, with a fixed seed.

Answers of one unit (two questions about one picture, rotations of one question, turns of one session) are drawn
together, because they are not independent.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from weft.evaluation.metric import Aggregate, Sums, means
from weft.evaluation.records import Record

LEVEL = 0.95
RESAMPLES = 1000
_CHUNK = 4_000_000
"""Numbers drawn at once."""
_DEAR = 5_000_000
"""Records that an aggregate of its own is given over all resamples, at most."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    resamples: int


def units_of(records: Sequence[Record]) -> list[list[int]]:
    """Positions of the records of each unit, in the order in which units come first."""
    found: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        found.setdefault(record.id if record.unit is None else f"unit {record.unit}", []).append(i)
    return list(found.values())


def intervals(records: Sequence[Record], aggregate: Aggregate, *, seed: int, resamples: int) -> dict[str, Interval]:
    """Of every number that `aggregate` gives; none where fewer than two units know of it."""
    units = units_of(records)
    if len(units) < 2:
        return {}
    if aggregate is means:
        names = list(means(records))
        drawn = mean_draws(records, units, names, seed=seed, resamples=resamples)
    else:
        drawn = general_draws(records, units, aggregate, seed=seed, resamples=resamples)
    found = {}
    for name, values in drawn.items():
        known = values[np.isfinite(values)]
        if len(known) > resamples // 2:
            low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            found[name] = Interval(float(low), float(high), len(known))
    return found


def mean_draws(
    records: Sequence[Record], units: Sequence[Sequence[int]], names: Sequence[str], *, seed: int, resamples: int
) -> dict[str, np.ndarray]:
    """(resamples,) means of each value: sums over units, drawn again, by the number of records in them."""
    sums, counts = np.zeros((len(units), len(names))), np.zeros((len(units), len(names)))
    for u, unit in enumerate(units):
        for i in unit:
            for c, name in enumerate(names):
                value = records[i].values.get(name)
                if value is not None:
                    sums[u, c] += value
                    counts[u, c] += 1
    found = [np.zeros((0, len(names)))]
    for times in draws(len(units), seed=seed, resamples=resamples):
        n = times @ counts
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(np.where(n > 0, (times @ sums) / n, np.nan))
    table = np.concatenate(found)
    return {name: table[:, c] for c, name in enumerate(names)}


def general_draws(
    records: Sequence[Record], units: Sequence[Sequence[int]], aggregate: Aggregate, *, seed: int, resamples: int
) -> dict[str, np.ndarray]:
    """(resamples,) of what `aggregate` makes of each draw; fewer draws where it is dear."""
    found: list[Mapping[str, float]]
    if isinstance(aggregate, Sums):
        rows = np.array([aggregate.columns(record) for record in records], dtype=np.float64)
        sums = np.stack([rows[list(unit)].sum(0) for unit in units])
        chunks = draws(len(units), seed=seed, resamples=resamples)
        found = [aggregate.formula(row) for times in chunks for row in (times @ sums).tolist()]
    else:
        resamples = max(100, min(resamples, _DEAR // max(1, len(records))))
        found = []
        for times in draws(len(units), seed=seed, resamples=resamples):
            for row in times.astype(int):
                # the copies of a unit must not merge: they are as many observations
                drawn = [_copy(records[i], copy) for u, n in enumerate(row) for copy in range(n) for i in units[u]]
                found.append(aggregate(drawn))
    names = dict.fromkeys(name for each in found for name in each)
    return {name: np.array([each.get(name, np.nan) for each in found]) for name in names}


def draws(n: int, *, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """(chunk, n): how often each of n units is drawn, some resamples at a time; the same for every metric."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        yield rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)


def _copy(record: Record, number: int) -> Record:
    if number == 0 or record.unit is None:
        return record
    return replace(record, unit=f"{record.unit}\0{number}")
