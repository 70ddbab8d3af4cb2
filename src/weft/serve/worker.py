"""The models' side of a server: lines of requests, and the batches that they join and leave between two steps.

    worker.run(inbox, tell)

Neither threads nor connections are its affair: orders come in through a queue, and all that came of a round of steps is
told at once.
"""

import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue

from weft.backbones.base import Backbone
from weft.errors import UsageError, WeftError
from weft.generation import Engine, Event, Finished, slots_for
from weft.serve.messages import Ask, End, Gone, Joined, Leave, Order, Report, Round

log = logging.getLogger(__name__)
REMEMBERED = 64
"""Steps of which it is known when they began."""


class Unexpected(WeftError):
    """One request failed, through no fault of its caller; the others go on."""

    code = "unexpected"


@dataclass(eq=False)
class _Desk:
    """One model: its engine, its line, and what is being answered."""

    backbone: Backbone
    engine: Engine
    slots: int
    line: deque[Ask] = field(default_factory=deque)
    running: dict[int, int] = field(default_factory=dict)
    """The engine's number of a request -> the server's."""
    promised: int = 0
    """Slots of requests that were submitted since the last step, which gives them theirs."""
    begins: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """Of the last steps."""

    @property
    def room(self) -> int:
        return self.engine.free_slots - self.promised

    @property
    def has_work(self) -> bool:
        return bool(self.running or (self.line and self.room > 0))


class Worker:
    """One engine for each model, stepped in turns.

    Args:
        models: name -> the model; several may share their base's weights.
        slots: of each engine. What runs beside a request does not change its answer, as long as this is the same.
        context: positions of a prompt and its answer; None: as many as each model has.
    """

    def __init__(self, models: Mapping[str, Backbone], *, slots: int, context: int | None = None) -> None:
        self._desks = {
            name: _Desk(backbone, Engine(backbone, slots=slots, context=context), slots)
            for name, backbone in models.items()
        }
        self._steps = self._most_late_steps = 0

    @property
    def models(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._desks)

    @property
    def slots(self) -> int:
        """Of all models."""
        return sum(desk.slots for desk in self._desks.values())

    def run(self, inbox: "SimpleQueue[Order]", tell: Callable[[Round], None]) -> str | None:
        """Work until the order to end; or until a step fails, and then nothing can be answered any more.

        Returns:
            The name of what went wrong, which is written down here.
        """
        try:
            self._run(inbox, tell)
        except BaseException as error:  # nobody else would hear of it
            write_down(error)
            return type(error).__name__
        return None

    def _run(self, inbox: "SimpleQueue[Order]", tell: Callable[[Round], None]) -> None:
        reports: list[Report] = []

        def tell_all() -> None:
            if reports:
                tell(Round(tuple(reports), self._steps, self._most_late_steps))
                reports.clear()

        while self._take_orders(inbox, reports):
            for desk in self._desks.values():
                self._admit(desk, reports)
            # a step may take long: whoever joined no longer waits
            tell_all()
            for desk in self._desks.values():
                self._step(desk, reports)
            tell_all()

    def _take_orders(self, inbox: "SimpleQueue[Order]", reports: list[Report]) -> bool:
        """All that are there; where there is nothing to do, wait for one. False: end."""
        order = None if any(desk.has_work for desk in self._desks.values()) else inbox.get()
        while True:
            match order:
                case Ask(request=request, model=model):
                    if model in self._desks:
                        self._desks[model].line.append(order)
                    else:
                        reports.append((request, UsageError(f"there is no model called {model!r}")))
                case Leave():
                    self._leave(order, reports)
                case End():
                    return False
            try:
                order = inbox.get_nowait()
            except Empty:
                return True

    def _leave(self, order: Leave, reports: list[Report]) -> None:
        for desk in self._desks.values():
            for waiting in desk.line:
                if waiting.request == order.request:
                    desk.line.remove(waiting)
                    reports.append((order.request, Gone()))
                    return
            for number, request in desk.running.items():
                if request == order.request:
                    desk.engine.cancel(number)
                    late = sum(begin > order.at for begin in desk.begins)
                    self._most_late_steps = max(self._most_late_steps, late)
                    return

    def _admit(self, desk: _Desk, reports: list[Report]) -> None:
        """Let those at the front of the line join the batch."""
        while desk.line and desk.room >= min(slots_for(desk.backbone, desk.line[0].config), desk.slots):
            asked = desk.line.popleft()
            try:
                number = desk.engine.submit(asked.document, asked.config)
            except WeftError as error:
                reports.append((asked.request, error))
                continue
            except Exception as error:  # a prompt that cannot be read has not touched what others wait for
                write_down(error)
                unread = Unexpected(f"the prompt could not be read: {type(error).__name__}")
                reports.append((asked.request, unread))
                continue
            desk.running[number] = asked.request
            desk.promised += slots_for(desk.backbone, asked.config)
            reports.append((asked.request, Joined()))

    def _step(self, desk: _Desk, reports: list[Report]) -> None:
        if not desk.running:
            return
        desk.promised = 0
        self._steps += 1
        desk.begins.append(time.monotonic())
        events = desk.engine.step()
        for event in events:
            reports.append(_renumbered(event, desk.running[event.request]))
            if isinstance(event, Finished):
                del desk.running[event.request]


def _renumbered(event: Event, request: int) -> Report:
    return request, replace(event, request=request)


def write_down(error: BaseException) -> None:
    """Where it happened, without its message: that may hold anything of a prompt."""
    log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
