"""A connection that ends where a request is begun and does not go on, and refuses at once what there is no room for.

Nobody else counts bytes and seconds of a head; and nobody else could refuse for so little: to make of a request what an
application reads, only to refuse it, takes several times as long, and all other callers wait for it.
"""

import asyncio
from asyncio import TimerHandle, Transport
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from weft.serve.limits import Limits

Refuse = Callable[[bytes, Sequence[tuple[bytes, bytes]]], Response | None]
"""(address, headers) -> what is answered to a request of method POST, whatever is in it; None: that depends on it."""
ANSWERED: Any = SimpleNamespace(response_complete=True, message_event=asyncio.Event())
"""In place of a request that was answered before anything was made of it; what is left of it is dropped."""


class Connection(HttpToolsProtocol):
    """uvicorn's, with an end to what is sent before a request has its address and headers.

    Args:
        refuse: asked for each request.
    """

    def __init__(self, limits: Limits, refuse: Refuse, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._limits, self._refuse = limits, refuse
        self._is_in_head = False
        self._head_bytes = 0
        self._late: TimerHandle | None = None
        """Runs while a head is expected."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_in_head and self._late is None:
            self._expect_head()
        if self._late is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes:
                self.send_400_response("The headers are too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._have_head()
        if not self._is_refused():
            super().on_headers_complete()

    def _is_refused(self) -> bool:
        """Whether it was answered at once."""
        is_plain = self.parser.get_method() == b"POST" and self.parser.get_http_version() == "1.1"
        is_next = self.cycle is None or self.cycle.response_complete
        if not (is_plain and is_next and self.parser.should_keep_alive()) or self.flow.write_paused:
            return False
        response = self._refuse(self.url, self.headers)
        if response is None:
            return False
        pieces = [STATUS_LINE[response.status_code]]
        for name, value in (*self.server_state.default_headers, *response.raw_headers):
            pieces += [name, b": ", value, b"\r\n"]
        self.cycle = ANSWERED
        self.transport.write(b"".join([*pieces, b"\r\n", response.body]))
        self.on_response_complete()
        return True

    def _expect_head(self) -> None:
        self._head_bytes = 0
        # nothing was asked that could be answered
        self._late = self.loop.call_later(self._limits.head_seconds, lambda: self.transport.abort())

    def _have_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
