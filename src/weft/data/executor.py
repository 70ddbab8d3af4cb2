"""What an executor is: jobs go in one by one, and come out as they end.

What a job leaves behind is written by whoever does it, so the order in which jobs end decides nothing.
"""

import os
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from weft.config import Config

J = TypeVar("J")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class RayConfig(Config):
    """Of `kind: ray`."""

    address: str | None = None
    """A cluster that runs; None: RAY_ADDRESS, or one is started on this machine for the time of the build."""
    gpus: NonNegativeFloat = 0
    """Of each worker; 0.5: two share one."""


class ExecutorConfig(Config):
    """Who does the work; the result is the same."""

    kind: Literal["serial", "processes", "ray"] = "serial"
    workers: PositiveInt = max(1, min(8, os.cpu_count() or 1))
    """Processes, where `kind` is not `serial`."""
    ray: RayConfig = RayConfig()
    records: PositiveInt = 128
    """Of a unit of work, about: what a worker that is killed has to do again."""
    record_seconds: PositiveFloat = 60
    """A worker process that is longer at one record is ended; `serial` is interrupted as soon as Python can be."""
    max_attempts: PositiveInt = 3
    """At a unit whose work fails, before what fails is set aside."""
    max_bad_units: NonNegativeInt = 10
    """Units of which something was set aside; one more ends the build."""


@dataclass(frozen=True)
class Died:
    """The worker was gone before the job was done."""

    cause: str


class Executor(Protocol[J, R_co]):
    """Made for one function, and closed by the end of a `with` block, which stops what still runs."""

    slots: int
    """Jobs that may be in work at the same time."""

    def submit(self, job: J) -> None: ...

    def next(self) -> tuple[J, R_co | Died]:
        """A job that has ended; waits for one. What the function raised is raised here."""
        ...
