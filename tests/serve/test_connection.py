"""What begins as a request and does not go on is not waited for; what goes on is."""

import asyncio
import itertools
import json
import socket
import threading
from contextlib import contextmanager

import pytest

from tests.serve.nonce import NonceBackbone, ask, new_nonce
from tests.serve.running import PATIENCE, running, until
from weft.serve import run
from weft.serve.app import create_app
from weft.serve.hosts import in_thread
from weft.serve.limits import Limits
from weft.serve.scheduler import Busy, Scheduler
from weft.serve.settings import ServeConfig

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

    monkeypatch.setattr(run, "make_quick", lambda: None)  # of this process
    scheduler = Scheduler(in_thread({"nonce": NonceBackbone()}, slots=1))
    with pytest.raises(Told):
        run.run_server(create_app(scheduler, []), scheduler, ServeConfig(port=0), say=say)
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


# --- no room --------------------------------------------------------------------------------------------------------

BODY = b'{"model": "nonce", "messages": [{"role": "user", "content": "?"}]}'
SHORT = f"HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(BODY)}\r\n".encode()


def asked(address=b"/v1/chat/completions", head=SHORT, more=b""):
    return b"POST " + address + b" " + head + more + b"\r\n" + BODY


@pytest.fixture
def full(server, monkeypatch):
    """The server has no room; what its application is asked is collected."""

    def check_room():
        raise Busy("many requests are waiting already", 7)

    seen, app = [], server.app.middleware_stack
    server.app.middleware_stack = lambda scope, *rest: seen.append(scope["path"]) or app(scope, *rest)
    monkeypatch.setattr(server.scheduler, "check_room", check_room)
    yield seen
    server.app.middleware_stack = app


def answers(connection):
    """(status, headers without the date, body) of each."""
    with connection.makefile("rb") as read:
        while line := read.readline():
            headers = dict(line.strip().split(b": ", 1) for line in iter(read.readline, b"\r\n"))
            assert headers.pop(b"date")
            yield int(line.split()[1]), headers, read.read(int(headers[b"content-length"]))


def test_without_room_a_connection_answers_what_the_application_would(server, full):
    with connected(server) as connection:
        read = answers(connection)
        connection.sendall(asked())
        at_once = next(read)
        assert full == []
        # an address written otherwise is left to it
        connection.sendall(asked(b"/v1/chat/completions?"))
        assert next(read) == at_once
        assert full == ["/v1/chat/completions"]
    status, headers, body = at_once
    assert (status, headers[b"retry-after"]) == (429, b"7")
    assert json.loads(body)["error"]["code"] == "busy"


@pytest.mark.parametrize("address", [b"/v1/chat/completions", b"/v1/responses", b"/v1/images/generations"])
def test_what_is_left_of_a_refused_request_is_dropped_and_the_next_one_read(server, full, address):
    with connected(server) as connection:
        read, whole = answers(connection), asked(address)
        connection.sendall(whole[:-20])
        assert next(read)[0] == 429
        connection.sendall(whole[-20:] + whole + HEALTH)
        assert [next(read)[0] for _ in range(2)] == [429, 200]
    assert full == ["/health"]


def test_answers_keep_the_order_of_what_was_asked(server, full):
    with connected(server) as connection:
        connection.sendall(HEALTH + asked())
        assert [status for status, *_ in itertools.islice(answers(connection), 2)] == [200, 429]


@pytest.mark.parametrize("head, more", [(SHORT, b"connection: close\r\n"), (SHORT.replace(b"1.1", b"1.0"), b"")])
def test_who_wants_one_answer_only_is_refused_and_let_go(server, full, head, more):
    with connected(server) as connection:
        connection.sendall(asked(head=head, more=more))
        assert all_of(connection).startswith(b"HTTP/1.1 429")


def test_a_connection_that_was_refused_is_not_kept_for_ever(server, full):
    with connected(server) as connection:
        connection.sendall(HEALTH)
        next(answers(connection))
        until(lambda: server.server.server_state.connections)
        for each in server.server.server_state.connections:
            each.timeout_keep_alive = 0.1
        connection.sendall(asked())
        assert all_of(connection).startswith(b"HTTP/1.1 429")


def test_whether_there_is_room_is_told_to_those_with_a_key_only():
    with running({"nonce": NonceBackbone()}, keys=["open sesame"]) as locked, connected(locked) as connection:
        read = answers(connection)
        locked.scheduler.check_room = lambda: (_ for _ in ()).throw(Busy("many requests are waiting already", 7))
        for key, status in ((b"", 401), (b"authorization: Bearer wrong\r\n", 401),
                            (b"authorization: Bearer open sesame\r\n", 429)):  # fmt: skip
            connection.sendall(asked(more=key))
            assert next(read)[0] == status
