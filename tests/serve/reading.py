"""Answers in every shape -> their parts in order: texts, and what the pictures show; or the bytes of these."""

import base64
import re
from collections.abc import Callable

from tests.serve.nonce import Shown, read_picture

Fetch = Callable[[str], bytes]
Part = str | bytes
MARK = re.compile(r"\n\n!\[picture\]\(([^()]+)\)\n\n")


def picture_bytes(address: str, fetch: Fetch) -> bytes:
    """Of a data URL, of base64, or of an address."""
    if address.startswith("data:image/png;base64,"):
        return base64.b64decode(address.partition(",")[2], validate=True)
    return fetch(address) if address.startswith("/v1/") else base64.b64decode(address, validate=True)


def of_response(answer: dict, fetch: Fetch) -> list[Part]:
    return [
        item["content"][0]["text"] if item["type"] == "message" else picture_bytes(item["result"], fetch)
        for item in answer["output"]
    ]


def of_message(message: dict, fetch: Fetch) -> list[Part]:
    """Of Chat Completions, whichever of the three renderings it is."""
    content = message["content"]
    if isinstance(content, list):
        return [
            part["text"] if part["type"] == "text" else picture_bytes(part["image_url"]["url"], fetch)
            for part in content
        ]
    parts: list[Part] = []
    if "images" in message:
        done = 0
        for each in message["images"]:
            parts += [content[done : each["text_offset"]], picture_bytes(each["image_url"]["url"], fetch)]
            done = each["text_offset"]
        return [part for part in [*parts, content[done:]] if part]
    for i, each in enumerate(MARK.split(content)):
        if each:
            parts.append(fetch(each) if i % 2 else each)
    return parts


def shown(parts: list[Part]) -> list[str | Shown]:
    return [read_picture(part) if isinstance(part, bytes) else part for part in parts]
