"""`/v1/responses`: texts are messages, pictures are image generation calls, in the order in which they were written."""

import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from weft.errors import WeftError
from weft.serve.files import Own
from weft.serve.parts import UNEXPECTED, End, Picture, PictureBegin, Piece, TextEnd, TextPiece
from weft.serve.schema import ResponsesRequest

log = logging.getLogger(__name__)
Json = dict[str, Any]
LINE = 63 * 1024
"""Bytes of a line that every client reads, with some to spare."""
ECHOED = 8192
"""Characters of instructions that come back with an answer; nobody needs longer ones twice."""
Sent = Mapping[str, str]
"""One event of a stream: `event` and `data`."""


class Answer:
    """The object that grows while an answer is written.

    Args:
        identity: the response's, without its prefix; its items' ids follow from it.
    """

    def __init__(self, request: ResponsesRequest, identity: str, created: int, own: Own) -> None:
        self._request, self._identity, self._created, self._own = request, identity, created, own
        self.items: list[Json] = []
        self.status = "in_progress"
        self.usage: Json | None = None
        self._details: Json | None = None
        self.error: Json | None = None

    def add(self, piece: Piece) -> None:
        match piece:
            case TextPiece(place=place) if place == len(self.items):
                self.items.append(self._message(place, "", "in_progress"))
            case TextEnd(place=place, text=text, is_cut=is_cut):
                self.items[place] = self._message(place, text, "incomplete" if is_cut else "completed")
            case PictureBegin(place=place):
                self.items.append(self._call(place, None, "in_progress"))
            case Picture(place=place):
                self.items[place] = self._call(place, self._result(piece), "completed")
            case End(reason=reason, usage=usage):
                self.usage = usage_json(usage.prompt_tokens, usage.text_tokens, usage.image_tokens)
                if reason == "length":
                    self.status, self._details = "incomplete", {"reason": "max_output_tokens"}
                else:
                    self.status = "completed"

    def fail(self, code: str, message: str) -> None:
        self.status, self.error = "failed", {"code": code, "message": message}
        # a picture is there as a whole or not at all
        self.items = [item for item in self.items if item["status"] != "in_progress"]

    def to_json(self) -> Json:
        request = self._request
        return {
            "id": f"resp_{self._identity}",
            "object": "response",
            "created_at": self._created,
            "model": request.model,
            "status": self.status,
            "error": self.error,
            "incomplete_details": self._details,
            "instructions": request.instructions if len(request.instructions or "") <= ECHOED else None,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "output": list(self.items),
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": self.usage,
            "user": request.user,
        }

    def item_id(self, place: int, kind: str) -> str:
        return f"{kind}_{self._identity}_{place}"

    def _message(self, place: int, text: str, status: str) -> Json:
        content = [output_text(text)] if text else []
        identity = self.item_id(place, "msg")
        return {"type": "message", "id": identity, "role": "assistant", "status": status, "content": content}

    def _call(self, place: int, result: str | None, status: str) -> Json:
        identity = self.item_id(place, "ig")
        return {"type": "image_generation_call", "id": identity, "status": status, "result": result}

    def _result(self, picture: Picture) -> str:
        return picture.base64 if self._request.delivery == "inline" else self._own.put(picture.png)


async def whole(answer: Answer, found: AsyncIterator[Piece]) -> Json:
    async for piece in found:
        answer.add(piece)
    return answer.to_json()


async def stream(answer: Answer, found: AsyncIterator[Piece]) -> AsyncIterator[Sent]:
    """Events that the stock SDK reads; the last one is terminal, whatever happens."""
    number = -1

    def event(kind: str, **fields: Any) -> Sent:
        nonlocal number
        number += 1
        kind = f"response.{kind}"
        return {"event": kind, "data": _lines({"type": kind, "sequence_number": number, **fields})}

    yield event("created", response=answer.to_json())
    yield event("in_progress", response=answer.to_json())
    try:
        async for piece in found:
            place = getattr(piece, "place", 0)
            at = {"item_id": answer.item_id(place, "msg"), "output_index": place, "content_index": 0}
            call = {"item_id": answer.item_id(place, "ig"), "output_index": place}
            is_new = isinstance(piece, TextPiece) and place == len(answer.items)
            answer.add(piece)
            match piece:
                case TextPiece(text=text):
                    if is_new:
                        yield event("output_item.added", output_index=place, item=answer.items[place])
                        yield event("content_part.added", **at, part=output_text(""))
                    yield event("output_text.delta", **at, delta=text, logprobs=[])
                case TextEnd(text=text):
                    yield event("output_text.done", **at, text=text, logprobs=[])
                    yield event("content_part.done", **at, part=output_text(text))
                    yield event("output_item.done", output_index=place, item=answer.items[place])
                case PictureBegin():
                    yield event("output_item.added", output_index=place, item=answer.items[place])
                    yield event("image_generation_call.in_progress", **call)
                    yield event("image_generation_call.generating", **call)
                case Picture():
                    yield event("image_generation_call.completed", **call)
                    yield event("output_item.done", output_index=place, item=answer.items[place])
    except WeftError as error:
        answer.fail("server_error", error.what)
    except Exception as error:
        log.error("unexpected %s", type(error).__name__)
        answer.fail("server_error", UNEXPECTED)
    yield event(answer.status, response=answer.to_json())


def _lines(event: Json) -> str:
    """JSON in one line; in many, which a reader of streams joins again, where one would be too long."""
    line = json.dumps(event)
    return line if len(line) < LINE else json.dumps(event, indent=0)


def output_text(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def usage_json(prompt: int, text: int, image: int) -> Json:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": text + image,
        "output_tokens_details": {"reasoning_tokens": 0, "text_tokens": text, "image_tokens": image},
        "total_tokens": prompt + text + image,
    }
