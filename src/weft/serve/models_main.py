"""The other end of `models_process`: a process that loads models, and works until it is told to end or its server is
gone."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import cast

from weft.errors import WeftError
from weft.serve.messages import End, Order
from weft.serve.models import load_models, use_threads
from weft.serve.models_process import ModelsConfig
from weft.serve.quick import make_quick
from weft.serve.wire import Failed, Message, Ready, Wire
from weft.serve.worker import Worker, write_down


def work(load: Callable[[], Worker]) -> None:
    """Serve the `ModelsProcess` that started this process, and exit."""
    # a supervisor may send to all processes of a server
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    # at once: a step that nobody waits for may take long
    is_well = work_on(_own_wire(), load, on_loss=lambda: os._exit(1))
    sys.exit(not is_well)


def work_on(wire: Wire, load: Callable[[], Worker], *, on_loss: Callable[[], None]) -> bool:
    """The same over any connection; whether it ended as it was told to.

    Args:
        on_loss: called, from another thread, where the connection breaks off.
    """
    inbox: SimpleQueue[Order] = SimpleQueue()
    threading.Thread(target=_receive, args=(iter(wire), inbox, on_loss), daemon=True).start()
    try:
        worker = load()
    except Exception as error:  # whoever waits for it says it
        wire.send(error if isinstance(error, WeftError) else _explained(error))
        wire.close()
        return False
    make_quick()
    wire.send(Ready(worker.models, worker.slots))
    failure = worker.run(inbox, wire.send)
    if failure is not None:
        wire.send(Failed(failure))
    wire.close()
    return failure is None


def _explained(error: Exception) -> WeftError:
    first = str(error).partition("\n")[0]
    return WeftError(
        f"the models could not be loaded: {type(error).__name__}: {first}", fix="`weft generate --debug` says where"
    )


def _own_wire() -> Wire:
    """What this process was given as standard input and output; whatever is printed goes to standard error instead."""
    reads, writes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return Wire(reads, writes)


def _receive(messages: Iterator[Message], inbox: "SimpleQueue[Order]", on_loss: Callable[[], None]) -> None:
    try:
        for message in messages:
            inbox.put(cast(Order, message))
            if isinstance(message, End):
                return
    except Exception as error:  # who sends what cannot be read is lost as well
        write_down(error)
    on_loss()


def main() -> None:
    config = ModelsConfig.model_validate_json(sys.argv[1])

    def load() -> Worker:
        use_threads(config.threads)
        models = load_models(config.model, config.adapters, config.load)
        return Worker(models, slots=config.slots, context=config.context)

    work(load)


if __name__ == "__main__":
    main()
