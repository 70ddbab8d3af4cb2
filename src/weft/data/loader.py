"""Rows of every step, in one order that does not depend on how many read them.

    endless rows --batches--> step 1: rows 0 .. b - 1, step 2: rows b .. 2 b - 1, ...   the same for all
                              of which process r of w reads every w-th from r on, with some workers ahead of time

A step is always whole: rows that were planned or read ahead are planned and read again by whoever goes on.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import torch

from weft.data.rows import Cursor, Row
from weft.errors import CheckpointError, UsageError

T = TypeVar("T")

Plan = Callable[[Cursor], Iterator[tuple[Row, Cursor]]]
"""Rows without end from a cursor on, each with the cursor after it."""


@dataclass(frozen=True)
class Share:
    """Which rows of a step one of several processes reads."""

    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """One step's rows of this process."""

    rows: tuple[Row, ...]
    read: tuple[T, ...]


class Loader(Generic[T]):
    """An iterator over steps, without end, that can be left and entered anywhere."""

    def __init__(
        self, plan: Plan, read: Callable[[Row], T], batch: int, order: str, share: Share = Share(), workers: int = 0
    ) -> None:
        """
        Args:
            read: what a row holds. With workers it is called in other threads, several at a time.
            batch: rows of a step, over all processes.
            order: what the order of rows depends on, in any spelling: a state is taken back for the same alone.
            workers: threads that read ahead; 0: rows are read when they are asked for.
        """
        if batch % share.world:
            raise UsageError(
                f"{batch} rows of a step cannot be shared by {share.world} processes",
                fix="use a multiple of the number of processes",
            )
        self._plan, self._read, self._batch, self._order = plan, read, batch, order
        self._share, self._workers = share, workers
        self.cursor = Cursor()
        """After the last step that was given out."""

    def state(self) -> dict[str, Any]:
        """Where it stands, as JSON: what `restore` takes."""
        return {"order": self._order, "world": self._share.world, "cursor": asdict(self.cursor)}

    def restore(self, state: Mapping[str, Any], *, reshard: bool = False) -> None:
        """Go on where another loader stood.

        Args:
            reshard: it may have been one of another number of processes. Steps stay the same, who reads what changes.

        Raises:
            CheckpointError: the state is of another order of rows, or none.
            UsageError: it is of another number of processes, and `reshard` was not asked for.
        """
        try:
            order, world, cursor = state["order"], state["world"], Cursor(**state["cursor"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"this is not the state of a loader: {error}") from error
        if order != self._order:
            raise CheckpointError(
                f"the rows before came in another order: {order!r}, now {self._order!r}",
                fix="go on with the same documents, model and packing",
            )
        if world != self._share.world and not reshard:
            raise UsageError(
                f"{world} processes shared the rows before, now {self._share.world} do",
                fix=f"start {world} processes, or share the same steps anew: --data.reshard true",
            )
        self.cursor = cursor

    def __iter__(self) -> Iterator[Loaded[T]]:
        for rows, read, after in self._read_ahead() if self._workers else self._read_when_asked():
            self.cursor = after
            yield Loaded(rows, read)

    def _read_when_asked(self) -> Iterator[tuple[tuple[Row, ...], tuple[T, ...], Cursor]]:
        for rows, after in self._steps():
            yield rows, tuple(map(self._read, rows)), after

    def _read_ahead(self) -> Iterator[tuple[tuple[Row, ...], tuple[T, ...], Cursor]]:
        # as in this thread, so that who reads a document does not change its bits
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self._workers, initializer=torch.set_num_threads, initargs=(threads,))
        waiting: deque[tuple[tuple[Row, ...], list[Future[T]], Cursor]] = deque()
        try:
            for rows, after in self._steps():
                waiting.append((rows, [pool.submit(self._read, row) for row in rows], after))
                # the step to give out, and enough behind it for all to have something to do
                if (len(waiting) - 1) * len(rows) >= self._workers:
                    first, futures, cursor = waiting.popleft()
                    yield first, tuple(future.result() for future in futures), cursor
        finally:
            pool.shutdown(cancel_futures=True)

    def _steps(self) -> Iterator[tuple[tuple[Row, ...], Cursor]]:
        """This process's rows of every step, and the cursor after the step."""
        plan = self._plan(self.cursor)
        while True:
            rows, cursors = zip(*islice(plan, self._batch), strict=True)
            yield rows[self._share.rank :: self._share.world], cursors[-1]
