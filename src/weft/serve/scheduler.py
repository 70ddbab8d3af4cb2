"""Requests of many people, and the models that answer them.

    scheduler = Scheduler(in_thread({"tiny": backbone}, slots=16))
    async for event in scheduler.answer("tiny", document, config): ...

A request waits in its model's line until slots are free, joins the running batch at the next step, and leaves it when
it is finished, when its caller is gone, or when it waited too long. Callers live in an event loop; the models work
elsewhere (see `hosts`), and all that came of a step is heard at once. Whatever happens, a request has exactly one
outcome: its last event, or an error.
"""

import asyncio
import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.document import Document
from weft.errors import WeftError
from weft.generation import Event, Finished, SamplingConfig
from weft.serve.hosts import Host
from weft.serve.messages import Ask, Gone, Joined, Leave, Round

RECENT = 64
"""Requests whose durations say how long a caller should wait."""


class Refused(WeftError):
    """There is too much to do now.

    Args:
        retry_after: whole seconds after which it is worth to ask again.
    """

    def __init__(self, what: str, retry_after: int) -> None:
        super().__init__(what, fix=f"ask again in {retry_after} s")
        self.retry_after = retry_after


class Busy(Refused):
    """The line is full."""

    code: ClassVar[str] = "busy"


class Overdue(Refused):
    """No slot became free in time."""

    code: ClassVar[str] = "overdue"


class Closing(WeftError):
    """The server is asked to end, and takes nothing new."""

    code: ClassVar[str] = "closing"


class EngineDown(WeftError):
    """The models work no more."""

    code: ClassVar[str] = "engine_down"


@dataclass(eq=False)
class _Ticket:
    """One request, from its arrival to its outcome."""

    loop: asyncio.AbstractEventLoop
    outbox: "asyncio.Queue[Event | WeftError]" = field(default_factory=asyncio.Queue)
    joined: float | None = None
    """When its answer was begun."""


@dataclass(frozen=True)
class Load:
    """How much there is to do."""

    waiting: int
    running: int
    slots: int


class Scheduler:
    """
    Args:
        host: where the models work. It is the scheduler's own.
        queue: requests of all models that may wait; None: four for each slot.
        queue_seconds: how long one may wait.
    """

    def __init__(self, host: Host, *, queue: int | None = None, queue_seconds: float = 60.0) -> None:
        self._host = host
        self.queue = 4 * host.slots if queue is None else queue
        self._queue_seconds = queue_seconds
        self._lock = threading.Lock()
        """Callers' loops and the host's thread meet here."""
        self._numbers = itertools.count()
        self._tickets: dict[int, _Ticket] = {}
        """Of requests that the models have, until the models' last word."""
        self._waiting = 0
        self._open: set[_Ticket] = set()
        """What callers listen to; touched where they are only."""
        self._is_closing = False
        self._failure: str | None = None
        self._durations: deque[float] = deque(maxlen=RECENT)
        self.steps = 0
        """Steps of all engines so far."""
        self.most_late_steps = 0
        """The most steps that began to work on one request after its caller was gone: at most one, unless steps are
        shorter than it takes to tell the models."""

    def start(self) -> None:
        self._host.start(self._hear, self._hear_end)

    @property
    def failure(self) -> str | None:
        """What ended the models, if they were not asked to end."""
        return self._failure

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    @property
    def load(self) -> Load:
        with self._lock:
            return Load(self._waiting, len(self._tickets) - self._waiting, self._host.slots)

    async def answer(self, model: str, document: Document, config: SamplingConfig) -> AsyncGenerator[Event]:
        """Events of one request up to its `Finished`. A caller that stops listening ends the request.

        Raises:
            Busy: as many requests wait as may.
            Closing: the server ends.
            Overdue: it waited too long.
            EngineDown: the models ended, before or during the answer.
            WeftError: the request cannot be answered (see `Engine.submit`).
        """
        loop = asyncio.get_running_loop()
        ticket, number = _Ticket(loop), next(self._numbers)
        with self._lock:
            # with one look: of two callers one gets the last place
            self.check_room()
            self._host.send(Ask(number, model, document, config))
            self._tickets[number] = ticket
            self._waiting += 1
        self._open.add(ticket)
        overdue = loop.call_later(self._queue_seconds, self._give_up, ticket)
        try:
            while True:
                event = await ticket.outbox.get()
                if isinstance(event, WeftError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            overdue.cancel()
            self._open.discard(ticket)
            with self._lock:
                if number in self._tickets:
                    self._host.send(Leave(number, time.monotonic()))

    def check_room(self) -> None:
        """Raise what `answer` would raise before anything is done: `EngineDown`, `Closing` or `Busy`."""
        if self._failure is not None:
            raise EngineDown("the models stopped working")
        if self._is_closing:
            raise Closing("the server is shutting down", fix="ask another one, or again later")
        if self._waiting >= self.queue:
            raise Busy(f"{self._waiting} requests are waiting already", self.retry_after())

    def retry_after(self) -> int:
        """Seconds, at least 1, after which a slot may be free."""
        if not self._durations:
            return 1
        typical = sum(self._durations) / len(self._durations)
        return min(60, max(1, math.ceil(typical * self._waiting / self._host.slots)))

    async def drain(self, seconds: float) -> None:
        """Take nothing new, wait at most so long for what runs and waits, then end all that is left, and the models."""
        self._is_closing = True
        until = time.monotonic() + seconds
        while self._open and self._failure is None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        # from here, not from the models, whose step may take long
        error = Closing("the server ended before this was answered")
        for ticket in list(self._open):
            _call(ticket.loop, ticket.outbox.put_nowait, error)
        await asyncio.to_thread(self._host.stop)

    def _give_up(self, ticket: _Ticket) -> None:
        if ticket.joined is None:
            late = f"no slot became free in {self._queue_seconds:g} s"
            ticket.outbox.put_nowait(Overdue(late, self.retry_after()))

    # --- in the host's thread ---------------------------------------------------------------------------------------

    def _hear(self, told: Round) -> None:
        handed: list[tuple[_Ticket, Event | WeftError]] = []
        now = time.monotonic()
        with self._lock:
            self.steps, self.most_late_steps = told.steps, told.most_late_steps
            for number, what in told.reports:
                ticket = self._tickets[number]
                if isinstance(what, Joined):
                    ticket.joined = now
                    self._waiting -= 1
                    continue
                if isinstance(what, Finished | WeftError | Gone):
                    del self._tickets[number]
                    if ticket.joined is None:
                        self._waiting -= 1
                    elif isinstance(what, Finished):
                        self._durations.append(now - ticket.joined)
                if not isinstance(what, Gone):
                    handed.append((ticket, what))
        _hand_over(handed)

    def _hear_end(self, failure: str | None) -> None:
        with self._lock:
            self._failure = failure
            left = list(self._tickets.values())
            self._tickets.clear()
            self._waiting = 0
        error = EngineDown("the models stopped working while this was answered")
        _hand_over([(ticket, error) for ticket in left])


def _hand_over(handed: "list[tuple[_Ticket, Event | WeftError]]") -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, Event | WeftError]]] = {}
    for ticket, event in handed:
        by_loop.setdefault(ticket.loop, []).append((ticket, event))
    for loop, of_loop in by_loop.items():
        _call(loop, _deliver, of_loop)


def _deliver(handed: "list[tuple[_Ticket, Event | WeftError]]") -> None:
    for ticket, event in handed:
        ticket.outbox.put_nowait(event)


def _call(loop: asyncio.AbstractEventLoop, what: Callable[..., None], *given: Any) -> None:
    # a loop that is closed has nobody left who listens
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(what, *given)
