"""Requests of many people, and the one thread in which models run.

    async for event in scheduler.answer(model, document, config): ...

A request waits in its model's line until slots are free, joins the running batch at the next step, and leaves it when
it is finished, when its caller is gone, or when it waited too long. Callers live in an event loop; the thread takes
their orders between two steps and hands all events of a step over at once. Whatever happens, a request has exactly one
outcome: its last event, or an error.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from weft.backbones.base import Backbone
from weft.document import Document
from weft.errors import WeftError
from weft.generation import Engine, Event, Finished, SamplingConfig, slots_for

log = logging.getLogger(__name__)
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
    """The thread that runs the models is gone."""

    code: ClassVar[str] = "engine_down"


class Unexpected(WeftError):
    """One request failed, through no fault of its caller; the others go on."""

    code: ClassVar[str] = "unexpected"


@dataclass(eq=False)
class _Ticket:
    """One request, from its arrival to its outcome."""

    document: Document
    config: SamplingConfig
    loop: asyncio.AbstractEventLoop
    arrived: float
    outbox: "asyncio.Queue[Event | WeftError]" = field(default_factory=asyncio.Queue)
    is_given_up: bool = False
    """Its caller is gone."""
    started: float | None = None
    late_steps: int = 0
    """Steps that worked on it although its caller was gone."""


@dataclass(eq=False)
class _Desk:
    """One model: its engine, its line, and what is being answered."""

    backbone: Backbone
    engine: Engine
    slots: int
    line: deque[_Ticket] = field(default_factory=deque)
    running: dict[int, _Ticket] = field(default_factory=dict)
    promised: int = 0
    """Slots of requests that were submitted since the last step, which gives them theirs."""

    @property
    def room(self) -> int:
        return self.engine.free_slots - self.promised


@dataclass(frozen=True)
class Load:
    """How much there is to do."""

    waiting: int
    running: int
    slots: int


class Scheduler:
    """Owns one engine for each model, all stepped by one thread.

    Args:
        models: name -> the model; several may share their base's weights.
        slots: of each engine. What runs beside a request does not change its answer, as long as this is the same.
        queue: requests of all models that may wait; None: four for each slot.
        queue_seconds: how long one may wait.
    """

    def __init__(
        self,
        models: Mapping[str, Backbone],
        *,
        slots: int,
        context: int | None = None,
        queue: int | None = None,
        queue_seconds: float = 60.0,
    ) -> None:
        self._desks = {
            name: _Desk(backbone, Engine(backbone, slots=slots, context=context), slots)
            for name, backbone in models.items()
        }
        self.queue = 4 * slots * len(models) if queue is None else queue
        self._queue_seconds = queue_seconds
        self._orders: deque[tuple[_Desk, _Ticket]] = deque()
        self._wake = threading.Condition()
        self._given_up = False
        self._is_closing = self._must_end = False
        self._failure: BaseException | None = None
        self._waiting = 0
        """Places of the queue that are taken, for callers to see: never too few."""
        self._durations: deque[float] = deque(maxlen=RECENT)
        self.steps = 0
        """Steps of all engines so far."""
        self.most_late_steps = 0
        """The most steps that worked on one request after its caller was gone: at most the one that was under way."""
        self._open: set[_Ticket] = set()
        """What callers listen to; touched where they are only."""
        self._thread = threading.Thread(target=self._work, name="weft-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread, if it did not end by itself."""
        return self._failure

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    @property
    def load(self) -> Load:
        # from where they really are: what callers count is corrected a moment after a request has joined the batch
        desks = self._desks.values()
        waiting = len(self._orders) + sum(len(desk.line) for desk in desks)
        return Load(waiting, sum(len(desk.running) for desk in desks), sum(desk.slots for desk in desks))

    async def answer(self, model: str, document: Document, config: SamplingConfig) -> AsyncGenerator[Event]:
        """Events of one request up to its `Finished`. A caller that stops listening ends the request.

        Raises:
            Busy: as many requests wait as may.
            Closing: the server ends.
            Overdue: it waited too long.
            EngineDown: the models' thread ended, before or during the answer.
            WeftError: the request cannot be answered (see `Engine.submit`).
        """
        ticket = _Ticket(document, config, asyncio.get_running_loop(), time.monotonic())
        with self._wake:
            # within the lock: what is handed in is seen by the thread, even by one that ends
            self.check_room()
            self._orders.append((self._desks[model], ticket))
            self._wake.notify()
        self._waiting += 1
        self._open.add(ticket)
        try:
            while True:
                event = await ticket.outbox.get()
                if isinstance(event, WeftError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._open.discard(ticket)
            ticket.is_given_up = True
            with self._wake:
                self._given_up = True
                self._wake.notify()

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
        return min(60, max(1, math.ceil(typical * self._waiting / self.load.slots)))

    async def drain(self, seconds: float) -> None:
        """Take nothing new, wait at most so long for what runs and waits, then end all that is left, and the thread."""
        self._is_closing = True
        until = time.monotonic() + seconds
        while self._open and self._failure is None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        # from here, not from the thread, whose step may take long
        for ticket in list(self._open):
            error = Closing("the server ended before this was answered")
            _call(ticket.loop, ticket.outbox.put_nowait, error)
        with self._wake:
            self._must_end = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._take_orders():
                handed: list[tuple[_Ticket, Event | WeftError]] = []
                for desk in self._desks.values():
                    self._admit(desk, handed)
                    self._step(desk, handed)
                self._hand_over(handed)
        except BaseException as error:  # nobody else would hear of it
            _write_down(error)
            self._end_all(error)

    def _take_orders(self) -> bool:
        """Wait for something to do; False: the thread ends."""
        with self._wake:
            while not (self._orders or self._given_up or self._must_end or self._has_work()):
                self._wake.wait()
            while self._orders:
                desk, ticket = self._orders.popleft()
                desk.line.append(ticket)
            self._given_up = False
            return not self._must_end

    def _has_work(self) -> bool:
        return any(desk.running or (desk.line and desk.room > 0) for desk in self._desks.values())

    def _admit(self, desk: _Desk, handed: "list[tuple[_Ticket, Event | WeftError]]") -> None:
        """Let those at the front of the line join the batch; those who left or waited too long go."""
        now = time.monotonic()
        for ticket in list(desk.line):
            if ticket.is_given_up or now - ticket.arrived > self._queue_seconds:
                desk.line.remove(ticket)
                self._leave_line(ticket)
                late = f"no slot became free in {self._queue_seconds:g} s"
                handed.append((ticket, Overdue(late, self.retry_after())))
        while desk.line and desk.room >= min(slots_for(desk.backbone, desk.line[0].config), desk.slots):
            ticket = desk.line.popleft()
            self._leave_line(ticket)
            try:
                request = desk.engine.submit(ticket.document, ticket.config)
            except WeftError as error:
                handed.append((ticket, error))
                continue
            except Exception as error:  # a prompt that cannot be read has not touched what others wait for
                _write_down(error)
                handed.append((ticket, Unexpected(f"the prompt could not be read: {type(error).__name__}")))
                continue
            ticket.started = now
            desk.running[request] = ticket
            desk.promised += slots_for(desk.backbone, ticket.config)

    def _step(self, desk: _Desk, handed: "list[tuple[_Ticket, Event | WeftError]]") -> None:
        if not desk.running:
            return
        left = {request for request, ticket in desk.running.items() if ticket.is_given_up}
        for request in left:
            desk.engine.cancel(request)
        desk.promised = 0
        self.steps += 1
        events = desk.engine.step()
        for request, ticket in desk.running.items():
            if ticket.is_given_up and request not in left:
                ticket.late_steps += 1
                self.most_late_steps = max(self.most_late_steps, ticket.late_steps)
        for event in events:
            ticket = desk.running[event.request]
            handed.append((ticket, event))
            if isinstance(event, Finished):
                del desk.running[event.request]
                if ticket.started is not None:
                    self._durations.append(time.monotonic() - ticket.started)

    def _leave_line(self, ticket: _Ticket) -> None:
        # counted where callers are, so that two of them never see the same place free
        _call(ticket.loop, self._forget_one)

    def _forget_one(self) -> None:
        self._waiting -= 1

    def _hand_over(self, handed: "list[tuple[_Ticket, Event | WeftError]]") -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, Event | WeftError]]] = {}
        for ticket, event in handed:
            by_loop.setdefault(ticket.loop, []).append((ticket, event))
        for loop, of_loop in by_loop.items():
            _call(loop, _deliver, of_loop)

    def _end_all(self, failure: BaseException) -> None:
        with self._wake:
            self._failure = failure
            left = [ticket for _, ticket in self._orders]
            self._orders.clear()
        for desk in self._desks.values():
            left += [*desk.line, *desk.running.values()]
            desk.line.clear()
            desk.running.clear()
        for ticket in left:
            if ticket.started is None:
                self._leave_line(ticket)
        error = EngineDown("the models stopped working while this was answered")
        self._hand_over([(ticket, error) for ticket in left])


def _deliver(handed: "list[tuple[_Ticket, Event | WeftError]]") -> None:
    for ticket, event in handed:
        ticket.outbox.put_nowait(event)


def _call(loop: asyncio.AbstractEventLoop, what: Callable[..., None], *given: Any) -> None:
    # a loop that is closed has nobody left who listens
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(what, *given)


def _write_down(error: BaseException) -> None:
    """Where it happened, without its message: that may hold anything of a prompt."""
    log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
