"""The executor on Ray: one actor a worker, so that what a stage has loaded stays loaded. Only jobs and counts travel.

Every node sees the same folders: workers read the sources and write their parts themselves.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic

from weft.data.executor import Died, ExecutorConfig, J, R
from weft.errors import WeftError

_STORE = 128 * 2**20
"""Bytes of Ray's object store: nothing large goes through it."""


@contextmanager
def open_ray(config: ExecutorConfig, function: Callable[[J], R]) -> Iterator["RayExecutor[J, R]"]:
    """Use the cluster that runs, or start one on this machine for as long as the block lasts.

    Raises:
        WeftError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: it would report over the network
    try:
        import ray
    except ImportError as error:
        raise WeftError("executor ray needs the package ray", fix="pip install 'weft[ray]'") from error

    is_ours = not ray.is_initialized()
    if is_ours:
        address = config.ray.address or os.environ.get("RAY_ADDRESS")
        local: dict[str, Any] = {} if address else {"num_cpus": config.workers, "object_store_memory": _STORE}
        try:
            ray.init(
                address=address or "local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **local,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise WeftError(
                f"cannot reach or start a Ray cluster: {error}",
                where="executor.ray.address",
                fix="check the address, or leave it out to start one here",
            ) from error
    executor = RayExecutor(ray, config, function)
    try:
        yield executor
    finally:
        executor.close()
        if is_ours:
            ray.shutdown()


class _Actor:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def run(self, job: Any) -> Any:
        return self._function(job)


class RayExecutor(Generic[J, R]):
    def __init__(self, ray: Any, config: ExecutorConfig, function: Callable[[J], R]) -> None:
        self.slots = config.workers
        self._ray = ray
        actor = ray.remote(num_cpus=1, num_gpus=config.ray.gpus, max_restarts=0, max_task_retries=0)(_Actor)
        self._start = lambda: actor.remote(function)
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, J]] = {}
        """By the reference of the outcome: who is at which job."""

    def submit(self, job: J) -> None:
        actor = self._idle.pop() if self._idle else self._start()
        self._busy[actor.run.remote(job)] = actor, job

    def next(self) -> tuple[J, R | Died]:
        (reference, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        actor, job = self._busy.pop(reference)
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            return job, Died(str(error).partition("\n")[0])
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, WeftError | OSError):
                raise cause from None
            raise WeftError(f"{type(cause).__name__} in a worker: {cause}") from error
        self._idle.append(actor)
        return job, outcome

    def close(self) -> None:
        for actor in (*self._idle, *(actor for actor, _ in self._busy.values())):
            self._ray.kill(actor)
        self._idle, self._busy = [], {}
