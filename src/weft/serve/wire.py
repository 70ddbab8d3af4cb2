"""Messages between the two processes of a server, as bytes (msgpack): plain values only, nothing that runs.

    wire = Wire(reads, writes)
    wire.send(Leave(3, time.monotonic()))
    for message in wire: ...

What is small is written at once, where that does not wait, and all else by a thread: whoever sends never waits for who
reads.
"""

import contextlib
import select
import threading
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from queue import SimpleQueue
from typing import Any, BinaryIO, cast

import msgpack

from weft.document import Document, Image, Part, Text, Turn
from weft.errors import WeftError
from weft.generation import Event, Finished, ImageBegin, ImageReady, SamplingConfig, TextDelta, Usage
from weft.serve.messages import Ask, End, Gone, Joined, Leave, Report, Round

CHUNK = 1 << 20
LARGE = 1
"""Extension of msgpack: an integer of more than 64 bits, in decimal."""


@dataclass(frozen=True)
class Ready:
    """The first message of the models, if they could be loaded; otherwise an error is."""

    models: tuple[str, ...]
    slots: int


@dataclass(frozen=True)
class Failed:
    """The last message of models that end without being asked to."""

    failure: str


Message = Ready | Failed | Ask | Leave | End | Round | WeftError


class Wire:
    """Both directions of a connection to one other process; files are buffered and its own."""

    def __init__(self, reads: BinaryIO, writes: BinaryIO) -> None:
        self._reads, self._writes = reads, writes
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._unwritten = 0
        """Messages that the thread has."""
        self._is_closed = False
        self._writer = threading.Thread(target=self._write, name="weft-wire", daemon=True)
        self._writer.start()

    def __iter__(self) -> Iterator[Message]:
        """Messages as they come, until the other side is closed."""
        # what comes is bounded where callers are read
        unpacker = msgpack.Unpacker(
            use_list=False, max_buffer_size=0, unicode_errors="surrogatepass", ext_hook=_read_large
        )
        with self._reads:
            while data := self._reads.read1(CHUNK):  # type: ignore[attr-defined]
                unpacker.feed(data)
                for packed in unpacker:
                    yield _unpacked(packed)

    def send(self, message: Message) -> None:
        """
        Raises:
            ValueError, TypeError: it holds what cannot be sent. Nothing of it is.
        """
        data = msgpack.packb(_packed(message), unicode_errors="surrogatepass", default=_large)
        with self._lock:
            if self._is_closed:
                return
            if self._unwritten == 0 and len(data) <= select.PIPE_BUF and self._has_room():
                self._put(data)
            else:
                self._unwritten += 1
                self._outgoing.put(data)

    def close(self) -> None:
        """Once all is written that was sent."""
        with self._lock:
            self._is_closed = True
        self._outgoing.put(None)
        self._writer.join()

    def _has_room(self) -> bool:
        """Whether so much as PIPE_BUF bytes can be written without waiting."""
        return bool(select.select((), (self._writes,), (), 0)[1])

    def _put(self, data: bytes) -> None:
        # who reads no more is found to be gone by who reads from it
        with contextlib.suppress(OSError):
            self._writes.write(data)
            self._writes.flush()

    def _write(self) -> None:
        while (data := self._outgoing.get()) is not None:
            self._put(data)
            with self._lock:
                self._unwritten -= 1
        with contextlib.suppress(OSError):
            self._writes.close()


# --- messages -> plain values ---------------------------------------------------------------------------------------


def _packed(message: Message) -> tuple[Any, ...]:
    match message:
        case Ready() | Failed() | Leave() | End():
            return type(message).__name__, *astuple(message)
        case Ask(request=request, model=model, document=document, config=config):
            return "Ask", request, model, _document(document), config.model_dump()
        case Round(reports=reports, steps=steps, most_late_steps=late):
            return "Round", [(request, *_what(what)) for request, what in reports], steps, late
        case WeftError():
            return _what(message)


def _unpacked(packed: tuple[Any, ...]) -> Message:
    name, *rest = packed
    match name:
        case "Ask":
            request, model, document, config = rest
            return Ask(request, model, _read_document(*document), SamplingConfig.model_validate(config))
        case "Round":
            reports, steps, late = rest
            return Round(tuple(_read_report(*report) for report in reports), steps, late)
        case "Error":
            return _read_error(*rest)
        case _:
            return cast(Message, {kind.__name__: kind for kind in (Ready, Failed, Leave, End)}[name](*rest))


def _large(value: Any) -> msgpack.ExtType:
    if isinstance(value, int):
        return msgpack.ExtType(LARGE, str(value).encode())
    raise TypeError(f"{type(value).__name__} is not sent")


def _read_large(_: int, data: bytes) -> int:
    return int(data)


def _document(document: Document) -> tuple[Any, ...]:
    """Texts are strings, pictures their bytes."""
    turns = [(turn.role, turn.loss, [_part(part) for part in turn.parts]) for turn in document.turns]
    return turns, document.id, dict(document.meta)


def _part(part: Part) -> str | bytes:
    if isinstance(part, Text):
        return part.text
    if part.data is None:
        raise ValueError("a picture of a prompt holds its bytes")
    return part.data


def _read_document(turns: Iterable[Any], identity: str | None, meta: dict[str, Any]) -> Document:
    found = tuple(
        Turn(role, tuple(Text(part) if isinstance(part, str) else Image(part) for part in parts), loss)
        for role, loss, parts in turns
    )
    return Document(found, identity, meta)


def _what(what: Joined | Event | WeftError | Gone) -> tuple[Any, ...]:
    match what:
        case Joined():
            return ("Joined",)
        case Gone():
            return ("Gone",)
        case TextDelta(text=text):
            return "TextDelta", text
        case ImageBegin(index=index):
            return "ImageBegin", index
        case ImageReady(index=index, picture=picture):
            return "ImageReady", index, picture.mode, picture.size, picture.tobytes()
        case Finished(reason=reason, usage=usage):
            return "Finished", reason, astuple(usage)
        case WeftError():
            codes = [kind.code for kind in type(what).__mro__ if issubclass(kind, WeftError)]
            return "Error", codes, vars(what)


def _read_report(request: int, name: str, *rest: Any) -> Report:
    match name:
        case "Joined":
            return request, Joined()
        case "Gone":
            return request, Gone()
        case "TextDelta":
            return request, TextDelta(request, *rest)
        case "ImageBegin":
            return request, ImageBegin(request, *rest)
        case "ImageReady":
            from PIL import Image as PILImage

            index, mode, size, pixels = rest
            return request, ImageReady(request, index, PILImage.frombytes(mode, size, pixels))
        case "Finished":
            reason, usage = rest
            return request, Finished(request, reason, Usage(*usage))
        case _:
            return request, _read_error(*rest)


def _read_error(codes: Iterable[str], facts: dict[str, Any]) -> WeftError:
    """Of the same kind; of the nearest that is known here, where a module that the models' process has loaded defines
    it."""
    known = dict(_kinds(WeftError))
    kind = next(known[code] for code in codes if code in known)
    error = kind.__new__(kind, facts["what"])
    vars(error).update(facts)
    return error


def _kinds(kind: type[WeftError]) -> Iterator[tuple[str, type[WeftError]]]:
    for inner in kind.__subclasses__():
        yield from _kinds(inner)
    # last, so that a code means the class that brought it
    yield kind.code, kind
