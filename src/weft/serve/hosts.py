"""Where the models of a server work: in a thread of its process, or in a process of their own (`models_process`)."""

import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Protocol

from weft.backbones.base import Backbone
from weft.serve.messages import End, Order, Round
from weft.serve.worker import Worker


class Host(Protocol):
    """Runs a `Worker`."""

    @property
    def slots(self) -> int:
        """Answers that all models write at once."""

    def start(self, hear: Callable[[Round], None], hear_end: Callable[[str | None], None]) -> None:
        """
        Args:
            hear: called with what happened, in order, from one thread.
            hear_end: called once, after all else; with what went wrong, if the models were not asked to end.
        """

    def send(self, order: Order) -> None:
        """Hand in an order; never waits."""

    def stop(self) -> None:
        """Have the models end, and wait until they have."""


def in_thread(models: Mapping[str, Backbone], *, slots: int, context: int | None = None) -> Host:
    """The host for models that are here already; for the arguments see `Worker`."""
    return _Thread(Worker(models, slots=slots, context=context))


class _Thread:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._inbox: SimpleQueue[Order] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def slots(self) -> int:
        return self._worker.slots

    def start(self, hear: Callable[[Round], None], hear_end: Callable[[str | None], None]) -> None:
        def work() -> None:
            hear_end(self._worker.run(self._inbox, hear))

        self._thread = threading.Thread(target=work, name="weft-models", daemon=True)
        self._thread.start()

    def send(self, order: Order) -> None:
        self._inbox.put(order)

    def stop(self) -> None:
        self.send(End())
        if self._thread is not None:
            self._thread.join()
