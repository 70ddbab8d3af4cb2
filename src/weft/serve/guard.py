"""Who may ask, how often, how much: everything that is refused before a model hears of it."""

import asyncio
import hashlib
import hmac
import json
import logging
import math
import re
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from weft.errors import WeftError
from weft.serve.limits import Limits
from weft.serve.parts import UNEXPECTED
from weft.serve.scheduler import Busy

log = logging.getLogger(__name__)
NOBODY = ""
"""The owner of what was asked without a key, where none is needed."""
# nothing is tried twice: a string without an end goes on to the end of the body
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z|\\\Z)', re.DOTALL)
_MARKS = re.compile(rb"[\[\]{}]")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class NoKey(WeftError):
    """The request has no key, or a wrong one."""

    code = "invalid_api_key"


class Callers:
    """Who has a key, how often each asks, and how much at the same time.

    Args:
        keys: secrets; none: everybody may ask, and nobody is counted.
    """

    def __init__(self, keys: Sequence[str], limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = [key.encode() for key in keys]
        self._limits, self._clock = limits, clock
        self._asked: dict[str, deque[float]] = defaultdict(deque)
        self._running: dict[str, int] = defaultdict(int)

    def owner(self, authorization: str | None) -> str:
        """A name for whoever holds this key, from which the key does not follow.

        Raises:
            NoKey: it is no key of this server.
        """
        if not self._keys:
            return NOBODY
        scheme, _, given = (authorization or "").partition(" ")
        # all are compared, each in constant time
        key = given.strip().encode("latin-1", "replace")  # as headers are read: the bytes that came
        fits = [hmac.compare_digest(key, each) for each in self._keys]
        if scheme.lower() != "bearer" or not any(fits):
            raise NoKey("the key is missing or wrong", fix="send Authorization: Bearer KEY")
        return hashlib.sha256(key).hexdigest()[:16]

    @contextmanager
    def asking(self, owner: str) -> Iterator[None]:
        """Within it, a request of this owner is being answered.

        Raises:
            Busy: the owner asks too often, or too much at once.
        """
        if owner == NOBODY:
            yield
            return
        often, much, now = self._limits.requests_per_minute, self._limits.concurrent, self._clock()
        asked = self._asked[owner]
        while asked and asked[0] <= now - 60:
            asked.popleft()
        if often is not None and len(asked) >= often:
            raise Busy(f"this key has asked {often} times in a minute", math.ceil(asked[0] + 60 - now))
        if much is not None and self._running[owner] >= much:
            raise Busy(f"this key has {much} requests running", 1)
        asked.append(now)
        self._running[owner] += 1
        try:
            yield
        finally:
            self._running[owner] -= 1


class Quiet:
    """Middleware that answers 500 to what nobody thought of, and writes down its kind.

    The server's own log would hold all of it, and what is in it may be anybody's.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_begun = False

        async def noticed(message: MutableMapping[str, Any]) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except Exception as error:
            log.error("unexpected %s", type(error).__name__)
            # an answer that was begun is cut off
            if scope["type"] == "http" and not is_begun:
                await _refuse(send, 500, UNEXPECTED, None, "server_error")


class Keys:
    """Middleware that lets through, of what is sent to /v1, only that of callers with a key: before it is read."""

    def __init__(self, app: Any, callers: Callers) -> None:
        self._app, self._callers = app, callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _is_sent(scope):
            try:
                self._callers.owner(_header(scope, b"authorization"))
            except NoKey as error:
                await _refuse(send, 401, f"{error.what}; {error.fix}", NoKey.code, "authentication_error")
                return
        await self._app(scope, receive, send)


class Bodies:
    """Middleware that reads bodies within bounds: so many bytes, within so long, so much JSON.

    What is refused is answered 408, 413 or 400, before anything is made of it.
    """

    def __init__(self, app: Any, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_sent(scope):
            await self._app(scope, receive, send)
            return
        limit = self._limits.body_bytes
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await _read(receive, limit)
        except TimeoutError:
            await _refuse(send, 408, "the request did not arrive in time", "request_timeout")
            return
        if body is None:
            return
        if len(body) > limit:
            await _refuse(send, 413, f"the request has more than {limit:,} bytes", "request_too_large")
            return
        is_long = len(body) > 2**20
        wrong = await asyncio.to_thread(_wrong, body, self._limits) if is_long else _wrong(body, self._limits)
        if wrong is not None:
            await _refuse(send, 400, *wrong)
            return
        is_read = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


def _is_sent(scope: Scope) -> bool:
    # the page has bounds of its own for what is dropped into it
    return scope["type"] == "http" and scope["method"] == "POST" and scope["path"].startswith("/v1/")


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def _read(receive: Receive, limit: int) -> bytes | None:
    """A body, or the beginning of one that is too long; None: the caller left.

    As much again is read and dropped, so that whoever sends slightly too much hears of it.
    """
    pieces, size, more = list[bytes](), 0, True
    while more and size <= 2 * limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        if size <= limit:
            pieces.append(piece)
        size += len(piece)
        more = message.get("more_body", False)
    return b"".join(pieces)


def _wrong(body: bytes, limits: Limits) -> tuple[str, str] | None:
    """What is wrong with JSON that is not parsed yet, and its code. Whether it is JSON is left to whoever parses it."""
    # a parser reads UTF-16 as well, in which this would count something else
    if b"\0" in body:
        return "the request is no JSON in UTF-8", "invalid"
    if body.count(b"{") + body.count(b"[") + body.count(b",") <= min(limits.json_depth, limits.json_values):
        return None
    too_many = f"the request has more than {limits.json_values:,} values", "too_many_values"
    # a value has at most two strings, itself and its name, of two quotes each
    if body.count(b'"') - body.count(b'\\"') > 4 * limits.json_values:
        return too_many
    bare = _STRINGS.sub(b"", body)
    if bare.count(b"{") + bare.count(b"[") + bare.count(b",") > limits.json_values:
        return too_many
    level = 0
    for mark in _MARKS.finditer(bare):
        level += 1 if mark[0] in b"[{" else -1
        if level > limits.json_depth:
            return f"the request nests more than {limits.json_depth} brackets", "too_deep"
    return None


async def _refuse(send: Send, status: int, message: str, code: str | None, kind: str = "invalid_request_error") -> None:
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # or all the rest would be read, and dropped
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
