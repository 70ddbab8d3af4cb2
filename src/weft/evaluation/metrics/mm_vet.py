"""MM-Vet: open answers graded by a language model in steps of 0.1 (Yu et al. 2023, arXiv:2308.02490).

218 questions, each needing one or more of six capabilities; the score is the mean grade times 100, in total, for each
capability and for each set of capabilities. The paper grades five times and gives the mean and the spread of the runs.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from weft.errors import UsageError
from weft.evaluation.metrics.scores import Scores, mean_of, same_length

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
TRIES = 5


@dataclass(frozen=True)
class Grade:
    value: float
    by_default: bool
    """No reply of the grader could be read, so the grade is 0."""


def read_grade(reply: str) -> float | None:
    """The first word as a number in 0..1; None where it is none, or out of range."""
    words = reply.split()
    try:
        grade = float(words[0]) if words else math.nan
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def grade(ask: Callable[[int], str]) -> Grade:
    """Ask the grader until its reply can be read; `ask` is told the number of the try, to raise the temperature."""
    for attempt in range(TRIES):
        value = read_grade(ask(attempt))
        if value is not None:
            return Grade(value, by_default=False)
    return Grade(0.0, by_default=True)


@dataclass(frozen=True)
class MmVet:
    """Grades 0 to 1; `points` are the paper's."""

    total: Scores
    capabilities: Mapping[str, Scores]
    """Over the questions that need a capability, whatever else they need."""
    sets: Mapping[frozenset[str], Scores]
    """Over the questions that need just these capabilities."""
    by_default: int


def points(scores: Scores) -> float:
    """100 x the mean grade, to one decimal."""
    return round(100 * scores.value, 1)


def mm_vet(grades: Sequence[Grade], capabilities: Sequence[Sequence[str]]) -> MmVet:
    """Scores of one run.

    Args:
        grades: one per question.
        capabilities: what each question needs, of `CAPABILITIES`.
    """
    same_length("mm_vet", grades=grades, capabilities=capabilities)
    for i, needed in enumerate(capabilities):
        if not needed or set(needed) - set(CAPABILITIES):
            raise UsageError(
                f"question {i} needs {list(needed)}", where="mm_vet", fix=f"some of {', '.join(CAPABILITIES)}"
            )
    values = [grade.value for grade in grades]
    needs = [frozenset(needed) for needed in capabilities]
    return MmVet(
        total=mean_of(values),
        capabilities={
            name: mean_of([value for value, need in zip(values, needs, strict=True) if name in need])
            for name in CAPABILITIES
            if any(name in need for need in needs)
        },
        sets={
            each: mean_of([value for value, need in zip(values, needs, strict=True) if need == each])
            for each in dict.fromkeys(needs)
        },
        by_default=sum(grade.by_default for grade in grades),
    )


def over_runs(runs: Sequence[MmVet]) -> tuple[float, float]:
    """Mean and standard deviation (of the runs themselves, dividing by n) of the total grades."""
    totals = [run.total.value for run in runs]
    return statistics.fmean(totals), statistics.pstdev(totals)
