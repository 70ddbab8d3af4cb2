"""What begins as a request and does not go on is not waited for; what goes on is."""

import asyncio
import socket
import threading
from contextlib import contextmanager

import pytest

from tests.serve.nonce import NonceBackbone, ask, new_nonce
from tests.serve.running import PATIENCE, running
from weft.serve import run
from weft.serve.limits import Limits
from weft.serve.scheduler import Scheduler

HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"


@pytest.fixture(scope="module")
def server():
    limits = Limits(head_seconds=1, head_bytes=4096, body_seconds=1)
    pause = threading.Event()
    with running({"nonce": NonceBackbone(before_step=lambda: pause.wait(0.05) and None)}, limits=limits) as server:
        yield server


@contextmanager
def connected(server):
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        yield connection


def all_of(connection):
    """Until the server closes it."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def test_who_is_told_the_address_can_connect(monkeypatch):
    class Told(Exception):
        pass

    def say(address):
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE):
            raise Told

    monkeypatch.setattr(run, "_make_quick", lambda: None)  # of this process
    scheduler = Scheduler({"nonce": NonceBackbone()}, slots=1)
    with pytest.raises(Told):
        run.run_server(None, scheduler, run.ServeConfig(port=0), say=say)
    asyncio.run(scheduler.drain(0))


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nhost: a\r\n"])
def test_a_head_that_does_not_come_is_not_waited_for(server, sent):
    with connected(server) as connection:
        connection.sendall(sent)
        assert all_of(connection) == b""


def test_neither_is_the_second_one_of_a_connection(server):
    with connected(server) as connection:
        connection.sendall(HEALTH)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(HEALTH[:20])
        # what is left of the first answer, and no second one
        assert b"HTTP/1.1" not in all_of(connection)


def test_a_head_that_does_not_end_is_refused(server):
    with connected(server) as connection:
        connection.sendall(HEALTH[:-2])
        for number in range(5):
            connection.sendall(b"x-%d: %s\r\n" % (number, b"a" * 1000))
        assert all_of(connection).startswith(b"HTTP/1.1 400")
    with connected(server) as connection:
        connection.sendall(HEALTH[:-2] + b"x-a: %s\r\n\r\n" % (b"a" * 3000))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_body_that_does_not_come_is_not_waited_for(server):
    with connected(server) as connection:
        connection.sendall(b"POST /v1/responses HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{")
        reply = all_of(connection)
        assert reply.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in reply


def test_an_answer_may_take_longer_than_its_question(server):
    asked = {"model": "nonce", "input": ask(new_nonce(), "t" * 3)}
    answer = server.http().post("/v1/responses", json=asked)
    assert answer.status_code == 200
    assert answer.elapsed.total_seconds() > server.limits.head_seconds
