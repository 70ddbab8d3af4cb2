"""What sources flag as unsafe: scores of pages and pictures, faces, forced directions of writing."""

from typing import Any, Literal

from pydantic import Field

from weft.config import Config
from weft.data.filters.removal import Costs, Problem, about, rejected, without
from weft.data.stage import Outcome, Stage
from weft.document import Document, Image

OF_PAGES = ("porn_prob", "toxic_prob", "unsafe_prob", "punsafe")
OF_PICTURES = ("unsafe_prob", "punsafe", "porn_prob")


class Safety(Config):
    """Drops what a source's own scores call unsafe. Scores that are not there drop nothing."""

    kind: Literal["safety"] = "safety"
    max_unsafe: float = Field(0.5, gt=0, le=1)
    """Scores that reach it are too high."""
    on_unsafe_image: Costs = "record"
    faces: bool = True
    """Keep pictures in which the source found faces."""
    flags: tuple[str, ...] = ()
    """Flags in `meta.flags` that drop a document, such as bidi_override."""


def build(config: Safety) -> Stage:
    def stage(document: Document) -> Outcome:
        flags = document.meta.get("flags")
        flagged = sorted(set(config.flags).intersection(flags)) if isinstance(flags, list) else []
        if flagged:
            return rejected("flagged", f"flag {flagged[0]}")
        unsafe = _unsafe(document.meta, OF_PAGES, config.max_unsafe)
        if unsafe is not None:
            return rejected("unsafe", *unsafe)
        return without(document, lambda image, _: _problem(document, image, config), config.on_unsafe_image)

    return stage


def _problem(document: Document, image: Image, config: Safety) -> Problem | None:
    known = about(document, image)
    unsafe = _unsafe(known, OF_PICTURES, config.max_unsafe)
    if unsafe is not None:
        return Problem("unsafe_image", *unsafe)
    if known.get("faces") and not config.faces:
        return Problem("faces", "the source found faces in it, faces: false")
    return None


def _unsafe(known: Any, names: tuple[str, ...], limit: float) -> tuple[str, float, float] | None:
    """Message, score and limit."""
    scores = {name: known.get(name) for name in names}
    for name, score in scores.items():
        if isinstance(score, int | float) and score >= limit:
            return f"{name} is {score:.3f}, not below {limit:g}", float(score), limit
    return None
