"""Stories and how-tos in steps: a sentence, then its picture."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from weft.data.sources.draft import Draft
from weft.data.sources.fields import Object
from weft.document import Part


@dataclass(frozen=True)
class Step:
    text: str
    picture: str
    """Path; a suffix may be missing."""
    at: str
    """The field that holds it."""
    about: Object = field(default_factory=dict)


def steps(draft: Draft, story: Iterable[Step]) -> list[Part]:
    parts: list[Part] = []
    for step in story:
        parts += draft.text(step.text, step.at)
        parts += draft.image(step.picture, step.at, about=step.about, probe=True)
    return parts
