"""Tables of judged illustrated answers: InterleavedEval's five aspects, OpenING's criteria, and its arena.

InterleavedEval (Liu et al. 2024, arXiv:2406.14643) has each aspect judged 0 to 5. What a task does not ask for has no
score; what it asks for and an answer lacks scores 0 without a judge. An aspect's figure is the mean over its instances,
the overall one the plain mean of the five. OpenING (Zhou et al. 2024, arXiv:2411.18499) rounds before it averages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from weft.errors import UsageError
from weft.evaluation.metrics.replies import Verdict

Aspect = Literal[
    "text_quality", "perceptual_quality", "image_coherence", "text_image_coherence", "helpfulness"
]  # fmt: skip
ASPECTS: tuple[Aspect, ...] = (
    "text_quality", "perceptual_quality", "image_coherence", "text_image_coherence", "helpfulness",
)  # fmt: skip
OPENING_CRITERIA = (
    "Correctness", "Image-Text Coherency", "Multi-step Consistency", "Content Quality",
    "Human Preference Alignment", "Completeness", "Content Richness",
)  # fmt: skip
MOST_UNPARSED = 0.01
"""Share of a judge's replies; with more of them unread, a summary is not valid."""


@dataclass(frozen=True)
class Asked:
    """What a task asks for. `composition`: several given subjects in one picture, where papers disagree about text."""

    text: bool
    images: bool
    composition: bool = False


@dataclass(frozen=True)
class Given:
    """What an answer holds, and how many pictures its prompt had."""

    text: bool
    images: int
    input_images: int


@dataclass(frozen=True)
class MissingRules:
    """Where the literature does not decide what a missing part means; part of a variant's name."""

    composition_text: Literal["not applicable", "judge"] = "not applicable"
    single_image: Literal["not applicable", "judge"] = "judge"


Treatment = Literal["judge", "not applicable", "zero"]


def treatment(aspect: Aspect, asked: Asked, given: Given, rules: MissingRules) -> Treatment:
    """Whether an aspect of an answer is judged, scores 0 by rule, or does not apply."""
    wants_text = asked.text or (asked.composition and rules.composition_text == "judge")
    needs_text = aspect in ("text_quality", "text_image_coherence")
    needs_images = aspect in ("perceptual_quality", "image_coherence", "text_image_coherence")
    if (needs_text and not wants_text) or (needs_images and not asked.images):
        return "not applicable"
    empty = not given.text and not given.images
    if empty or (needs_text and not given.text) or (needs_images and not given.images):
        return "zero"
    alone = aspect == "image_coherence" and given.images == 1 and not given.input_images
    return "not applicable" if alone and rules.single_image == "not applicable" else "judge"


@dataclass(frozen=True)
class AspectScore:
    """One aspect of one answer. `score` is None where `how` is unparsed or not applicable."""

    id: str
    task: str
    aspect: str
    how: Literal["judged", "by rule", "unparsed", "not applicable"]
    score: float | None

    def __post_init__(self) -> None:
        if (self.score is None) != (self.how in ("unparsed", "not applicable")):
            raise UsageError(
                f"a score of {self.score} that is {self.how}", where=f"{self.id}, {self.aspect}",
                fix="a score if it was judged or follows from a rule, and none otherwise",
            )  # fmt: skip


@dataclass(frozen=True)
class AspectSummary:
    """`mean` is over instances, `mean_of_tasks` over the means of tasks; NaN for no instance."""

    mean: float
    mean_of_tasks: float
    tasks: Mapping[str, float]
    n: int
    by_rule: int
    unparsed: int
    not_applicable: int


@dataclass(frozen=True)
class InterleavedSummary:
    aspects: Mapping[str, AspectSummary]
    overall: float
    """Plain mean of the aspects' means; NaN where one has no instance."""
    unparsed: float
    """Share of the judge's replies."""

    @property
    def valid(self) -> bool:
        return self.unparsed <= MOST_UNPARSED


def summarise(scores: Sequence[AspectScore], aspects: Sequence[str] = ASPECTS) -> InterleavedSummary:
    """Aspects and overall figure of one model on one split.

    Raises:
        UsageError: an unknown aspect, or one scored twice for the same answer.
    """
    seen = set()
    for score in scores:
        key = (score.id, score.aspect)
        if key in seen or score.aspect not in aspects:
            raise UsageError(
                f"{score.aspect} is " + ("scored twice" if key in seen else f"none of {', '.join(aspects)}"),
                where=score.id,
                fix="one score for each aspect of an answer",
            )
        seen.add(key)
    rows = {aspect: _aspect([score for score in scores if score.aspect == aspect]) for aspect in aspects}
    unparsed = sum(score.how == "unparsed" for score in scores)
    replies = unparsed + sum(score.how == "judged" for score in scores)
    return InterleavedSummary(rows, _mean([row.mean for row in rows.values()]), unparsed / replies if replies else 0.0)


def _aspect(scores: Sequence[AspectScore]) -> AspectSummary:
    by_task: dict[str, list[float]] = {}
    for score in scores:
        if score.score is not None:
            by_task.setdefault(score.task, []).append(score.score)
    values = [value for values in by_task.values() for value in values]
    tasks = {task: _mean(values) for task, values in by_task.items()}
    hows = [score.how for score in scores]
    return AspectSummary(
        mean=_mean(values),
        mean_of_tasks=_mean(list(tasks.values())),
        tasks=tasks,
        n=len(values),
        by_rule=hows.count("by rule"),
        unparsed=hows.count("unparsed"),
        not_applicable=hows.count("not applicable"),
    )


def overall(aspects: Sequence[float]) -> float:
    """The average column of InterleavedEval's tables: the plain mean of the aspects, to two decimals."""
    return round(_mean(aspects), 2)


@dataclass(frozen=True)
class OpeningRow:
    """One model: the rounded mean of each criterion, the rounded mean of those, and the instances left out."""

    criteria: Mapping[str, float]
    overall: float
    n: int
    unparsed: int


def opening_row(instances: Sequence[Mapping[str, float | None]]) -> OpeningRow:
    """A row of OpenING's table of scores; an instance that lacks a criterion is left out whole, and counted."""
    whole = [scores for scores in instances if all(scores.get(name) is not None for name in OPENING_CRITERIA)]
    criteria = {name: round(_mean([scores[name] or 0.0 for scores in whole]), 2) for name in OPENING_CRITERIA}
    return OpeningRow(criteria, round(_mean(list(criteria.values())), 2), len(whole), len(instances) - len(whole))


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
