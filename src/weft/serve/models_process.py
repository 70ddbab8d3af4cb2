"""A host (see `hosts`) whose models are in a process of their own, which neither callers nor their number slow down;
and which may die, by the system's hand too, without taking the answers' last words with it.

    process = in_process(ModelsConfig(model="tiny"))
    ...                                     # it loads while this process imports what it needs
    process.wait_until_loaded()

The server starts it, and they talk through its standard input and output (`wire`). If the server is gone, so are its
models. Signals are the server's affair: it asks the models to end when they have nothing left to do.
"""

import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from pydantic import Field, PositiveInt

from weft.backbones.loading import LoadConfig
from weft.config import Config
from weft.errors import WeftError

if TYPE_CHECKING:
    from weft.serve.messages import Order, Round

END_SECONDS = 5.0
"""Models that are asked to end have nothing to lose: after so long they are killed."""


class ModelsConfig(Config):
    """What the process serves."""

    model: str
    """A name such as `tiny`, a folder, or owner/name of a repository on the hub."""
    adapters: dict[str, Path] = Field(default_factory=dict)
    """Name -> the folder of a trained adapter."""
    load: LoadConfig = LoadConfig()
    slots: PositiveInt = 16
    """Answers written at once by each model."""
    context: PositiveInt | None = None
    """Positions of a prompt and its answer; None: as many as the model has."""
    threads: PositiveInt | None = None
    """On a CPU; see `use_threads`."""


def in_process(config: ModelsConfig) -> "ModelsProcess":
    """The host of models that are still to be loaded."""
    # -P: what lies in the folder where somebody starts a server is not its code
    return ModelsProcess([sys.executable, "-P", "-m", "weft.serve.models_main", config.model_dump_json()])


class ModelsProcess:
    """
    Args:
        command: starts a process that calls `models_main.work`.
    """

    models: tuple[str, ...]
    """Their names."""
    slots: int

    def __init__(self, command: Sequence[str]) -> None:
        # before the seconds of imports, which both need; and where no Ctrl-C of a terminal reaches it
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        # who is interrupted while both start leaves nothing behind
        weakref.finalize(self, self._process.kill)
        from weft.serve.wire import Wire

        self._wire = Wire(cast(BinaryIO, self._process.stdout), cast(BinaryIO, self._process.stdin))
        self._messages = iter(self._wire)
        self._is_ending = False
        self._reader: threading.Thread | None = None

    def wait_until_loaded(self) -> None:
        """
        Raises:
            WeftError: the models could not be loaded.
        """
        from weft.serve.wire import Ready

        try:
            first = next(self._messages, None)
            if isinstance(first, WeftError):
                raise first
            if not isinstance(first, Ready):
                raise WeftError(f"the models could not be loaded: their process {self._end()}", fix="see the log above")
        except BaseException:
            self._process.kill()
            self._wire.close()
            self._end()
            raise
        self.models, self.slots = first.models, first.slots

    def start(self, hear: "Callable[[Round], None]", hear_end: Callable[[str | None], None]) -> None:
        def read() -> None:
            failure = self._read(hear)
            hear_end(None if self._is_ending else failure or f"their process {self._end()}")

        self._reader = threading.Thread(target=read, name="weft-models", daemon=True)
        self._reader.start()

    def send(self, order: "Order") -> None:
        self._wire.send(order)

    def stop(self) -> None:
        from weft.serve.messages import End

        self._is_ending = True
        self.send(End())
        self._wire.close()
        self._end()
        if self._reader is not None:
            self._reader.join()

    def _read(self, hear: "Callable[[Round], None]") -> str | None:
        """Up to the models' last word; what went wrong, where that says it."""
        from weft.serve.wire import Failed
        from weft.serve.worker import write_down

        try:
            for message in self._messages:
                match message:
                    case Failed(failure=failure):
                        return failure
                    case _:
                        hear(cast("Round", message))
        except Exception as error:  # nobody would be told anything any more
            write_down(error)
            self._process.kill()
            return type(error).__name__
        return None

    def _end(self) -> str:
        """How it ended; it is about to."""
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return f"ended with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
