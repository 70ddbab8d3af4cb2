"""Documents from which nothing can be learnt."""

from typing import Literal

from weft.config import Config
from weft.data.stage import Loss, Outcome, Stage
from weft.document import Document, Text, Turn


class HasAnswer(Config):
    """Keeps documents with a turn that training counts and that holds something."""

    kind: Literal["has_answer"] = "has_answer"


def build(config: HasAnswer) -> Stage:
    def stage(document: Document) -> Outcome:
        if any(_is_learnt(turn) and _is_filled(turn) for turn in document.turns):
            return document, ()
        return None, (Loss("record", "no_answer", "no assistant turn holds a text or a picture", "messages"),)

    return stage


def _is_learnt(turn: Turn) -> bool:
    return turn.role == "assistant" if turn.loss is None else turn.loss


def _is_filled(turn: Turn) -> bool:
    return any(not isinstance(part, Text) or part.text.strip() for part in turn.parts)
