"""Servers in processes of their own, forked from one that has imported torch already: seconds each."""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import reduction

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


def _serve(said, serve, arguments):
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)
        serve(*arguments)


class Forked:
    """In the place of `subprocess.Popen` of `python -m tests.serve.nonce --models`."""

    def __init__(self, command, **_):
        assert command[1:4] == ["-m", "tests.serve.nonce", "--models"]
        (reads, self.stdin), (self.stdout, writes) = pipe(), pipe()
        with reads, writes:
            self._forked = fresh._SERVER.Process(target=_models, args=(_given(reads), _given(writes), command[3:]))
            self._forked.start()
        self.pid = self._forked.pid

    def wait(self, timeout=None):
        self._forked.join(timeout)
        if self._forked.is_alive():
            raise subprocess.TimeoutExpired("models", timeout)
        return self._forked.exitcode

    def kill(self):
        self._forked.kill()


def pipe():
    """(what is read, what is written)"""
    reads, writes = os.pipe()
    return os.fdopen(reads, "rb"), os.fdopen(writes, "wb")


def _given(file):
    """Of a file, for a process that is not there yet."""
    return reduction.DupFd(file.fileno())


def _models(reads, writes, arguments):
    os.dup2(reads.detach(), 0)
    os.dup2(writes.detach(), 1)
    nonce(*arguments)
