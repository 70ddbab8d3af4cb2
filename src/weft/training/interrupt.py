"""Stopping politely: the first signal asks, the second one does not wait."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C or a termination was asked for, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a command ended by this signal: 130 for Ctrl-C, 143 for a termination."""
        return 0 if self.signal is None else 128 + self.signal

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            # nothing to tidy up: whatever is being written has not taken its final name yet
            os._exit(128 + number)
        self.signal = number


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within it, SIGINT and SIGTERM are noted instead of raised; a second one ends the process at once."""
    interrupt = Interrupt()
    before = {number: signal.signal(number, interrupt._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
