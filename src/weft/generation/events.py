"""What an engine reports while it writes, and an answer put together from it.

Events of one request come in this order, however many other requests run beside it:

    (TextDelta | ImageBegin ImageReady)* Finished

A picture that was begun is always made ready, unless the request is cancelled or the model breaks down inside it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from weft.document import Image, Part, Text
from weft.images import encode_png

if TYPE_CHECKING:
    from PIL import Image as PILImage

Reason = Literal["stop", "length", "cancelled", "invalid_logits"]
"""The model ended its turn; a budget cut its text off; the caller gave up; no token could be chosen."""


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    text_tokens: int
    """Ordinary text written; the tokens around pictures and at the end are not counted."""
    image_tokens: int
    """Patches written."""


@dataclass(frozen=True)
class TextDelta:
    """More text: whole characters, never empty."""

    request: int
    text: str


@dataclass(frozen=True)
class ImageBegin:
    """A picture begins; `index` counts the answer's pictures from 0."""

    request: int
    index: int


@dataclass(frozen=True)
class ImageReady:
    request: int
    index: int
    picture: "PILImage.Image"


@dataclass(frozen=True)
class Finished:
    """The last event of a request."""

    request: int
    reason: Reason
    usage: Usage


Event = TextDelta | ImageBegin | ImageReady | Finished


@dataclass(frozen=True)
class Answer:
    """Text and pictures (PNG) in the order in which they were written."""

    parts: tuple[Part, ...]
    reason: Reason
    usage: Usage

    @property
    def text(self) -> str:
        """The text parts, one per line."""
        return "\n".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> Iterator[Image]:
        return (part for part in self.parts if isinstance(part, Image))


def collect(events: Iterable[Event]) -> Answer:
    """The answer told by all events of one request, up to its `Finished`.

    Raises:
        ValueError: the events end before the request does, or belong to several requests.
    """
    parts: list[Part] = []
    request: int | None = None
    for event in events:
        if request not in (None, event.request):
            raise ValueError(f"events of requests {request} and {event.request} are mixed; collect each by itself")
        request = event.request
        match event:
            case TextDelta(text=text) if parts and isinstance(parts[-1], Text):
                parts[-1] = Text(parts[-1].text + text)
            case TextDelta(text=text):
                parts.append(Text(text))
            case ImageReady(picture=picture):
                parts.append(Image(data=encode_png(picture)))
            case Finished(reason=reason, usage=usage):
                return Answer(tuple(parts), reason, usage)
    raise ValueError("the events end before the request is finished")
