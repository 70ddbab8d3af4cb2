"""Runs `weft` commands in forked children that can be told where to die; imports once, so that each starts at once.

Reads a JSON object per line, {"arguments": [...], "fault": null or {"call", "path", "nth", "when"}}; answers with the
child's process id, then with its exit status (negative: the signal that ended it).

A fault ends the child by SIGKILL at the nth call of a function with a path that contains some text: before it, after
it, or, for writes, in the middle.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from weft import cli
from weft.cli import train  # noqa: F401 - imported before the first fork
from weft.generation import Engine  # noqa: F401
from weft.training import make_plan  # noqa: F401


def install(fault: dict[str, object]) -> None:
    owner, name = {
        "replace": (os, "replace"),
        "truncate": (os, "truncate"),
        "rmtree": (shutil, "rmtree"),
        "write": (Path, "write_bytes"),
    }[str(fault["call"])]
    original, calls = getattr(owner, name), 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def faulty(*arguments, **keywords):
        nonlocal calls
        # for a rename, the new name counts
        path = str(arguments[1] if name == "replace" else arguments[0])
        if str(fault["path"]) in path:
            calls += 1
            if calls == fault["nth"]:
                if fault["when"] == "amid":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                elif fault["when"] == "after":
                    original(*arguments, **keywords)
                die()
        return original(*arguments, **keywords)

    setattr(owner, name, faulty)


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if order["fault"]:
                install(order["fault"])
            try:
                cli.main(order["arguments"])
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(int(end.code or 0))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
