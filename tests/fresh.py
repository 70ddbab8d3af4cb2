"""Fresh processes without the seconds that imports take: forked from one that has imported and done nothing else."""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from types import SimpleNamespace

import torch

from weft.backbones import reload

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.fresh", "diffusers.models"])


def _forget_server() -> None:
    # it is a child of the process that was forked: to ask whether it lives would fail here
    forkserver._forkserver._forkserver_pid = None


os.register_at_fork(after_in_child=_forget_server)


def run(command: list[str], *, env: dict[str, str], **options: object) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of `python -m weft.backbones.reload`."""
    assert command[:3] == [sys.executable, "-m", reload.__name__], command
    with tempfile.NamedTemporaryFile("r") as said:
        process = _SERVER.Process(target=_main, args=(command[3:], env, said.name))
        process.start()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, "", said.read())


def _main(arguments: list[str], env: dict[str, str], said: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    with open(said, "w") as file, contextlib.redirect_stderr(file):
        try:
            reload.main(*arguments)
        except SystemExit as end:  # with what is wrong, as `sys.exit` has it
            print(end.code, file=file)
            sys.exit(1)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


FORKED = SimpleNamespace(run=run)
"""What `weft.backbones.reload` may have in the place of `subprocess`."""
