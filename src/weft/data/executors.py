"""Who does the work: this process, several, or a Ray cluster."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Generic

from weft.data.executor import Died, Executor, ExecutorConfig, J, R
from weft.errors import WeftError


@contextlib.contextmanager
def open_executor(config: ExecutorConfig, function: Callable[[J], R]) -> Iterator[Executor[J, R]]:
    """Raises `WeftError` where workers cannot be started."""
    if config.kind == "serial":
        yield Serial(function)
    elif config.kind == "processes":
        with contextlib.closing(Processes(function, config.workers)) as processes:
            yield processes
    else:
        from weft.data.ray_executor import open_ray

        with open_ray(config, function) as executor:
            yield executor


class Serial(Generic[J, R]):
    slots = 1

    def __init__(self, function: Callable[[J], R]) -> None:
        self._function = function
        self._jobs: deque[J] = deque()

    def submit(self, job: J) -> None:
        self._jobs.append(job)

    def next(self) -> tuple[J, R | Died]:
        job = self._jobs.popleft()
        return job, self._function(job)


@dataclass
class _Process(Generic[J]):
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    job: J | None = None
    has_started: bool = False


class Processes(Generic[J, R]):
    """Processes that are started when there is work for them. One that dies costs its job alone."""

    def __init__(self, function: Callable[[J], R], workers: int) -> None:
        self.slots = workers
        self._function = function
        # spawn: a forked child inherits the locks of threads that it does not have
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Process[J]] = []

    def submit(self, job: J) -> None:
        idle = next((worker for worker in self._workers if worker.job is None), None) or self._start()
        idle.job = job
        # one that has died meanwhile is noticed when its answer is waited for
        with contextlib.suppress(OSError):
            idle.pipe.send(job)

    def next(self) -> tuple[J, R | Died]:
        while True:
            busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
            worker = next(busy[pipe] for pipe in wait(list(busy)) if isinstance(pipe, Connection))
            try:
                outcome = worker.pipe.recv()
            except (EOFError, OSError):
                return self._bury(worker)
            if not worker.has_started:
                worker.has_started = True
                continue
            job, worker.job = worker.job, None
            assert job is not None
            if isinstance(outcome, Exception):
                raise outcome
            return job, outcome

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()

    def _start(self) -> _Process[J]:
        pipe, end = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(end, self._function), daemon=True)
        process.start()
        end.close()  # the last copy but the child's: when that is gone, so is the child
        self._workers.append(_Process(process, pipe))
        return self._workers[-1]

    def _bury(self, worker: _Process[J]) -> tuple[J, Died]:
        self._workers.remove(worker)
        worker.process.join()
        cause = _cause(worker.process.exitcode)
        if not worker.has_started:
            raise WeftError(
                f"a worker process could not be started: {cause}",
                fix="a script that builds needs `if __name__ == '__main__':` around it; or use --executor.kind serial",
            )
        assert worker.job is not None
        return worker.job, Died(cause)


def _serve(pipe: Connection, function: Callable[[J], R]) -> None:
    """A worker process, to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(None)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        outcome: R | Exception
        try:
            outcome = function(job)
        except (WeftError, OSError) as error:
            outcome = error
        except Exception as error:  # of any kind, and not all kinds can travel
            outcome = WeftError(f"{type(error).__name__} in a worker: {error}")
        pipe.send(outcome)


def _end_with_parent() -> None:
    """Nothing is written any more once the process that asked for it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name} (out of memory?)" if name == "SIGKILL" else name
    return f"exit code {code}"
