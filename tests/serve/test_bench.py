"""The benchmark measures what it says, and notices what it is there to notice."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import psutil
import pytest

from tests.serve.nonce import NonceBackbone
from tests.serve.running import PATIENCE, running
from weft.backbones import load_backbone
from weft.errors import WeftError
from weft.serve import bench
from weft.serve.bench import (
    Client,
    Loaded,
    Lost,
    Pair,
    Question,
    Rate,
    Reply,
    Size,
    alone,
    client,
    load,
    measure,
    overload,
    percentile,
    serving,
    stand_back,
    twins,
)
from weft.serve.limits import Limits

SMALL = Size(
    rounds=2, spare=0, alone=2, ramp=0.4, window=3.0, pairs=2, settle=0.4, overload=1.5, asked=8, callers=4, pictures=1
)
BRIEF = Limits(queue=28, answer_text_tokens=4)
"""The untrained model rarely ends by itself."""
KEYS = ["throughput_32_over_1", "overload_keep", "reject_p99_ms", "mixed_up", "lost", "rss_growth"]


@pytest.mark.slow
def test_all_figures_of_a_server():
    said = []
    with running({"nano": load_backbone("nano")}, slots=8, limits=BRIEF) as server:
        found = asyncio.run(measure(server.url, psutil.Process(), "nano", SMALL, say=said.append))
    figures = asdict(found)
    assert list(figures) == KEYS
    assert (found.mixed_up, found.lost) == (0, 0)
    assert all(value > 0 for name, value in figures.items() if name not in ("mixed_up", "lost"))
    assert len(said) == 3 * SMALL.rounds + 1


def answered_by(change):
    """A client that changes what it hears."""

    class Changed(Client):
        def __init__(self, asking):
            self._asking = asking
            self.number = 0

        async def ask(self, question):
            self.number += 1
            return change(self.number, await self._asking.ask(question))

        async def health(self):
            return await self._asking.health()

    return Changed


def fail(number, reply):
    if number in (3, 5):
        raise Lost("cut off")
    return reply


CHANGES = {
    "as they are": (lambda number, reply: reply, 0, 0),
    "another's answer": (lambda number, reply: replace(reply, digest="other") if number == 3 else reply, 1, 0),
    "no answer": (fail, 0, 2),
    "an error": (lambda number, reply: replace(reply, status=500) if number == 4 else reply, 0, 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_mixed_up_or_lost_is_counted(name):
    change, mixed_up, lost = CHANGES[name]

    async def run(server):
        async with client(server.url, "nano") as asking:
            return await load(answered_by(change)(asking), psutil.Process(), SMALL)

    with running({"nano": load_backbone("nano")}, slots=8, limits=BRIEF) as server:
        found = asyncio.run(run(server))
    assert (found.mixed_up, found.lost) == (mixed_up, lost)
    assert sum(map(len, found.digests.values())) == SMALL.asked - lost


@pytest.mark.parametrize(
    ("stolen", "kept", "done"),
    [
        ([0, 0, 0], [0, 1], 2),
        ([0.5, 0, 0.1, 0, 0], [1, 3], 4),
        ([0.5, 0.4, 0.3, 0.1, 0.2, 0], [3, 4], 5),
        ([0.03, 0.02, 0.02, 0], [1, 2], 3),
    ],
    ids=["quiet", "some are done again", "never quiet", "at the border"],
)
def test_what_counts_is_chosen_by_what_the_host_took(monkeypatch, stolen, kept, done):
    def round_of(number):
        over = Rate(0, 1, tokens=number + 1.0, lost=1, rejects=[10.0 * number])
        pairs = [Pair(over, Rate(0, 1, tokens=1.0, lost=1))]
        return bench._Round(1.0, Rate(0, 1, tokens=1.0, lost=1), pairs, stolen[number])

    async def next_round(*_):
        return round_of(next(numbers))

    async def loaded(*_):
        return Loaded(health=[1.0], memory=([1], [1]))

    async def asked(*_):
        return Reply(200, 1.0)

    numbers = iter(range(len(stolen)))
    monkeypatch.setattr(bench, "_round", next_round)
    monkeypatch.setattr(bench, "load", loaded)
    monkeypatch.setattr(Client, "ask", asked)
    size = replace(SMALL, rounds=2, spare=3)
    found = asyncio.run(measure("http://localhost", psutil.Process(), "nano", size))
    assert next(numbers) == done
    assert found.overload_keep == sum(kept) / 2 + 1
    assert found.reject_p99_ms == 10.0 * max(kept)
    # of all rounds, kept or not
    assert found.lost == 3 * done


def test_a_server_that_refuses_nothing_was_not_asked_too_much(monkeypatch):
    async def next_round(*_):
        return bench._Round(1.0, Rate(0, 1, tokens=1.0), [Pair(Rate(0, 1, 1.0), Rate(0, 1, 1.0))], 0.0)

    async def asked(*_):
        return Reply(200, 1.0)

    monkeypatch.setattr(bench, "_round", next_round)
    monkeypatch.setattr(Client, "ask", asked)
    with pytest.raises(WeftError, match="refused nothing"):
        asyncio.run(measure("http://localhost", psutil.Process(), "nano", SMALL))


class Server:
    """Answers so many requests per second, and can keep so much of that when five times as many are asked."""

    def __init__(self, per_second, kept):
        self.answer = 1 / per_second
        self.refusal = self.answer * (1 - kept) / (5 - kept)
        self.free = 0.0

    async def ask(self, question):
        now = time.perf_counter()
        self.free = max(self.free, now)
        if self.free - now > 0.2:
            self.free += self.refusal
            return Reply(429, 0.003, retry_after=1)
        self.free += self.answer
        await asyncio.sleep(self.free - now)
        return Reply(200, self.free - now, tokens=10)


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_what_is_kept_under_overload_is_what_a_server_keeps(kept):
    size = replace(SMALL, pairs=2, ramp=0.4, settle=0.4, overload=0.8)
    pairs = asyncio.run(overload(Server(100, kept), size, 100))
    assert len(pairs) == 2
    for pair in pairs:
        assert kept - 0.12 < pair.keep < kept + 0.12
        assert len(pair.over.rejects) > 10 * len(pair.enough.rejects)
        assert set(pair.over.rejects) == {3.0}


def test_a_window_without_an_answer_says_nothing():
    with pytest.raises(WeftError, match="no answer ended within"):
        asyncio.run(overload(Server(1, 1.0), replace(SMALL, overload=0.1), 100))


def test_alone_waits_until_a_server_that_was_asked_too_much_has_room():
    class Recovering:
        said = [Reply(429, 0.001, retry_after=1), Reply(200, 1.0, tokens=5), *[Reply(200, 1.0, tokens=7)] * 2]

        async def ask(self, question):
            await asyncio.sleep(0.01)
            return self.said.pop(0)

    assert 14 / 0.2 < asyncio.run(alone(Recovering(), 2)) <= 14 / 0.02
    Recovering.said = [Reply(200, 1.0, tokens=5), Reply(429, 0.001, retry_after=1)]
    with pytest.raises(WeftError, match="status 429"):
        asyncio.run(alone(Recovering(), 1))


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has such a policy")
def test_who_asks_stands_back_and_nobody_else_does():
    def policy():
        stand_back()
        return os.sched_getscheduler(0)

    before = os.sched_getscheduler(0)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(policy).result() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == before


def test_answers_that_are_all_the_same_show_nothing():
    async def run(server):
        async with client(server.url, "nano") as asking:
            blind = answered_by(lambda number, reply: replace(reply, digest="same"))
            return await load(blind(asking), psutil.Process(), SMALL)

    with (
        running({"nano": load_backbone("nano")}, slots=8, limits=BRIEF) as server,
        pytest.raises(WeftError, match="would not show"),
    ):
        asyncio.run(run(server))


def test_every_question_has_a_twin_that_is_asked_otherwise():
    questions = twins(replace(SMALL, asked=200, pictures=4))
    assert len(questions) == 200 == len(set(questions))
    assert len({replace(each, is_streamed=False) for each in questions}) == 100
    assert ({each.given for each in questions}, {each.wanted for each in questions}) == ({0, 1, 2, 3, 4}, {1, 2, 3, 4})
    assert Question(1).body("a") != Question(2).body("a")


def test_percentiles():
    values = list(range(1, 201))
    assert [percentile(values, percent) for percent in (50, 99, 100)] == [100, 198, 200]
    assert percentile([5.0], 99) == 5.0


def test_a_server_that_does_not_start_says_why():
    with (
        pytest.raises(WeftError, match="did not start") as caught,
        serving([sys.executable, "-c", "exit('no, since')"]),
    ):
        pass
    assert "no, since" in caught.value.fix


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_command_ends_with_one_line_of_json():
    done = subprocess.run(
        [sys.executable, "-m", "weft.cli", "serve", "bench", "--quick"], capture_output=True, text=True, timeout=360
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert list(figures) == KEYS
    assert (figures["mixed_up"], figures["lost"]) == (0, 0)
    assert re.search(r"alone: \d+ tokens/s", done.stderr)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_who_waited_too_long_is_refused_and_not_lost(is_streamed):
    go = threading.Event()
    limits = Limits(queue_seconds=2, keep_alive_seconds=1)
    with running({"nonce": NonceBackbone(before_step=lambda: go.wait(PATIENCE))}, slots=1, limits=limits) as server:

        async def ask():
            async with client(server.url, "nonce") as asking:
                first = asyncio.create_task(asking.ask(Question(0)))
                while server.scheduler.load.running == 0:
                    await asyncio.sleep(0.01)
                second = asyncio.create_task(asking.ask(Question(1, is_streamed)))
                await asyncio.sleep(limits.queue_seconds + 0.5)
                go.set()
                return await first, await second

        replies = asyncio.run(ask())
    assert [reply.is_refused for reply in replies] == [False, True]
