"""What n stories and a few seeds say about a claim.

Every arm answers the same stories, so a contrast is one number for each story and seed. Stories and seeds are drawn
again independently of each other, because a story is easy or hard for every seed and a seed is good or bad on every
story. With S seeds, drawing them again makes their spread too small by (S - 1) / S; what seeds have in common is
stretched by the inverse, so that two seeds do not look surer than they are. One seed has no spread: its interval is
about stories alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from weft.evaluation.bootstrap import LEVEL
from weft.evaluation.miniature.claims import Claim

Verdict = Literal["holds", "does not hold", "not resolved at this n"]
Values = Mapping[str, Mapping[str, np.ndarray]]
"""Arm -> measure -> (S, N) values by seed and story; (1, N) of an arm that is not trained."""


@dataclass(frozen=True)
class Finding:
    """A claim and what was found."""

    claim: Claim
    estimate: float
    low: float
    high: float
    seeds: int
    stories: int

    @property
    def verdict(self) -> Verdict:
        if self.low > 0:
            return "holds"
        return "does not hold" if self.high < 0 else "not resolved at this n"

    def to_json(self) -> dict[str, Any]:
        return {
            "statement": self.claim.statement,
            "source": self.claim.source,
            "verdict": self.verdict,
            "measure": self.claim.measure,
            "contrast": dict(self.claim.contrast),
            "estimate": round(self.estimate, 6),
            "interval": [round(self.low, 6), round(self.high, 6)],
            "n": self.seeds * self.stories,
            "seeds": self.seeds,
            "stories": self.stories,
        }


def values_of(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, np.ndarray]]:
    """`Values` of the runs of arms."""
    return {
        arm: {name: np.array([run["values"][name] for run in runs]) for name in runs[0]["values"]}
        for arm, runs in results.items()
    }


def judge(claim: Claim, values: Values, *, resamples: int, seed: int = 0) -> Finding | None:
    """None: an arm of the claim was not run."""
    if any(arm not in values for arm in claim.contrast):
        return None
    contrast: Any = sum(weight * values[arm][claim.measure] for arm, weight in claim.contrast.items())
    contrast = claim.sign * contrast
    low, high = interval(contrast, resamples=resamples, seed=seed)
    return Finding(claim, float(contrast.mean()), low, high, *contrast.shape)


def judge_all(claims: Sequence[Claim], values: Values, *, resamples: int) -> list[Finding]:
    """Those whose arms were run."""
    found = (judge(claim, values, resamples=resamples) for claim in claims)
    return [each for each in found if each is not None]


def interval(values: np.ndarray, *, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of (S, N) values, seeds and stories drawn again."""
    seeds, stories = values.shape
    if seeds > 1:
        of_seed = values.mean(1, keepdims=True) - values.mean()
        values = values + (math.sqrt(seeds / (seeds - 1)) - 1) * of_seed
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    columns = rng.multinomial(stories, np.full(stories, 1 / stories), size=resamples) / stories
    means = np.einsum("rs,sn,rn->r", rows, values, columns, optimize=True)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
