"""Who hangs up costs nothing more, wherever his request was; who does not read is cut off, and holds up nobody."""

import asyncio
import json
import random
import socket
import struct
import threading
import time
from contextlib import closing

import httpx2
import psutil
import pytest

from tests.serve.apart import apart, nonce
from tests.serve.nonce import NonceBackbone, expected, new_nonce
from tests.serve.running import PATIENCE, running, until
from tests.serve.test_load import Question
from weft.serve.limits import Limits
from weft.serve.run import _Readers


class Held(NonceBackbone):
    """A model that stops in its n-th forward until it is let go, and counts those after it."""

    def __init__(self, stop_at):
        self.stop_at, self.forwards = stop_at, 0
        self.has_stopped, self.may_go_on = threading.Event(), threading.Event()
        super().__init__(before_step=self.count)

    def count(self):
        self.forwards += 1
        if self.forwards == self.stop_at:
            self.has_stopped.set()
            assert self.may_go_on.wait(PATIENCE)


def connection(url, body, *, path="/v1/chat/completions", window=None):
    """A connection on which a question has been asked."""
    made = socket.socket()
    if window is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    host, port = url.removeprefix("http://").split(":")
    made.connect((host, int(port)))
    made.settimeout(PATIENCE)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    made.sendall(head.encode() + data)
    return made


def hang_up(connected, *, abruptly):
    if abruptly:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connected.close()


def question(plan, is_streamed=True):
    return Question(new_nonce(), plan, (), "responses", is_streamed)


def metric(http, name):
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


GONE = 'weft_requests_total{endpoint="responses",outcome="gone"}'
PREFILL, IN_TEXT, IN_PICTURE = 1, 6, 25
"""Forwards of a request that is answered by a nonce and a picture."""


@pytest.mark.parametrize("abruptly", [True, False])
@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("stage", [PREFILL, IN_TEXT, IN_PICTURE])
def test_nothing_is_computed_for_who_has_hung_up(stage, is_streamed, abruptly):
    model = Held(stage)
    with running({"nonce": model}, slots=2) as server, server.http() as http:
        connected = connection(server.url, question("tpt", is_streamed).body, path="/v1/responses")
        assert model.has_stopped.wait(PATIENCE)
        hang_up(connected, abruptly=abruptly)
        until(lambda: metric(http, GONE) == 1)
        model.may_go_on.set()
        until(lambda: server.scheduler.load.running == 0)
        # a prompt that is being read is read to its end, and its first step taken
        assert model.forwards <= stage + (stage == PREFILL)
        assert server.scheduler.most_late_steps <= 1
        after = question("t", is_streamed=False)
        assert after.read(http.post("/v1/responses", json=after.body).text) == after.expected


@pytest.mark.parametrize("is_streamed", [True, False])
def test_who_hangs_up_in_the_line_is_never_begun(is_streamed):
    model = Held(3)
    with running({"nonce": model}, slots=1) as server, server.http() as http:
        first, second = question("t"), question("tttt", is_streamed)
        answering = connection(server.url, first.body, path="/v1/responses")
        assert model.has_stopped.wait(PATIENCE)
        waiting = connection(server.url, second.body, path="/v1/responses")
        until(lambda: server.scheduler.load.waiting == 1)
        hang_up(waiting, abruptly=True)
        until(lambda: metric(http, GONE) == 1)
        model.may_go_on.set()
        with closing(answering):
            text = read_until(answering, b"response.completed")
        assert first.read(text.partition("\r\n\r\n")[2]) == first.expected
        until(lambda: server.scheduler.load.waiting == 0)
        # its prompt, each letter, the blank after them, and the end
        assert model.forwards == 1 + len(expected(first.nonce, "t")[0]) + 1


def read_until(connected, mark):
    data = b""
    while mark not in data.rpartition(b"event: ")[2]:
        data += connected.recv(65536)
    return undo_chunks(data)


def undo_chunks(data):
    head, _, rest = data.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            break
        body, rest = body + rest[:length], rest[length + 2 :]
    return (head + b"\r\n\r\n" + body).decode()


async def hang_up_at_random(url, number, chance):
    """Connections that are cut at any time: before the request is whole, in the line, in the prompt, in the answer."""
    host, port = url.removeprefix("http://").split(":")

    async def one():
        reader, writer = await asyncio.open_connection(host, int(port))
        asked = question(chance.choice(["tttt", "ptpt", "tptp"]), chance.random() < 0.5)
        data = json.dumps(asked.body).encode()
        head = (
            f"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        )
        whole = f"{head}\r\n\r\n".encode() + data
        writer.write(whole if chance.random() < 0.9 else whole[: chance.randrange(len(whole))])
        await writer.drain()
        for _ in range(chance.choice([0, 1, 3, 10])):
            try:
                await asyncio.wait_for(reader.read(4096), chance.random())
            except TimeoutError:
                break
        await asyncio.sleep(chance.random() * 0.3)
        writer.transport.abort() if chance.random() < 0.7 else writer.close()

    busy = asyncio.Semaphore(60)

    async def held():
        async with busy:
            await one()

    await asyncio.gather(*(held() for _ in range(number)))


def test_nothing_is_left_of_those_who_hang_up_at_random():
    with running({"nonce": NonceBackbone(before_step=lambda: time.sleep(0.002))}, slots=8) as server:
        check_hang_ups(server.url, psutil.Process(), 40)


@pytest.mark.slow
def test_nothing_is_left_of_five_hundred_who_hang_up():
    with apart(nonce, "--slots", "8", "--pause", "0.002") as server:
        check_hang_ups(server.url, server.process, 500)


def check_hang_ups(url, process, number):
    with httpx2.Client(base_url=url, timeout=PATIENCE, trust_env=False) as http:
        asked = question("tp", is_streamed=False)
        assert asked.read(http.post("/v1/responses", json=asked.body).text) == asked.expected
        files = open_files(process)
        asyncio.run(hang_up_at_random(url, number, random.Random(3)))
        until(lambda: metric(http, "weft_running ") == metric(http, "weft_waiting ") == 0)
        until(lambda: open_files(process) == files)
        assert metric(http, "weft_late_steps ") <= 1
        assert metric(http, GONE) > number / 5
        asked = question("tp", is_streamed=False)
        assert asked.read(http.post("/v1/responses", json=asked.body).text) == asked.expected


def open_files(process):
    return [each.num_fds() for each in (process, *process.children())]


SIDE = 960
"""A picture of so many pixels is larger than what a connection holds by itself."""


def test_who_does_not_read_is_cut_off_and_holds_up_nobody():
    with running({"nonce": NonceBackbone(side=SIDE)}, slots=2, limits=Limits(send_seconds=1)) as server:
        with server.http() as http:
            asked = question("p" * 6)
            body = {**asked.body, "image_delivery": "inline"}
            connected = connection(server.url, body, path="/v1/responses", window=4096)
            until(lambda: waiting_bytes(server) > 0)
            quick = question("t", is_streamed=False)
            begun = time.perf_counter()
            assert quick.read(http.post("/v1/responses", json=quick.body).text) == quick.expected
            took = time.perf_counter() - begun
            until(lambda: len(server.server.server_state.connections) == 1)
            assert took < PATIENCE / 4
            assert waiting_bytes(server) == 0
            connected.close()
        until(lambda: server.scheduler.load.running == 0)


def waiting_bytes(server):
    connections = list(server.server.server_state.connections)
    return sum(connection.transport.get_write_buffer_size() for connection in connections)


class Reader:
    def __init__(self):
        self.size, self.is_cut = 0, False

    def get_write_buffer_size(self):
        return self.size

    def abort(self):
        self.is_cut = True


def test_who_takes_a_little_now_and_then_is_not_cut_off():
    now, none, some = 0.0, Reader(), Reader()
    readers = _Readers(10.0, clock=lambda: now)
    none.size = some.size = 1000
    for second in range(30):
        now = float(second)
        some.size -= second % 9 == 0
        readers.check([none, some])
    assert (none.is_cut, some.is_cut) == (True, False)
