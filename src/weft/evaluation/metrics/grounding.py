"""Referring expressions: does the box that a reply names lie on the object? Right from an IoU of 0.5 on.

A grammar says how a model writes boxes; a reply that does not follow it has no box, which scores 0 and is counted.

    mm-interleaved   (x1,y1)(x2,y2) on a grid of 0..999, somewhere in the reply; nothing between the brackets
    unit             [x1, y1, x2, y2] as fractions of the picture
    coco             [x, y, width, height] in whole pixels, the last ones included: areas as in the data set's demo

The released scorer of MM-Interleaved computes in single precision, so an IoU that is a half exactly may fall to either
side, as it does there.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weft.errors import UsageError
from weft.evaluation.metrics.scores import Scores, mean_of, same_length

Box = tuple[float, float, float, float]
"""(x1, y1, x2, y2)."""
RIGHT = 0.5
GRID = 999
_CORNERS = re.compile(r"\((.*?)\)\((.*?)\)")
_LIST = re.compile(r"\[([^\[\]]*)\]")


def parse_corners(text: str) -> Box | None:
    """The first two brackets that touch, with two numbers in each; None where the first pair holds something else."""
    found = _CORNERS.search(text)
    corners = [_numbers(group, 2) for group in found.groups()] if found else [None]
    first, last = corners[0], corners[-1]
    return None if first is None or last is None else (first[0], first[1], last[0], last[1])


def parse_list(text: str) -> Box | None:
    """The four numbers of the first square brackets."""
    found = _LIST.search(text)
    numbers = _numbers(found[1], 4) if found else None
    return None if numbers is None else (numbers[0], numbers[1], numbers[2], numbers[3])


def _numbers(text: str, count: int) -> list[float] | None:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(math.isfinite(n) for n in numbers) else None


def to_pixels(box: Box, width: float, height: float, grid: float, precision: type = np.float64) -> Box:
    """A box on a grid of 0..`grid` in pixels of a picture, and of this precision in all that is computed from it."""
    scaled = np.array(box, precision) / precision(grid) * np.array((width, height, width, height), precision)
    return (scaled[0], scaled[1], scaled[2], scaled[3])


def from_pixels(box: Box, width: float, height: float, grid: float) -> Box:
    """Back again."""
    x, y = grid / width, grid / height
    return (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def with_size(box: Box) -> Box:
    """Corners as (x, y, width, height)."""
    return (box[0], box[1], box[2] - box[0], box[3] - box[1])


def iou(a: Box, b: Box) -> float:
    """Intersection over union, without a pixel added; 0 where both are empty."""
    return _iou(a, b, extra=0.0)


def iou_whole_pixels(a: Box, b: Box) -> float:
    """The same of [x, y, width, height] with its last pixels included, and nothing shared by boxes that only touch."""
    ends = [(x, y, x + width - 1, y + height - 1) for x, y, width, height in (a, b)]
    return _iou(ends[0], ends[1], extra=1.0)


def _iou(a: Box, b: Box, extra: float) -> float:
    def area(box: Box) -> float:
        return (box[2] - box[0] + extra) * (box[3] - box[1] + extra)

    left, top, right, bottom = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    shared = area((left, top, right, bottom)) if right > left and bottom > top else 0.0
    union = area(a) + area(b) - shared
    return shared / union if union else 0.0


@dataclass(frozen=True)
class Grammar:
    """How boxes are written, what their numbers count, and how two are compared."""

    parse: Callable[[str], Box | None]
    grid: float | None
    """Numbers are 0..grid over the picture; None: they are pixels."""
    compare: Callable[[Box, Box], float]
    precision: type = np.float64

    def write(self, box: Box, width: float, height: float) -> Box:
        """Corners in pixels of a picture, as numbers of this grammar."""
        return with_size(box) if self.grid is None else from_pixels(box, width, height, self.grid)


GRAMMARS: Mapping[str, Grammar] = {
    "mm-interleaved": Grammar(parse_corners, GRID, iou, np.float32),
    "unit": Grammar(parse_list, 1, iou),
    "coco": Grammar(parse_list, None, iou_whole_pixels),
}


@dataclass(frozen=True)
class Grounding:
    accuracy: Scores
    iou: Scores
    boxes: tuple[Box | None, ...]
    """As read, in the grammar's own numbers; None where the reply has no box."""

    @property
    def unparsed(self) -> int:
        return sum(box is None for box in self.boxes)


def grounding_accuracy(
    replies: Sequence[str], boxes: Sequence[Box], sizes: Sequence[tuple[float, float]], *, grammar: str
) -> Grounding:
    """Share of replies whose box reaches an IoU of 0.5.

    Args:
        boxes: the objects', in the grammar's numbers.
        sizes: (width, height) of the pictures in pixels, in which boxes are compared.
        grammar: a row of `GRAMMARS`.
    """
    same_length("grounding_accuracy", replies=replies, boxes=boxes, sizes=sizes)
    if grammar not in GRAMMARS:
        raise UsageError(f"no grammar of boxes is called {grammar!r}", fix=f"one of {', '.join(GRAMMARS)}")
    rules = GRAMMARS[grammar]
    read = [rules.parse(reply) for reply in replies]
    values = []
    for found, box, size in zip(read, boxes, sizes, strict=True):
        ours, theirs = (
            each if each is None or rules.grid is None else to_pixels(each, *size, rules.grid, rules.precision)
            for each in (found, box)
        )
        values.append(0.0 if ours is None or theirs is None else float(rules.compare(ours, theirs)))
    return Grounding(mean_of([float(value >= RIGHT) for value in values]), mean_of(values), tuple(read))
