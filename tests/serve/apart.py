"""Servers in processes of their own, forked from one that has imported torch already: seconds each."""

import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from tests import fresh
from tests.serve.running import PATIENCE, until


@dataclass
class Apart:
    url: str
    process: psutil.Process
    _forked: object
    _said: str

    def wait(self):
        """The code with which it exits."""
        self._forked.join(PATIENCE)
        return self._forked.exitcode

    @property
    def said(self):
        with open(self._said) as file:
            return file.read()


@contextmanager
def apart(serve, *arguments):
    """`serve(*arguments)`, a function of a module, in a process of its own; it writes its address to standard error."""
    with tempfile.NamedTemporaryFile("r") as said:
        forked = fresh._SERVER.Process(target=_serve, args=(said.name, serve, arguments))
        forked.start()
        try:
            address = []

            def is_up():
                address[:] = re.findall(r"http://\S+\n", said.read()) or address
                assert forked.is_alive() or address, "the server did not start"
                return bool(address)

            until(is_up)
            yield Apart(address[0].strip(), psutil.Process(forked.pid), forked, said.name)
        finally:
            forked.terminate()
            forked.join(PATIENCE)
            forked.kill()


def nonce(*arguments):
    """`python -m tests.serve.nonce ARGUMENTS`"""
    from tests.serve.nonce import main

    sys.argv = ["nonce", *arguments]
    main()


def failing(steps):
    """`weft serve nano`, whose engine fails after so many steps."""
    from weft.cli import main
    from weft.generation import Engine

    step, done = Engine.step, 0

    def fail(engine):
        nonlocal done
        done += 1
        if done > steps:
            raise RuntimeError(f"what somebody asked, {done}")
        return step(engine)

    Engine.step = fail
    sys.modules["gradio"] = None  # seconds, for a page that nobody asks for
    main(["serve", "nano", "--port", "0", "--slots", "2"])


def _serve(said, serve, arguments):
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)
        serve(*arguments)
