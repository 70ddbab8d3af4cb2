"""One conversation of the page: turns whose pictures lie in a folder, and the files in which people take them away."""

import base64
import contextlib
import io
import itertools
import re
import secrets
import textwrap
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.document import Document, Image, Part, Text, Turn
from weft.errors import UsageError
from weft.generation.events import Answer
from weft.generation.render import to_html, to_markdown
from weft.images import media_type, read_image
from weft.serve.parts import End, Picture, PictureBegin, Piece, TextPiece

_MARK = re.compile(r"\[([1-9][0-9]?)\]")
_SPEAKERS = {"user": "You", "assistant": "Answer", "system": "System"}
GALLERY = "gallery"
"""The folder of what is shown to everybody, and stays."""
_CAPTION_CHARACTERS = 160
"""Of what is said of a picture."""
_SHARP_BELOW = 256
"""Pictures with both sides shorter are shown in sharp squares: the name of their folder says so."""


@dataclass
class Conversation:
    """Grows by questions and by the pieces of their answers.

    Args:
        folder: of the pictures; the documents here name them by paths in it.
    """

    folder: Path
    turns: list[Turn] = field(default_factory=list)
    end: End | None = None
    """Of the last answer; None: it did not end by itself, or has not yet."""
    painting_since: float | None = None
    """By the monotonic clock; None: no picture is being made."""

    def ask(self, text: str, pictures: Sequence[str] = ()) -> None:
        """Instead of the last question, if that was not answered.

        Args:
            pictures: paths in the folder.

        Raises:
            UsageError: nothing is asked.
        """
        parts = ordered(text, pictures)
        if not parts:
            raise UsageError("there is nothing to answer", fix="write something, or drop in a picture")
        if self.turns and self.turns[-1].role == "user":
            self.turns.pop()
        self.turns.append(Turn("user", parts))
        self.end = None

    def last_question(self, before: int | None = None) -> int | None:
        """The place of the last one among the turns, or of the last one before such a place."""
        places = [i for i, turn in enumerate(self.turns[:before]) if turn.role == "user"]
        return places[-1] if places else None

    def draft(self, place: int) -> tuple[str, list[str]]:
        """The question at this place as it would be asked: text with marks, and paths of pictures."""
        return marked(self.turns[place].parts)

    def go_back(self, place: int) -> None:
        """To where the question at this place was not asked."""
        del self.turns[place:]
        self.end = None

    def begin(self) -> None:
        """An answer comes: pieces from here on are its."""
        self.turns.append(Turn("assistant", ()))
        self.end = self.painting_since = None

    def add(self, piece: Piece) -> None:
        parts = self.turns[-1].parts
        match piece:
            case TextPiece(text=text) if parts and isinstance(parts[-1], Text):
                parts = (*parts[:-1], Text(parts[-1].text + text))
            case TextPiece(text=text):
                parts = (*parts, Text(text))
            case PictureBegin():
                self.painting_since = time.monotonic()
            case Picture(png=png):
                self.painting_since = None
                parts = (*parts, Image(path=self._put(png, len(self.pictures) + 1)))
            case End():
                self.end = piece
        self.turns[-1] = Turn("assistant", parts)

    def leave(self) -> None:
        """The answer is over, as far as it came."""
        self.painting_since = None
        if self.turns and not self.turns[-1].parts:
            self.turns.pop()

    @property
    def pictures(self) -> list[Image]:
        """Of the last turn."""
        return [part for part in self.turns[-1].parts if isinstance(part, Image)]

    def to_input(self, *, alone: bool) -> list[dict[str, Any]]:
        """The `input` of `/v1/responses`.

        Args:
            alone: only the last question.

        Raises:
            ImageError: a picture is not there any more.
        """
        return [
            {"role": turn.role, "content": [self._part_json(part) for part in turn.parts]}
            for turn in (self.turns[-1:] if alone else self.turns)
        ]

    def to_files(self, model: str) -> tuple[Path, Path]:
        """Write the conversation as Markdown with its pictures, zipped, and as one page. It ends with an answer."""
        document = Document(tuple(self._with_bytes(turn) for turn in self.turns))
        folder = self._new_folder("files")
        archive, page = folder / "conversation.zip", folder / "conversation.html"
        archive.write_bytes(to_zip(document))
        assert self.end is not None
        answer = Answer(document.turns[-1].parts, self.end.reason, self.end.usage)
        page.write_text(to_html(Document(document.turns[:-1]), answer, title=model), encoding="utf-8")
        return archive, page

    def _with_bytes(self, turn: Turn) -> Turn:
        return Turn(
            turn.role, tuple(part if isinstance(part, Text) else Image(self._bytes(part)) for part in turn.parts)
        )

    def _part_json(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "input_text", "text": part.text}
        # whichever kind it is: nobody goes by what an address says of a picture
        return {
            "type": "input_image",
            "image_url": f"data:image/png;base64,{base64.b64encode(self._bytes(part)).decode()}",
        }

    def _bytes(self, picture: Image) -> bytes:
        return read_image(self.folder, str(picture.path))

    def _put(self, png: bytes, number: int) -> str:
        # width and height stand in the header of a PNG, each in four bytes
        sides = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
        file = self._new_folder("sharp" if max(sides) < _SHARP_BELOW else "fine") / f"picture_{number}.png"
        file.write_bytes(png)
        return file.relative_to(self.folder).as_posix()

    def _new_folder(self, kind: str) -> Path:
        folder = self.folder / f"{kind}_{secrets.token_urlsafe(24)}"
        folder.mkdir()
        return folder


def ordered(text: str, pictures: Sequence[str]) -> tuple[Part, ...]:
    """A picture stands where the text says [1], [2] ..., the others before the text."""
    marks = [mark for mark in _MARK.finditer(text) if int(mark[1]) <= len(pictures)]
    placed = {int(mark[1]) for mark in marks}
    parts: list[Part] = [Image(path=path) for i, path in enumerate(pictures, 1) if i not in placed]
    end = 0
    for mark in marks:
        parts += [*_texts(text[end : mark.start()]), Image(path=pictures[int(mark[1]) - 1])]
        end = mark.end()
    return (*parts, *_texts(text[end:]))


def marked(parts: Sequence[Part]) -> tuple[str, list[str]]:
    """The inverse of `ordered`."""
    pictures = [str(part.path) for part in parts if isinstance(part, Image)]
    first = next((i for i, part in enumerate(parts) if isinstance(part, Text)), len(parts))
    numbers = itertools.count(first + 1)
    text = " ".join(part.text if isinstance(part, Text) else f"[{next(numbers)}]" for part in parts[first:])
    return text, pictures


def captions(turn: Turn, asked: str, *, is_whole: bool) -> Iterator[str]:
    """For who cannot see the pictures of a turn: which one each is, and what an answer says right before it.

    Args:
        asked: text of the question, which stands for what an answer without a word does not say.
        is_whole: no more pictures come.
    """
    total, is_answer = sum(isinstance(part, Image) for part in turn.parts), turn.role == "assistant"
    name = "Picture" if is_answer else "Your picture"
    of_all = f" of {total}" if total > 1 and (is_whole or not is_answer) else ""
    unsaid = asked if total == len(turn.parts) else ""
    number, said = 0, unsaid
    for part in turn.parts:
        if isinstance(part, Text):
            said = part.text
            continue
        number += 1
        words = textwrap.shorten(said, _CAPTION_CHARACTERS, placeholder=" …") if is_answer else ""
        yield f"{name} {number}{of_all}" + (f": {words}" if words else "")
        said = unsaid


def to_zip(document: Document) -> bytes:
    """`conversation.md`, and its pictures beside it."""
    data = [image.data or b"" for image in document.images]
    names = [f"picture_{i}.{media_type(each).removeprefix('image/')}" for i, each in enumerate(data, 1)]
    named = document.with_images([Image(each, name) for each, name in zip(data, names, strict=True)])
    text = "\n".join(f"**{_SPEAKERS[turn.role]}**\n\n{to_markdown(turn)}" for turn in named.turns)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conversation.md", text)
        for name, each in zip(names, data, strict=True):
            archive.writestr(name, each)
    return buffer.getvalue()


def make_room(folder: Path, room: int) -> None:
    """Remove the oldest files of conversations until those that are left have at most so many bytes."""
    files = sorted(_files(folder))
    used = sum(size for _, size, _ in files)
    for _, size, file in files:
        if used <= room:
            return
        file.unlink(missing_ok=True)
        used -= size
        with contextlib.suppress(OSError):
            file.parent.rmdir()


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    for file in folder.rglob("*"):
        # what is being uploaded comes and goes
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            if file.is_file() and file.parent.name != GALLERY:
                yield status.st_mtime, status.st_size, file


def _texts(text: str) -> list[Text]:
    return [Text(text.strip())] if text.strip() else []
