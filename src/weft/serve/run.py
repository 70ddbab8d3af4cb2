"""A server from its settings to its end, and how it stops."""

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from weft.errors import UsageError, WeftError
from weft.serve.connection import Connection
from weft.serve.limits import Limits
from weft.serve.quick import make_quick
from weft.serve.scheduler import Scheduler
from weft.serve.settings import ServeConfig

SETTLE_SECONDS = 2.0
"""What is said last may take so long to arrive."""


class Server(uvicorn.Server):
    """Asked to end, it refuses what is new, lets what runs finish, and only then closes its connections; asked once
    more, it ends at once. It cuts off who does not read what waits for him."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, limits: Limits) -> None:
        super().__init__(config)
        self._scheduler, self._limits = scheduler, limits
        self._ending: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._readers = _Readers(limits.send_seconds)

    async def serve(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._ending is not None or self._loop is None:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._end)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        self._readers.check([connection.transport for connection in self.server_state.connections])
        if self._scheduler.failure is not None:
            # a server whose models stopped working ends, so that somebody notices
            self._end()
        return await super().on_tick(counter)

    def _end(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        await self._scheduler.drain(self._limits.drain_seconds)
        # what was handed over last is on its way; and /health tells of a failure for a moment
        until = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < until and (self.server_state.tasks or self._scheduler.failure is not None):
            await asyncio.sleep(0.02)
        self.should_exit = True


class _Readers:
    """Whether those to whom something is sent take it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._waiting: dict[asyncio.WriteTransport, tuple[int, float]] = {}
        """Bytes that wait for a reader, and since when they have not become fewer."""

    def check(self, transports: Iterable[asyncio.WriteTransport]) -> None:
        """Cut off who has taken nothing for too long, finished answers included."""
        now, before, self._waiting = self._clock(), self._waiting, {}
        for transport in transports:
            size = transport.get_write_buffer_size()
            if size == 0:
                continue
            last, since = before.get(transport, (size, now))
            since = now if size < last else since
            if now - since > self._seconds:
                # a close would wait until all is taken
                transport.abort()
            else:
                self._waiting[transport] = size, since


def server_of(app: Any, scheduler: Scheduler, config: ServeConfig) -> Server:
    settings = uvicorn.Config(
        app, host=config.host, port=config.port, log_level="warning", access_log=False, server_header=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=1, ws="none",
        http=partial(Connection, config.limits, app.state.room.at_once),  # type: ignore[arg-type]
    )  # fmt: skip
    return Server(settings, scheduler, config.limits)


def run_server(app: Any, scheduler: Scheduler, config: ServeConfig, *, say: Any = print) -> None:
    """Serve until a signal comes.

    Raises:
        UsageError: the address cannot be listened on.
        WeftError: the models stopped working.
    """
    server = server_of(app, scheduler, config)
    try:
        socket = server.config.bind_socket()
    except (OSError, SystemExit) as error:
        raise UsageError(
            f"cannot listen on {config.host}:{config.port}", where="--port", fix="name a free port; 0 finds one"
        ) from error
    host, port = socket.getsockname()[:2]
    make_quick()
    scheduler.start()
    # whoever is told the address may ask: uvicorn would listen only a moment later
    socket.listen(server.config.backlog)
    say(f"http://{host}:{port}")
    server.run(sockets=[socket])
    if scheduler.failure is not None:
        raise WeftError(f"the models stopped working: {scheduler.failure}", fix="see the log above, and start again")
