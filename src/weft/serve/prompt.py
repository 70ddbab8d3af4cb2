"""The prompts of OpenAI's interfaces -> documents, and their settings -> `SamplingConfig`.

Answers come back as they were given: a turn of the assistant may hold pictures in every shape that this server sends.
"""

import base64
import binascii
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from weft.document import Document, Image, Part, Role, Text, Turn
from weft.errors import DocumentError, ImageError, UsageError
from weft.generation import SamplingConfig
from weft.images import decode_image
from weft.serve.files import is_address
from weft.serve.limits import Limits
from weft.serve.schema import Asked, ChatRequest, ImagesRequest, ResponsesRequest

ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
}  # fmt: skip
TEXTS = ("text", "input_text", "output_text")
_DATA_URL = re.compile(r"data:image/[a-z.+-]+;base64,", re.IGNORECASE)
_MARKDOWN = re.compile(r"(?:\n\n)?!\[[^\]\n]*\]\(([^()\s]+)\)(?:\n\n)?")
"""With the empty lines that an answer has around it."""
_KNOWN = frozenset({"role", "content", "images", "name", "id", "type", "status", "phase"})
"""Fields of a message that say something here or nothing anywhere; others must be empty."""
_DECODING = threading.Lock()
"""One picture at a time: the memory that a large one takes is bounded, that of many is not."""


class Kept(Protocol):
    """Pictures that this server keeps for a while."""

    def find(self, address: str) -> bytes | None:
        """The bytes of the picture with this address, of the caller's own; None: it is none of ours, or it is gone."""
        ...


def of_chat(request: ChatRequest, limits: Limits, kept: Kept) -> Document:
    """
    Raises:
        DocumentError: a message is none; names it.
        ImageError: a picture is none, or too large.
    """
    reader = _Reader(limits, kept)
    reader.check_turns(len(request.messages))
    return reader.document([_chat_turn(reader, message, i) for i, message in enumerate(request.messages)])


def of_responses(request: ResponsesRequest, limits: Limits, kept: Kept) -> Document:
    """
    Raises:
        DocumentError: an item is none; names it.
        ImageError: a picture is none, or too large.
    """
    reader = _Reader(limits, kept)
    turns = (
        [] if request.instructions is None else [Turn("system", (reader.text(request.instructions, "instructions"),))]
    )
    items = [{"role": "user", "content": request.input}] if isinstance(request.input, str) else request.input
    for i, item in enumerate(items):
        turns.append(_item(reader, item, f"input[{i}]"))
    return reader.document(_joined(turns))


def of_images(request: ImagesRequest, limits: Limits, kept: Kept) -> Document:
    reader = _Reader(limits, kept)
    return reader.document([Turn("user", (reader.text(request.prompt, "prompt"),))])


class _Reader:
    """Reads parts, and counts what they use of a request's limits."""

    def __init__(self, limits: Limits, kept: Kept) -> None:
        self._limits, self._kept = limits, kept
        self._characters = self._images = self._bytes = 0

    def check_turns(self, count: int) -> None:
        if count > self._limits.turns:
            raise DocumentError(f"{count} turns, and {self._limits.turns} are allowed", fix="leave the oldest out")

    def document(self, turns: Sequence[Turn]) -> Document:
        self.check_turns(len(turns))
        if all(part == Text("") for turn in turns for part in turn.parts):
            raise DocumentError("the prompt is empty", fix="say what to write")
        return Document(tuple(turns))

    def text(self, text: Any, at: str) -> Text:
        if not isinstance(text, str):
            raise DocumentError(f"field {at} must be a string, got {type(text).__name__}", where=at)
        self._characters += len(text)
        if self._characters > self._limits.text_characters:
            raise DocumentError(f"the texts have more than {self._limits.text_characters:,} characters", where=at)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DocumentError(f"field {at} holds a lone surrogate", where=at) from error
        return Text(text)

    def parts(self, content: Any, at: str) -> tuple[Part, ...]:
        if content is None:
            return ()
        if isinstance(content, str):
            return tuple(self._marked(content, at))
        if not isinstance(content, list):
            raise DocumentError(f"field {at} must be a string or a list of parts", where=at)
        return tuple(part for i, each in enumerate(content) for part in self._part(each, f"{at}[{i}]"))

    def picture(self, address: Any, at: str) -> Image:
        """A picture from a data URL, from base64, or from an address of this server."""
        if isinstance(address, dict):
            address = address.get("url")
        if not isinstance(address, str) or not address:
            raise DocumentError(f"field {at} must hold a data URL", where=at)
        head = _DATA_URL.match(address)
        if head is not None:
            return self.base64(address[head.end() :], at)
        if is_address(address):
            return self.kept(address, at)
        raise ImageError(
            "a picture is named by an address; this server fetches nothing",
            where=at,
            fix="send it as data:image/png;base64,...",
            reason="image_address",
        )

    def kept(self, address: str, at: str) -> Image:
        """A picture of an earlier answer."""
        data = self._kept.find(address)
        if data is None:
            raise ImageError(
                "a picture is named by an address where there is none, or no longer",
                where=at,
                fix="send it as data:image/png;base64,...",
                reason="image_address",
            )
        return self._checked(data, at)

    def base64(self, text: Any, at: str) -> Image:
        if not isinstance(text, str):
            raise DocumentError(f"field {at} must be base64", where=at)
        if len(text) * 3 // 4 > self._limits.image_bytes + 2:
            raise ImageError(f"a picture has more than {self._limits.image_bytes:,} bytes", where=at)
        try:
            return self._checked(base64.b64decode(text, validate=True), at)
        except (binascii.Error, ValueError) as error:
            raise ImageError("a picture is not base64", where=at, reason="image_base64") from error

    def _checked(self, data: bytes, at: str) -> Image:
        self._images, self._bytes = self._images + 1, self._bytes + len(data)
        if self._images > self._limits.images:
            raise ImageError(f"more than {self._limits.images} pictures", where=at, fix="send fewer")
        if len(data) > self._limits.image_bytes or self._bytes > self._limits.images_bytes:
            raise ImageError("the pictures have too many bytes", where=at, fix="save them smaller")
        with _DECODING:
            decode_image(data, where=at, max_pixels=self._limits.image_pixels)
        return Image(data)

    def _part(self, part: Any, at: str) -> Iterator[Part]:
        if not isinstance(part, dict):
            raise DocumentError(f"field {at} must be an object with a type", where=at)
        kind = part.get("type")
        if kind in TEXTS:
            yield self.text(part.get("text"), f"{at}.text")
        elif kind in ("image_url", "input_image"):
            yield self.picture(part.get("image_url"), f"{at}.image_url")
        else:
            raise DocumentError(f"field {at}.type must be text or image_url", where=at)

    def _marked(self, text: str, at: str) -> Iterator[Part]:
        """A string in which an earlier answer's pictures may stand as Markdown."""
        end = 0
        for mark in _MARKDOWN.finditer(text):
            if is_address(mark[1]):
                if text[end : mark.start()]:
                    yield self.text(text[end : mark.start()], at)
                yield self.kept(mark[1], at)
                end = mark.end()
        if text[end:] or not end:
            yield self.text(text[end:], at)


def _chat_turn(reader: _Reader, message: Any, number: int) -> Turn:
    at = f"messages[{number}]"
    role = _role(message.get("role"), at)
    _check_fields(message, at)
    parts = reader.parts(message.get("content"), f"{at}.content")
    pictures = message.get("images")
    if not pictures:
        return Turn(role, parts)
    if not isinstance(pictures, list):
        raise DocumentError(f"field {at}.images must be a list", where=at)
    return Turn(role, tuple(_in_place(reader, parts, pictures, at)))


def _in_place(reader: _Reader, parts: Sequence[Part], pictures: Sequence[Any], at: str) -> Iterator[Part]:
    """Text with its pictures at their `text_offset`; those without one follow the text."""
    text = "".join(part.text for part in parts if isinstance(part, Text))
    done = 0
    for i, each in enumerate(pictures):
        if not isinstance(each, dict):
            raise DocumentError(f"field {at}.images[{i}] must be an object", where=at)
        offset = each.get("text_offset", len(text))
        if type(offset) is not int or not done <= offset <= len(text):
            raise DocumentError(f"field {at}.images[{i}].text_offset is no place in the text, in order", where=at)
        if text[done:offset]:
            yield Text(text[done:offset])
        yield reader.picture(each.get("image_url"), f"{at}.images[{i}].image_url")
        done = offset
    if text[done:]:
        yield Text(text[done:])
    yield from (part for part in parts if isinstance(part, Image))


def _item(reader: _Reader, item: Any, at: str) -> Turn:
    kind = item.get("type", "message")
    if kind == "message":
        _check_fields(item, at)
        return Turn(_role(item.get("role"), at), reader.parts(item.get("content"), f"{at}.content"))
    if kind == "image_generation_call":
        result = item.get("result")
        # no base64 holds a colon
        read = reader.picture if isinstance(result, str) and (":" in result or is_address(result)) else reader.base64
        return Turn("assistant", (read(result, f"{at}.result"),))
    raise DocumentError(f"field {at}.type must be message or image_generation_call", where=at)


def _check_fields(message: Mapping[str, Any], at: str) -> None:
    if any(value for name, value in message.items() if name not in _KNOWN):
        known = ", ".join(sorted(_KNOWN))
        raise DocumentError(f"{at} has a field that cannot be heeded; these can: {known}", where=at)


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """Items of one answer are one turn."""
    found: list[Turn] = []
    for turn in turns:
        if found and found[-1].role == turn.role == "assistant":
            found[-1] = Turn("assistant", (*found[-1].parts, *turn.parts))
        else:
            found.append(turn)
    return found


def _role(role: Any, at: str) -> Role:
    if not isinstance(role, str) or role not in ROLES:
        raise DocumentError(f"field {at}.role must be one of {', '.join(ROLES)}", where=f"{at}.role")
    return ROLES[role]


# --- settings -------------------------------------------------------------------------------------------------------


def sampling_of(
    request: Asked,
    limits: Limits,
    *,
    seed: int,
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    first: Literal["any", "image"] = "any",
    max_images: int | None = None,
    min_images: int = 0,
) -> SamplingConfig:
    """What a request asks of its answer, within the server's limits.

    Args:
        seed: for a request that brings none.

    Raises:
        ConfigError: the values do not go together.
    """
    from weft.config import load_config

    wanted = request.max_images if max_images is None else max_images
    values: dict[str, Any] = {
        "seed": seed if request.seed is None else request.seed,
        "max_images": limits.answer_images if wanted is None else wanted,
        "min_images": max(min_images, request.min_images or 0),
        "max_text_tokens": limits.answer_text_tokens,
        "first": first,
    }
    if values["max_images"] > limits.answer_images:
        raise UsageError(
            f"max_images = {values['max_images']}, and this server allows {limits.answer_images}", where="max_images"
        )
    if max_tokens is not None:
        values["max_tokens"] = max_tokens
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if value is not None:
            values[f"text.{name}"] = values[f"image.{name}"] = value
    if request.image_size not in (None, "auto"):
        values["size"] = tuple(map(int, request.image_size.split("x")))
    if request.cfg_scale is not None:
        values["guidance"] = values["diffusion.guidance"] = request.cfg_scale
    if request.num_inference_steps is not None:
        values["diffusion.steps"] = request.num_inference_steps
    return load_config(SamplingConfig, overrides=values)
