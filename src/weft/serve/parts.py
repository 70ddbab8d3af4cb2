"""An answer as it is made, in pieces that each shape writes down in its own way: ordered, whole pictures, one end."""

import asyncio
import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from weft.errors import WeftError
from weft.generation import Event, Finished, ImageBegin, ImageReady, Reason, TextDelta, Usage
from weft.images import encode_png

UNEXPECTED = "something went wrong here"
"""All that is told of an error that nobody thought of: what is in it may be anybody's."""


class Broken(WeftError):
    """The model came to where it could not go on."""

    code = "broken_answer"


@dataclass(frozen=True)
class TextPiece:
    """More text of the part with this place among the answer's parts, texts and pictures counted together from 0."""

    place: int
    text: str


@dataclass(frozen=True)
class TextEnd:
    place: int
    text: str
    """All of it."""
    is_cut: bool = False
    """It would have gone on."""


@dataclass(frozen=True)
class PictureBegin:
    place: int


@dataclass(frozen=True)
class Picture:
    place: int
    png: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class End:
    reason: Reason
    usage: Usage


Piece = TextPiece | TextEnd | PictureBegin | Picture | End


async def pieces(events: AsyncGenerator[Event]) -> AsyncGenerator[Piece]:
    """Events of one request -> its pieces, each text part ended before what comes after it.

    Raises:
        Broken: the answer cannot be ended.
    """
    place, text = -1, ""
    async with aclosing(events):
        async for event in events:
            if text and not isinstance(event, TextDelta):
                yield TextEnd(place, text, isinstance(event, Finished) and event.reason == "length")
                text = ""
            match event:
                case TextDelta():
                    place += not text
                    text += event.text
                    yield TextPiece(place, event.text)
                case ImageBegin():
                    place += 1
                    yield PictureBegin(place)
                case ImageReady(picture=picture):
                    # what takes long is done elsewhere: others are served meanwhile
                    yield Picture(place, await asyncio.to_thread(encode_png, picture))
                case Finished(reason="invalid_logits"):
                    raise Broken("the model could choose no token")
                case Finished(reason=reason, usage=usage):
                    yield End(reason, usage)
