"""Judged illustrated answers: what an answer gets that lacks something, how figures are averaged, and the arena.

InterleavedEval (Liu et al. 2024, arXiv:2406.14643) has each aspect judged 0 to 5. What a task does not ask for has no
score; what it asks for and an answer lacks scores the lowest without a judge. The overall figure is the plain mean of
the aspects' means. OpenING (Zhou et al. 2024, arXiv:2411.18499) rounds the means before it averages them.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from weft.evaluation.metrics.replies import Verdict

Modality = Literal["text", "image"]
Treatment = Literal["judge", "by_rule", "not_applicable"]
Single = Literal["ask", "not_applicable"]


@dataclass(frozen=True)
class Given:
    """What an answer holds, and how many pictures its prompt had."""

    text: bool
    images: int
    input_images: int


def treatment(
    about: Collection[Modality], asked: Collection[Modality], given: Given, *, compares: bool, single_image: Single
) -> Treatment:
    """Whether a criterion is judged, scores the lowest by rule, or does not apply.

    Args:
        about: what the criterion looks at; nothing in particular where it is empty.
        asked: what the task wants of an answer. Papers disagree about text where pictures are composed: the task says.
        compares: the criterion compares pictures with each other.
        single_image: what such a criterion does where there is only one picture, and none in the prompt.
    """
    if any(each not in asked for each in about):
        return "not_applicable"
    has: dict[Modality, bool] = {"text": given.text, "image": given.images > 0}
    if not any(has.values()) or any(not has[each] for each in about):
        return "by_rule"
    if compares and given.images == 1 and not given.input_images and single_image == "not_applicable":
        return "not_applicable"
    return "judge"


def overall(means: Sequence[float], *, digits: int | None = None) -> float:
    """The average column of a table: the plain mean of its criteria.

    Args:
        digits: to which each mean is rounded first; None: it is not.
    """
    return _mean([each if digits is None else round(each, digits) for each in means])


@dataclass(frozen=True)
class Battle:
    """Two models' answers to one instance, and which is better."""

    a: str
    b: str
    verdict: Verdict


TieRule = Literal["forced", "without", "zero", "half"]
"""Of OpenING's four columns: a tie goes to where it leans; is not counted; is nobody's win; is half a win for both."""


def win_rates(battles: Sequence[Battle], ties: TieRule) -> dict[str, float]:
    """Share of battles won by each model, in order of appearance; a model without a counted battle is left out.

    A tie that leans nowhere, as one that flips with the order does, is half a win for both under `forced`.
    """
    wins: dict[str, float] = {}
    fought: dict[str, int] = {}
    for battle in battles:
        tie = battle.verdict.startswith("Tie")
        if tie and ties == "without":
            continue
        share = 0.5 if tie else float(battle.verdict == "A")
        if ties == "forced" and battle.verdict in ("Tie(A)", "Tie(B)"):
            share = float(battle.verdict == "Tie(A)")
        nobody = tie and ties == "zero"
        for model, won in ((battle.a, share), (battle.b, 1 - share)):
            wins[model] = wins.get(model, 0.0) + (0.0 if nobody else won)
            fought[model] = fought.get(model, 0) + 1
    return {model: wins[model] / fought[model] for model in fought}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
