"""Pictures that are fetched by address: for a while, by whom they were made for, and in bounded room."""

import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

PATH = "/v1/files/{id}/content"
ID_BYTES = 24
"""Of randomness in an address: 192 bits."""
# clients that put this server's host in front send it back with the address
_ADDRESS = re.compile(r"(?:https?://[^/\s]+)?/v1/files/([A-Za-z0-9_-]{32})/content")


@dataclass(frozen=True)
class _File:
    owner: str
    data: bytes
    until: float


class Files:
    """Pictures by unguessable ids; the oldest go when there is no room.

    Args:
        seconds: how long each is kept.
        room: bytes of all together.
    """

    def __init__(self, seconds: float, room: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._room, self._clock = seconds, room, clock
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._bytes = 0

    def put(self, data: bytes, owner: str) -> str:
        """Keep a picture; returns its id."""
        self._forget_old()
        identity = secrets.token_urlsafe(ID_BYTES)
        self._files[identity] = _File(owner, data, self._clock() + self._seconds)
        self._bytes += len(data)
        while self._bytes > self._room and len(self._files) > 1:
            self._bytes -= len(self._files.popitem(last=False)[1].data)
        return identity

    def get(self, identity: str, owner: str) -> bytes | None:
        """None: there is no such picture, or it is somebody else's."""
        self._forget_old()
        found = self._files.get(identity)
        return found.data if found is not None and found.owner == owner else None

    def _forget_old(self) -> None:
        now = self._clock()
        while self._files and next(iter(self._files.values())).until < now:
            self._bytes -= len(self._files.popitem(last=False)[1].data)


def address(identity: str, public_url: str = "") -> str:
    """Of a picture: on this server, or where it is told, from elsewhere."""
    return public_url.rstrip("/") + PATH.format(id=identity)


def is_address(text: str) -> bool:
    """Whether this is how pictures are called here, whatever host stands before it."""
    return _ADDRESS.fullmatch(text) is not None


@dataclass(frozen=True)
class Own:
    """One caller's pictures."""

    files: Files
    owner: str
    public_url: str = ""
    """What stands before their addresses."""

    def put(self, data: bytes) -> str:
        """Keep a picture; returns its address."""
        return address(self.files.put(data, self.owner), self.public_url)

    def find(self, at: str) -> bytes | None:
        found = _ADDRESS.fullmatch(at)
        return None if found is None else self.files.get(found[1], self.owner)
