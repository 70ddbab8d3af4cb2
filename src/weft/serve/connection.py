"""A connection that ends where a request is begun and does not go on: nobody else counts its bytes and seconds."""

from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from weft.serve.limits import Limits


class Connection(HttpToolsProtocol):
    """uvicorn's, with an end to what is sent before a request has its address and headers."""

    def __init__(self, limits: Limits, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._limits = limits
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
        if self._late is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes:
                self.send_400_response("The headers are too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._late is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._have_head()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        # nothing was asked that could be answered
        self._late = self.loop.call_later(self._limits.head_seconds, lambda: self.transport.abort())

    def _have_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
