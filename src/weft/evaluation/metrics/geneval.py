"""Does a picture show the objects that its prompt named? GenEval's verdicts (Ghosh et al. 2023, arXiv:2310.11513).

Detections come in; no network runs here. The definition is the released code:

* Boxes count from a score above 0.3, in prompts about counting 0.9; the 16 best of a class; overlapping ones all stay.
* Clauses are looked at in order, each at the best `count` boxes of its class: that many there are, that many have the
  colour, and every one of them stands so towards every box of the clause that `position` names, if that one was met.
* A picture is right if every clause to include is met and none to exclude.
* The overall score is the mean of the tags' scores, not of the pictures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import UsageError
from weft.evaluation.metrics.scores import Scores, mean_of, same_length

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
"""What a classifier of colours compares a crop with, the mean of the three for each colour."""
BACKGROUND = (0x99, 0x99, 0x99)
"""What is painted over everything outside of an object before its colour is judged."""
SCORE, COUNTING_SCORE = 0.3, 0.9
MOST = 16
"""Boxes of a class."""
SHRINK = 0.1
"""Of both sizes together, before the offset of two centres says anything."""
NEXT_TO_NOTHING = 1e-3

Box = tuple[float, float, float, float]
"""(x1, y1, x2, y2)."""


@dataclass(frozen=True)
class Detection:
    box: Box
    score: float
    color: str | None = None
    """One of `COLORS`, needed where a prompt asks for one."""


Detections = Mapping[str, Sequence[Detection]]
"""By name of the class."""


@dataclass(frozen=True)
class Clause:
    """At least `count` objects of a class."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None
    """`left of`, `right of`, `above` or `below`, and of which included clause, by its number from 0."""


@dataclass(frozen=True)
class Wanted:
    """What a prompt is checked for."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def read_wanted(metadata: Mapping[str, Any]) -> Wanted:
    """A line of the released evaluation_metadata.jsonl.

    Raises:
        UsageError: it is none.
    """
    try:
        include, exclude = (
            tuple(_read_clause(each) for each in metadata.get(key, ())) for key in ("include", "exclude")
        )
        return Wanted(metadata["tag"], include, exclude)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"this is not the metadata of a GenEval prompt: {error!r}",
            where=str(metadata.get("prompt", "GenEval")),
            fix="give a line of evaluation_metadata.jsonl",
        ) from error


def _read_clause(fields: Mapping[str, Any]) -> Clause:
    position = fields.get("position")
    towards = None if position is None else (str(position[0]), int(position[1]))
    return Clause(fields["class"], int(fields["count"]), fields.get("color"), towards)


def read_detections(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Detection]]:
    """{class: [{"box": [x1, y1, x2, y2], "score", "color"}, ...]}.

    Raises:
        UsageError: a box has not four numbers, or no score.
    """
    read: dict[str, list[Detection]] = {}
    for name, boxes in found.items():
        for each in boxes:
            try:
                x1, y1, x2, y2 = map(float, each["box"])
                read.setdefault(name, []).append(Detection((x1, y1, x2, y2), float(each["score"]), each.get("color")))
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(
                    f"a detection cannot be read: {each!r}", where=f"GenEval, {name}", fix="give box, score and color"
                ) from error
    return read


@dataclass(frozen=True)
class Verdict:
    right: bool
    reasons: tuple[str, ...] = ()
    """Why not, in the released code's words."""


def verdict(detections: Detections, wanted: Wanted, *, overlap: float = 1.0) -> Verdict:
    """Of one picture.

    Args:
        overlap: boxes that overlap a better one of their class by this IoU are dropped; 1: none is.

    Raises:
        UsageError: a clause needs the colour of a detection that has none, or names a clause that is not before it.
    """
    least = COUNTING_SCORE if wanted.tag == "counting" else SCORE
    kept = {name: _keep(boxes, least, overlap) for name, boxes in detections.items()}
    reasons: list[str] = []
    met: list[list[Detection] | None] = []
    for clause in wanted.include:
        best = kept.get(clause.name, [])[: clause.count]
        wrong = _why_not(clause, best, met)
        reasons += [wrong] if wrong else []
        met.append(None if wrong else best)
    for clause in wanted.exclude:
        there = len(kept.get(clause.name, []))
        if there >= clause.count:
            reasons.append(f"expected {clause.name}<{clause.count}, found {there}")
    return Verdict(not reasons, tuple(reasons))


def _keep(boxes: Sequence[Detection], least: float, overlap: float) -> list[Detection]:
    """Best first; of equal scores the later, as the released code sorts."""
    ordered = [each for each in sorted(boxes, key=lambda each: each.score)[::-1] if each.score > least][:MOST]
    kept: list[Detection] = []
    for each in ordered:
        if overlap == 1 or all(_iou(other.box, each.box) < overlap for other in kept):
            kept.append(each)
    return kept


def _why_not(clause: Clause, best: list[Detection], met: list[list[Detection] | None]) -> str | None:
    if len(best) < clause.count:
        return f"expected {clause.name}>={clause.count}, found {len(best)}"
    if clause.color is not None:
        colors = [each.color for each in best]
        if None in colors:
            raise UsageError(
                f"the color of a {clause.name} is asked for, and a detection has none",
                where="GenEval",
                fix="classify the colors of the detections",
            )
        if colors.count(clause.color) < clause.count:
            others = ", ".join(f"{colors.count(each)} {each}" for each in COLORS if each in colors)
            found = f"{colors.count(clause.color)} {clause.color}; and {others}"
            return f"expected {clause.color} {clause.name}>={clause.count}, found {found}"
    if clause.position is not None:
        relation, number = clause.position
        if not 0 <= number < len(met):
            raise UsageError(f"{clause.name} is placed by clause {number}, which is not before it", where="GenEval")
        targets = met[number]
        if targets is None:
            return f"no target for {clause.name} to be {relation}"
        for each in best:
            for target in targets:
                found_relations = relations(each.box, target.box)
                if relation not in found_relations:
                    return f"expected {clause.name} {relation} target, found {' and '.join(found_relations)} target"
    return None


def relations(a: Box, b: Box) -> tuple[str, ...]:
    """How `a` lies towards `b`: none, one or two of left of, right of, above, below."""
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    beyond = [
        math.copysign(max(abs(each) - SHRINK * size, 0.0), each) for each, size in zip(offset, sizes, strict=True)
    ]
    if all(abs(each) < NEXT_TO_NOTHING for each in beyond):
        return ()
    # by the whole distance: a pair that is barely apart may have no relation
    x, y = (each / math.hypot(*offset) for each in beyond)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return tuple(name for name, is_so in holds.items() if is_so)


def _iou(a: Box, b: Box) -> float:
    """With the last pixels included."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


@dataclass(frozen=True)
class GenEval:
    tags: Mapping[str, Scores]
    """Share of right pictures, in the order in which tags come up."""
    pictures: Scores
    """Of all pictures alike, which is not what papers print."""

    @property
    def value(self) -> float:
        """The mean of the tags' scores."""
        return mean_of([scores.value for scores in self.tags.values()]).value


def geneval(verdicts: Sequence[Verdict], tags: Sequence[str]) -> GenEval:
    """Of the verdict and the tag of each picture."""
    same_length("geneval", verdicts=verdicts, tags=tags)
    right = [float(each.right) for each in verdicts]
    by_tag = {
        tag: mean_of([value for value, its in zip(right, tags, strict=True) if its == tag])
        for tag in dict.fromkeys(tags)
    }
    return GenEval(by_tag, mean_of(right))
