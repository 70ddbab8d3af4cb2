"""What forms of conversations carry: one text a turn, with a mark where a picture stands, and the pictures in a list.

A turn of more parts becomes one text, a line for each part. What the readers of such files (`sources/rules/
conversations.py`) would not give back is a lack.
"""

import json
from dataclasses import dataclass
from typing import Any

from weft.data.exchange.form import WITHIN_RECORD, Fitted, Lack, within_record
from weft.data.sources.draft import MAX_TEXT, clean
from weft.document import Document, Image, Part, Text, Turn

MARK = "<image>"
_LACKS = {
    "blank": "texts without a character, and turns without a part",
    "characters": "control characters, and Unicode that is not in its composed form (NFC)",
    "mark_in_text": "texts that hold a mark of the form itself, such as <image>",
    "side_by_side": "two texts side by side: they become one, on two lines",
    "system_picture": "pictures in the system's turn",
    "text_too_long": f"texts of more than {MAX_TEXT:,} characters",
    "white_space": "white space at the ends of texts beside pictures",
    "too_large": WITHIN_RECORD["too_large"],
}
_ANSWER_PICTURE = "pictures in an answer: its trainers show pictures to a model, and do not make it draw them"
_LOSS = "whether training counts a turn"
_ORDER = "turns in another order than user, assistant, user, assistant, ..., and after one of the system at most"
_SYSTEM = "a turn of the system"


@dataclass(frozen=True)
class Limits:
    """What a form of conversations has a place for, beside user and assistant speaking."""

    marks: tuple[str, ...] = (MARK,)
    """Words that stand for pictures and other things, so that no text may hold them."""
    answer_pictures: bool = True
    loss: bool = False
    system: bool = True
    any_order: bool = False

    @property
    def lacks(self) -> dict[str, str]:
        missing = {
            "answer_picture": (self.answer_pictures, _ANSWER_PICTURE),
            "loss": (self.loss, _LOSS),
            "order": (self.any_order, _ORDER),
            "system": (self.system, _SYSTEM),
        }
        return {**_LACKS, **{reason: why for reason, (has, why) in missing.items() if not has}}


def fit(document: Document, limits: Limits) -> Fitted:
    """What is left of a document: its readers give exactly that back."""
    fitting = _Fitting(limits)
    turns = [made for turn in document.turns for made in fitting.turn(turn)]
    identity = None if document.id is None else fitting.clean(document.id)
    if not limits.any_order and not _alternates(turns):
        fitting.lack("order", ", ".join(turn.role for turn in turns) or "no turn is left")
    if not turns or fitting.is_hopeless:
        return None, tuple(fitting.lacks)
    fitted = Document(tuple(turns), identity, document.meta) if fitting.lacks else document
    _, more = within_record(Document(fitted.turns, identity, about(fitted)))
    return None if more else fitted, (*fitting.lacks, *more)


def texts_of(document: Document) -> list[tuple[str, str, bool | None]]:
    """Role, text with marks, and loss of every turn of a document that fits."""
    return [
        (turn.role, "\n".join(MARK if isinstance(part, Image) else part.text for part in turn.parts), turn.loss)
        for turn in document.turns
    ]


def about(document: Document) -> dict[str, Any]:
    """The fields beside the conversation: `id`, and `meta` as JSON, for columns have one type."""
    fields: dict[str, Any] = {} if document.id is None else {"id": document.id}
    return fields | ({"meta": json.dumps(dict(document.meta), ensure_ascii=False)} if document.meta else {})


def paths_of(document: Document) -> list[str]:
    return [str(image.path) for image in document.images]


class _Fitting:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.lacks: list[Lack] = []

    @property
    def is_hopeless(self) -> bool:
        return any(lack.reason in ("order", "text_too_long") for lack in self.lacks)

    def lack(self, reason: str, message: str) -> None:
        self.lacks.append(Lack(reason, message))

    def clean(self, text: str) -> str:
        cleaned = clean(text)
        if cleaned != text:
            self.lack("characters", f"in {text[:40]!r}")
        return cleaned

    def turn(self, turn: Turn) -> list[Turn]:
        """The turn, or nothing."""
        if turn.role == "system" and not self._limits.system:
            self.lack("system", "a turn of the system")
            return []
        if turn.loss is not None and not self._limits.loss:
            self.lack("loss", f"a turn with loss: {json.dumps(turn.loss)}")
        parts: list[Part] = []
        for part in turn.parts:
            found = self._picture(part, turn) if isinstance(part, Image) else self._text(part.text)
            if isinstance(found, Text) and parts and isinstance(parts[-1], Text):
                self.lack("side_by_side", f"{parts[-1].text[-20:]!r} and {found.text[:20]!r}")
                found = Text(f"{parts.pop().text}\n{found.text}")  # type: ignore[union-attr]  # it is a Text
            parts += [found] if found else []
        if any(isinstance(part, Image) for part in parts):
            parts = [self._stripped(part) for part in parts]
        if not parts:
            self.lack("blank", "a turn without a part")
            return []
        for part in parts:
            if isinstance(part, Text) and len(part.text) > MAX_TEXT:
                self.lack("text_too_long", f"{len(part.text):,} characters")
        return [Turn(turn.role, tuple(parts), turn.loss if self._limits.loss else None)]

    def _picture(self, image: Image, turn: Turn) -> Image | None:
        if turn.role == "system":
            self.lack("system_picture", "a picture in the system's turn")
            return None
        if turn.role == "assistant" and not self._limits.answer_pictures:
            self.lack("answer_picture", "a picture in an answer")
            return None
        return image

    def _text(self, text: str) -> Text | None:
        text = self.clean(text)
        while mark := next((mark for mark in self._limits.marks if mark in text), None):
            self.lack("mark_in_text", f"a text holds {mark}")
            text = clean(text.replace(mark, ""))
        if not text.strip():
            self.lack("blank", "a text without a character")
            return None
        return Text(text)

    def _stripped(self, part: Part) -> Part:
        if isinstance(part, Image) or part.text == part.text.strip():
            return part
        self.lack("white_space", f"of {part.text[:40]!r}")
        return Text(part.text.strip())


def _alternates(turns: list[Turn]) -> bool:
    said = turns[1:] if turns and turns[0].role == "system" else turns
    pairs = len(said) // 2
    return bool(said) and [turn.role for turn in said] == ["user", "assistant"] * pairs
