"""Who does the work: this process, or several. Results come in the order of the tasks, so both give the same bytes."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Literal, TypeVar

from pydantic import PositiveInt

from weft.config import Config
from weft.errors import WeftError

T = TypeVar("T")
R = TypeVar("R")


class ExecutorConfig(Config):
    """Who does the work; the result is the same."""

    kind: Literal["serial", "processes"] = "serial"
    workers: PositiveInt = max(1, min(8, os.cpu_count() or 1))
    """Processes, where `kind` is `processes`."""


def run(config: ExecutorConfig, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
    """`function` of every task, in order. With `processes` it and the tasks travel to other processes.

    Raises:
        WeftError: a worker process died.
    """
    if config.kind == "serial":
        yield from map(function, tasks)
        return
    # spawn: a forked child inherits the locks of threads that it does not have
    with ProcessPoolExecutor(config.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                # results wait in memory until their turn: no more of them than keep every worker busy
                if len(waiting) > 2 * config.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise WeftError(
                "a worker process died, most likely for lack of memory",
                fix="use fewer workers (--executor.workers), or --executor.kind serial",
            ) from error
        finally:
            for future in waiting:
                future.cancel()
