"""A server from its settings to its end: what is refused before it starts, and how it stops."""

import asyncio
import gc
import ipaddress
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import uvicorn
from pydantic import Field, PositiveInt

from weft.config import Config
from weft.errors import UsageError, WeftError
from weft.serve.connection import Connection
from weft.serve.limits import Limits
from weft.serve.scheduler import Scheduler

KEY_VARIABLE = "WEFT_API_KEY"
PublicUrl = Annotated[str, Field(pattern=r"^(https?://[^/\s]+)?$")]
SWITCH_SECONDS = 0.0005
SETTLE_SECONDS = 2.0
"""What is said last may take so long to arrive."""


class ServeConfig(Config):
    """Where a server listens, to whom, and how much it does at once."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any that is free."""
    slots: PositiveInt = 16
    """Answers written at once by each model."""
    context: PositiveInt | None = None
    """Positions of a prompt and its answer; None: as many as the model has."""
    threads: PositiveInt | None = None
    """Of models on a CPU; None: OMP_NUM_THREADS, or half of the cores, as callers need the others."""
    key_file: Path | None = None
    """Keys of callers, one per line. Default: the environment variable WEFT_API_KEY, if it is set."""
    insecure: bool = False
    """Listen on an address that others reach, without keys."""
    public_url: PublicUrl = ""
    """http(s)://HOST[:PORT] put before the addresses of pictures, for pages that show them elsewhere."""
    limits: Limits = Limits()


def read_keys(config: ServeConfig) -> list[str]:
    """
    Raises:
        UsageError: the file cannot be read or is empty; or others could reach the server, and it has no keys.
    """
    if config.key_file is not None:
        try:
            lines = config.key_file.read_text().splitlines()
        except OSError as error:
            raise UsageError(f"the keys cannot be read: {error.strerror}", where=str(config.key_file)) from error
        keys = [line.strip() for line in lines if line.strip()]
        if not keys:
            raise UsageError("the file of keys is empty", where=str(config.key_file), fix="write one key per line")
    else:
        keys = [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    if not keys and not config.insecure and not _is_loopback(config.host):
        raise UsageError(
            f"{config.host} can be reached by others, and no key protects it",
            where="--host",
            fix=f"set {KEY_VARIABLE}, give --key-file, or say --insecure",
        )
    return keys


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


def _make_quick() -> None:
    """So that who reads and writes for callers does not wait for what else this process does."""
    # for the models' thread, several times for each caller
    sys.setswitchinterval(SWITCH_SECONDS)
    # for the garbage collector: what was imported and loaded stays, and takes most of a second to look through
    gc.collect()
    gc.freeze()


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
    _make_quick()
    scheduler.start()
    # whoever is told the address may ask: uvicorn would listen only a moment later
    socket.listen(server.config.backlog)
    say(f"http://{host}:{port}")
    server.run(sockets=[socket])
    if scheduler.failure is not None:
        raise WeftError(
            f"the models stopped working: {type(scheduler.failure).__name__}", fix="see the log above, and start again"
        ) from scheduler.failure
