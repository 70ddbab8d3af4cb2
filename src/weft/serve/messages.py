"""What callers' side and models' side of a server tell each other; the same in one process and between two."""

from dataclasses import dataclass

from weft.document import Document
from weft.errors import WeftError
from weft.generation import Event, SamplingConfig


@dataclass(frozen=True)
class Ask:
    """A request, under a number of its own."""

    request: int
    model: str
    document: Document
    config: SamplingConfig


@dataclass(frozen=True)
class Leave:
    """Nobody waits for it any more."""

    request: int
    at: float
    """When that was, by `time.monotonic`, which is the same for all processes of a machine."""


@dataclass(frozen=True)
class End:
    """Of all work, whatever is left of it."""


Order = Ask | Leave | End


@dataclass(frozen=True)
class Joined:
    """It has left the line: its answer is being written."""


@dataclass(frozen=True)
class Gone:
    """It left the line because nobody waits for it."""


Report = tuple[int, Joined | Event | WeftError | Gone]
"""(request, what became of it); the last of a request is a `Finished`, an error or `Gone`."""


@dataclass(frozen=True)
class Round:
    """What happened since the last one."""

    reports: tuple[Report, ...]
    steps: int
    """Of all models so far."""
    most_late_steps: int
    """The most that began to work on one request after its caller was gone."""
