"""A picture and its caption."""

from typing import Any, Literal

from weft.data.sources.draft import Draft, coin
from weft.data.sources.fields import of_type
from weft.data.stage import RecordError
from weft.document import Part, Turn, assistant

Order = Literal["random", "image_first", "text_first"]


def pair(draft: Draft, name: str, picture: list[Part], caption: str, field: str, order: Order) -> list[Turn]:
    """One turn with both.

    Args:
        name: of the document: `random` is drawn from it.
    """
    text = draft.text(caption, field)
    image_first = coin(name) if order == "random" else order == "image_first"
    return [assistant(*picture, *text) if image_first else assistant(*text, *picture)]


def caption_of(value: Any, field: str, *, lower: bool = False) -> str:
    """A caption, or several joined by spaces."""
    if isinstance(value, list):
        value = " ".join(of_type(piece, str, f"{field}[{i}]") for i, piece in enumerate(value))
    text = of_type(value, str, field)
    if not text.strip():
        raise RecordError("empty_value", f"field {field} is empty", field=field)
    return text.lower() if lower else text
