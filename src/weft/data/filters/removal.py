"""Pictures taken out of a document one by one, or the whole document for the first of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from weft.data.stage import Loss, Outcome, Stage
from weft.document import Document, Image, Part, Turn
from weft.errors import ImageError

Costs = Literal["record", "image"]


class Problem(NamedTuple):
    reason: str
    message: str
    """With the value and the threshold, where there are such."""
    value: float | None = None
    threshold: float | None = None


def without(document: Document, problem: Callable[[Image, int], Problem | None], costs: Costs) -> Outcome:
    """What is left without the pictures that have a problem.

    Args:
        problem: of a picture and its number in the document.
        costs: what such a picture takes with it: the `record`, or the `image` alone.
    """
    losses: list[Loss] = []
    turns, number = [], 0
    for i, turn in enumerate(document.turns):
        parts: list[Part] = []
        for j, part in enumerate(turn.parts):
            found = None
            if isinstance(part, Image):
                found, number = problem(part, number), number + 1
            if found is None:
                parts.append(part)
            else:
                assert isinstance(part, Image)
                reason, message, value, threshold = found
                at = f"messages[{i}].content[{j}]"
                losses.append(Loss("image", reason, message, at, part.path, value, threshold))
                if costs == "record":
                    return None, (replace(losses[0], what="record"),)
        turns.append(Turn(turn.role, tuple(parts), turn.loss))
    return (Document(tuple(turns), document.id, document.meta), tuple(losses)) if losses else (document, ())


def rejected(
    reason: str,
    message: str,
    value: float | None = None,
    threshold: float | None = None,
    *,
    field: str | None = None,
    image: str | None = None,
) -> Outcome:
    return None, (Loss("record", reason, message, field, image, value, threshold),)


def decoding(stage: Stage) -> Stage:
    """The stage, where nothing decoded the pictures before: one that cannot be decoded costs the document."""

    def guarded(document: Document) -> Outcome:
        try:
            return stage(document)
        except ImageError as error:
            return rejected(error.reason, error.what)

    return guarded


def about(document: Document, image: Image) -> Mapping[str, Any]:
    """What the source knows of a picture."""
    pictures = document.meta.get("images")
    known = pictures.get(image.path) if isinstance(pictures, dict) else None
    return known if isinstance(known, dict) else {}
