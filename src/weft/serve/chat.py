"""`/v1/chat/completions`: text in one field and pictures in another with their places in it, or parts, or Markdown."""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from weft.errors import WeftError
from weft.serve.files import Own
from weft.serve.parts import UNEXPECTED, End, Picture, Piece, TextPiece
from weft.serve.schema import ChatRequest

log = logging.getLogger(__name__)
Json = dict[str, Any]


class Completion:
    """One answer in the making, and what each piece adds to it."""

    def __init__(self, request: ChatRequest, identity: str, created: int, own: Own) -> None:
        self._form, self._delivery, self._own = request.response_image_format, request.delivery, own
        self._head = {"id": f"chatcmpl-{identity}", "created": created, "model": request.model}
        self._text, self._pictures, self._parts = "", list[Json](), list[Json]()
        self.reason: str | None = None
        self.usage: Json | None = None

    def add(self, piece: Piece) -> Json | None:
        """The `delta` of a stream; None where nothing is told."""
        match piece:
            case TextPiece(text=text):
                return self._said(text)
            case Picture():
                return self._shown(piece)
            case End(reason=reason, usage=usage):
                self.reason = reason
                made = usage.text_tokens + usage.image_tokens
                self.usage = {
                    "prompt_tokens": usage.prompt_tokens,
                    "completion_tokens": made,
                    "total_tokens": usage.prompt_tokens + made,
                    "completion_tokens_details": {
                        "text_tokens": usage.text_tokens, "image_tokens": usage.image_tokens, "reasoning_tokens": 0,
                    },
                }  # fmt: skip
        return None

    def to_json(self) -> Json:
        message: Json = {"role": "assistant", "refusal": None}
        if self._form == "parts":
            message["content"] = self._parts
        else:
            message["content"] = self._text
            if self._form == "images":
                message["images"] = self._pictures
        choice = {"index": 0, "message": message, "finish_reason": self.reason, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self.usage}

    def chunk(self, delta: Json, reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def last_chunk(self) -> Json:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage}

    def _said(self, text: str) -> Json:
        self._text += text
        if self._form != "parts":
            return {"content": text}
        if self._parts and self._parts[-1]["type"] == "text":
            self._parts[-1]["text"] += text
        else:
            self._parts.append({"type": "text", "text": text})
        return {"content": [{"type": "text", "text": text}]}

    def _shown(self, picture: Picture) -> Json:
        url = f"data:image/png;base64,{picture.base64}" if self._delivery == "inline" else self._own.put(picture.png)
        if self._form == "markdown":
            return self._said(f"\n\n![picture]({url})\n\n")
        part: Json = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
        if self._form == "parts":
            self._parts.append(part)
            return {"content": [part]}
        part = {**part, "index": len(self._pictures), "text_offset": len(self._text)}
        self._pictures.append(part)
        return {"images": [part]}


async def whole(completion: Completion, found: AsyncIterator[Piece]) -> Json:
    async for piece in found:
        completion.add(piece)
    return completion.to_json()


async def stream(
    completion: Completion, found: AsyncIterator[Piece], *, with_usage: bool
) -> AsyncIterator[dict[str, str]]:
    """Chunks, then `[DONE]`; where it fails, an error in the place of both."""
    yield _data(completion.chunk({"role": "assistant", "content": ""}))
    try:
        async for piece in found:
            delta = completion.add(piece)
            if delta is not None:
                yield _data(completion.chunk(delta))
    except WeftError as error:
        yield _error(error.what, error.code)
        return
    except Exception as error:
        log.error("unexpected %s", type(error).__name__)
        yield _error(UNEXPECTED, None)
        return
    yield _data(completion.chunk({}, completion.reason))
    if with_usage:
        yield _data(completion.last_chunk())
    yield {"data": "[DONE]"}


def _error(message: str, code: str | None) -> dict[str, str]:
    return _data({"error": {"message": message, "type": "server_error", "param": None, "code": code}})


def _data(chunk: Json) -> dict[str, str]:
    return {"data": json.dumps(chunk)}
