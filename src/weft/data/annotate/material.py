"""What of a document is judged, rewritten and split: all its parts but an instruction that it begins with."""

from dataclasses import dataclass
from typing import Any

from weft.document import Document, Image, Part, Text, Turn

TASKS = {
    "mmc4": "completion",
    "obelics": "completion",
    "omnicorpus": "completion",
    "mmdialog": "dialogue",
    "vist": "storytelling",
    "pororo": "storytelling",
    "flintstones": "storytelling",
    "youcook2": "script",
    "comm": "script",
    "wikiweb2m": "knowledge",
}
"""Source -> what its documents can teach."""


@dataclass(frozen=True)
class Material:
    instruction: str | None
    """The text that the document begins with, where the user says nothing else."""
    parts: tuple[Part, ...]
    turns: tuple[Turn, ...]
    """That hold the parts."""

    @property
    def texts(self) -> list[str]:
        return [part.text for part in self.parts if isinstance(part, Text)]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def material_of(document: Document) -> Material:
    turns = tuple(turn for turn in document.turns if turn.role != "system" or _shows(turn))
    is_asked = len(turns) == 2 and [turn.role for turn in turns] == ["user", "assistant"]
    if is_asked and len(turns[0].parts) == 1 and isinstance(turns[0].parts[0], Text):
        return Material(turns[0].parts[0].text, turns[1].parts, turns[1:])
    return Material(None, tuple(part for turn in turns for part in turn.parts), turns)


def _shows(turn: Turn) -> bool:
    return any(isinstance(part, Image) for part in turn.parts)


def instruction_of(document: Document) -> str | None:
    """What was annotated, else what the source gave."""
    annotated = document.meta.get("instruction")
    return annotated if isinstance(annotated, str) else material_of(document).instruction


def source_of(document: Document) -> str:
    """`mmc4` of `mmc4:...`; documents of other forms have none."""
    source, colon, _ = (document.id or "").partition(":")
    return source if colon else ""


def task_of(document: Document) -> str:
    """By the source, unless `meta.task` names another one of those tasks."""
    known = document.meta.get("task")
    is_task = isinstance(known, str) and known in TASKS.values()
    return str(known) if is_task else TASKS.get(source_of(document), "completion")


def noted(document: Document, **entries: Any) -> Document:
    """The document with more in its `meta`; what is there stays, and an object there grows."""
    meta = dict(document.meta)
    for key, value in entries.items():
        old = meta.get(key)
        meta[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return Document(document.turns, document.id, meta)


def with_texts(document: Document, texts: list[str]) -> Document:
    """The document with the texts of its material, in order, replaced."""
    rest = iter(texts)
    inside = {id(turn) for turn in material_of(document).turns}
    turns = tuple(
        Turn(turn.role, tuple(Text(next(rest)) if isinstance(p, Text) else p for p in turn.parts), turn.loss)
        if id(turn) in inside
        else turn
        for turn in document.turns
    )
    return Document(turns, document.id, document.meta)
