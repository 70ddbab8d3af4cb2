"""An answer for people: a folder with Markdown and pictures, or one HTML page that holds everything.

What a model writes is text, never markup or control: both forms escape it.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from weft.atomic import write_folder, write_json, write_text
from weft.document import Document, Image, Text, Turn
from weft.generation.events import Answer
from weft.images import FORMATS, data_uri

_PAGE = Path(__file__).parent / "templates" / "answer.html"

_FINE_FROM = 256
"""Pictures with a side of so many pixels are scaled smoothly, smaller ones in sharp squares."""


def write_answer(folder: Path, prompt: Document, answer: Answer, *, made_by: dict[str, Any]) -> None:
    """Make `folder`: `answer.md`, its `picture_1.png` ..., and `answer.json`, the whole conversation in the chat form.

    Args:
        prompt: its pictures hold their bytes; they are written beside the answer's, as `prompt_1.jpg` ...
        made_by: what the answer was made with (model, adapter, sampling); goes into the JSON.
    """
    conversation = _conversation(prompt, answer)
    files = {image.path: image.data for image in conversation.images}
    record = conversation.to_json()
    facts = {"reason": answer.reason, "usage": asdict(answer.usage), **made_by}
    with write_folder(folder) as staging:
        for name, data in files.items():
            (staging / str(name)).write_bytes(data or b"")
        write_text(staging / "answer.md", to_markdown(conversation.turns[-1]))
        write_json(staging / "answer.json", {**record, "meta": {**record.get("meta", {}), **facts}})


def to_markdown(turn: Turn) -> str:
    """CommonMark; pictures by their paths."""
    number = 0
    blocks = []
    for part in turn.parts:
        if isinstance(part, Text):
            blocks.append(escape_markdown(part.text.strip()))
        else:
            number += 1
            blocks.append(f"![picture {number}]({part.path})")
    return "\n\n".join(block for block in blocks if block) + "\n"


def printable(text: str) -> str:
    """Without control characters, which could command a terminal; line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def escape_markdown(text: str) -> str:
    """Text that CommonMark shows as it is; a line break stays one."""
    lines = [line.strip() for line in printable(text).splitlines()]
    return "\\\n".join(_escape_line(line) for line in lines if line)


def to_html(prompt: Document, answer: Answer, *, title: str) -> str:
    """One page without links: pictures are in it, and it opens from disk, on a phone as well."""
    from jinja2 import Environment

    conversation = _conversation(prompt, answer)
    turns = [{"role": turn.role, "parts": list(_html_parts(turn))} for turn in conversation.turns]
    usage = answer.usage
    footer = (
        f"{title} · ended by {answer.reason} · {usage.text_tokens} text tokens, {usage.image_tokens} picture tokens"
    )
    page = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE.read_text())
    return page.render(title=title, turns=turns, footer=footer)


def write_page(file: Path, prompt: Document, answer: Answer, *, title: str) -> None:
    write_text(file, to_html(prompt, answer, title=title))


def _conversation(prompt: Document, answer: Answer) -> Document:
    """Prompt and answer as one document whose pictures have the names they are written under."""
    theirs = [Image(image.data, f"prompt_{i}{_kind(image)[0]}") for i, image in enumerate(prompt.images, 1)]
    ours = [Image(image.data, f"picture_{i}.png") for i, image in enumerate(answer.images, 1)]
    turns = (*prompt.turns, Turn("assistant", answer.parts))
    return Document(turns, prompt.id, prompt.meta).with_images([*theirs, *ours])


class _Shown(NamedTuple):
    text: str
    source: str | None = None
    is_fine: bool = False


def _html_parts(turn: Turn) -> Iterator[_Shown]:
    number = 0
    for part in turn.parts:
        if isinstance(part, Text):
            if part.text.strip():
                yield _Shown(printable(part.text.strip()))
        else:
            number += 1
            _, side = _kind(part)
            yield _Shown(f"picture {number}", data_uri(part.data or b""), side >= _FINE_FROM)


def _kind(image: Image) -> tuple[str, int]:
    """File ending, and the longer side in pixels."""
    from PIL import Image as PILImage

    with PILImage.open(io.BytesIO(image.data or b""), formats=FORMATS) as picture:
        name = str(picture.format)
        return {"JPEG": ".jpg"}.get(name, f".{name.lower()}"), max(picture.size)


def _escape_line(line: str) -> str:
    line = re.sub(r"([\\`*_\[\]<>&#|~!$])", r"\\\1", line)
    # what begins a list, a rule or a heading only does so at the start of a line
    return re.sub(r"^(?:([-+=])|(\d+)([.)]))", lambda m: f"\\{m[1]}" if m[1] else f"{m[2]}\\{m[3]}", line)
