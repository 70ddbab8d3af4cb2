"""Length and repetition of texts, and what a score would be at another length.

Judges like long texts, and text that says everything twice scores as well as text that does not (Dubois et al. 2024,
arXiv:2404.04475). So a score of texts is read beside both, and at a length that is the same for all models:

    score = a + b log2(words)      least squares over one model's answers; the score at w words is a + b log2(w)

It is a description of the answers that were given, not what the model would write if it were asked for w words.
"""

import math
from collections import Counter
from collections.abc import Sequence

GRAM = 4
AT_WORDS = 128
"""Where scores of texts are compared; part of the name of such a score."""
FEWEST = 3
"""Answers that a line is drawn through."""


def words(text: str) -> int:
    return len(text.split())


def repetition(text: str, size: int = GRAM) -> float:
    """Share of a text's n-grams that were there before, 0 for a text of fewer words."""
    said = text.lower().split()
    grams = Counter(tuple(said[i : i + size]) for i in range(len(said) - size + 1))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def line_at(xs: Sequence[float], ys: Sequence[float], x: float) -> tuple[float, float] | None:
    """(slope, height at `x`) of the least-squares line; None where too few points or none on one side of `x`."""
    if len(xs) < FEWEST or not min(xs) <= x <= max(xs) or min(xs) == max(xs):
        return None
    middle, height = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    spread = math.fsum((each - middle) ** 2 for each in xs)
    slope = math.fsum((a - middle) * (b - height) for a, b in zip(xs, ys, strict=True)) / spread
    return slope, height + slope * (x - middle)


def at_length(lengths: Sequence[int], scores: Sequence[float], at: int = AT_WORDS) -> tuple[float, float] | None:
    """(points per doubling of the length, score at `at` words) of texts that have words; see `line_at`."""
    return line_at([math.log2(length) for length in lengths], scores, math.log2(at))
