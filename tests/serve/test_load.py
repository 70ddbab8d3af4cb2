"""Many at once: nothing is lost, nothing is mixed up, and who asks too much is told so."""

import asyncio
import base64
import gc
import json
import random
import socket
import sys
import threading
import weakref
from dataclasses import dataclass, field

import httpx2
import pytest

from tests.serve.nonce import NonceBackbone, Shown, ask, expected, new_nonce, picture, read_picture
from tests.serve.running import PATIENCE, running, until
from weft.serve import scheduler
from weft.serve.bench import health, memory, percentile, serving
from weft.serve.limits import Limits


@dataclass(frozen=True)
class Question:
    """A prompt with a nonce of its own, pictures with nonces of their own, and how it is asked."""

    nonce: str
    plan: str
    seen: tuple[Shown, ...]
    endpoint: str
    is_streamed: bool

    @classmethod
    def draw(cls, chance):
        letters = ["t", "s", *"p" * chance.randint(0, 4)]
        chance.shuffle(letters)
        seen = tuple(Shown(new_nonce(), i) for i in range(chance.randint(0, 4)))
        endpoint = chance.choice(["chat/completions", "responses"])
        return cls(new_nonce(), "".join(letters), seen, endpoint, chance.random() < 0.5)

    @property
    def expected(self):
        return expected(self.nonce, self.plan, self.seen)

    @property
    def body(self):
        urls = [f"data:image/png;base64,{base64.b64encode(picture(shown)).decode()}" for shown in self.seen]
        text = ask(self.nonce, self.plan)
        common = {"model": "nonce", "stream": self.is_streamed, "image_delivery": "inline"}
        if self.endpoint == "responses":
            content = [
                *({"type": "input_image", "image_url": url} for url in urls),
                {"type": "input_text", "text": text},
            ]
            return {**common, "input": [{"role": "user", "content": content}]}
        content = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
        return {**common, "messages": [{"role": "user", "content": content}], "response_image_format": "parts"}

    def read(self, text):
        """The parts of the answer; raises where there is no whole one."""
        if self.endpoint == "responses":
            answer = responses_events(text)[-1]["response"] if self.is_streamed else json.loads(text)
            assert answer["status"] == "completed"
            return [
                item["content"][0]["text"] if item["type"] == "message" else shown_in(item["result"])
                for item in answer["output"]
            ]
        if not self.is_streamed:
            return chat_parts(json.loads(text)["choices"][0]["message"]["content"])
        *chunks, done = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        assert done == "[DONE]"
        deltas = [json.loads(chunk)["choices"][0]["delta"].get("content") or [] for chunk in chunks]
        return chat_parts([part for delta in deltas for part in delta])


def chat_parts(content):
    parts = []
    for part in content:
        if part["type"] == "image_url":
            parts.append(shown_in(part["image_url"]["url"].partition(",")[2]))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += part["text"]
        else:
            parts.append(part["text"])
    return parts


def responses_events(text):
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def shown_in(base64_png):
    return read_picture(base64.b64decode(base64_png))


@dataclass
class Flood:
    """What became of many questions."""

    right: int = 0
    wrong: list = field(default_factory=list)
    refused: int = 0
    lost: list = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    memory: list[list[int]] = field(default_factory=lambda: [[], []])


async def flood(url, questions, *, clients, process=None):
    found, left, done = Flood(), iter(questions), 0
    unlimited = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, limits=unlimited, timeout=300, trust_env=False) as http:

        async def client():
            nonlocal done
            for question in left:
                try:
                    answer = await http.post(f"/v1/{question.endpoint}", json=question.body)
                    if answer.status_code == 429:
                        assert int(answer.headers["retry-after"]) >= 1
                        found.refused += 1
                    else:
                        assert answer.status_code == 200
                        parts = question.read(answer.text)
                        found.right += parts == question.expected
                        if parts != question.expected:
                            found.wrong.append((question, parts))
                except Exception as error:
                    found.lost.append((question, repr(error)))
                done += 1

        async def watch():
            while True:
                found.health.append(await asyncio.to_thread(health, url))
                if process is not None:
                    found.memory[2 * done >= len(questions)].append(memory(process))
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client() for _ in range(clients)))
        watching.cancel()
    return found


def test_every_one_of_many_gets_his_own_answer():
    chance = random.Random(0)
    questions = [Question.draw(chance) for _ in range(64)]
    with running({"nonce": NonceBackbone()}, slots=8, limits=Limits(queue=64)) as server:
        found = asyncio.run(flood(server.url, questions, clients=48))
        load = server.scheduler.load
    assert (found.right, found.wrong, found.refused, found.lost) == (len(questions), [], 0, [])
    assert (load.waiting, load.running) == (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_requests_of_two_hundred_clients(capsys):
    chance = random.Random(1)
    questions = [Question.draw(chance) for _ in range(2000)]
    command = [sys.executable, "-m", "tests.serve.nonce", "--slots", "16", "--queue", "200"]
    with serving(command) as (url, process):
        found = asyncio.run(flood(url, questions, clients=200, process=process))
    growth = max(found.memory[1]) / max(found.memory[0])
    slowest = 1000 * percentile(found.health, 99)
    with capsys.disabled():
        print(f"\n{found.right} right, /health p99 {slowest:.1f} ms of {len(found.health)}, memory x {growth:.3f}")
    assert (found.right, found.wrong, found.refused, found.lost) == (len(questions), [], 0, [])
    assert growth <= 1.05
    assert slowest <= 100


def test_who_finds_no_room_is_refused_at_once_and_told_when_to_come_back():
    """One slot and one place in the line, and an answer that does not end before it may."""
    may_go_on = threading.Event()
    model = NonceBackbone(before_step=lambda: may_go_on.wait(PATIENCE))
    question = Question(new_nonce(), "t", (), "chat/completions", False)
    with running({"nonce": model}, slots=1, limits=Limits(queue=1)) as server, server.http() as http:
        threads, answers = [], []

        def post():
            answers.append(server.http().post("/v1/chat/completions", json=question.body))

        for waiting in (0, 1):
            threads.append(threading.Thread(target=post))
            threads[-1].start()
            until(lambda: server.scheduler.load.running == 1 and server.scheduler.load.waiting == waiting)  # noqa: B023
        for _ in range(3):
            refused = http.post("/v1/chat/completions", json=question.body)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        # what will not be answered is not read either
        with socket.create_connection(("127.0.0.1", http.base_url.port), timeout=PATIENCE) as connection:
            connection.sendall(b"POST /v1/responses HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 429")
        assert http.get("/health").status_code == 200
        may_go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert [question.read(answer.text) for answer in answers] == [question.expected] * 2


def test_who_waits_too_long_is_told_so():
    may_go_on = threading.Event()
    model = NonceBackbone(before_step=lambda: may_go_on.wait(0.05) and None)
    slow = Question(new_nonce(), "t" * 20, (), "chat/completions", False)
    quick = Question(new_nonce(), "t", (), "chat/completions", False)
    with running({"nonce": model}, slots=1, limits=Limits(queue_seconds=1)) as server, server.http() as http:
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(server.http().post("/v1/chat/completions", json=slow.body))
        )
        thread.start()
        until(lambda: server.scheduler.load.running == 1)
        overdue = http.post("/v1/chat/completions", json=quick.body)
        may_go_on.set()
        thread.join(PATIENCE)
        assert (overdue.status_code, overdue.json()["error"]["code"]) == (503, "overdue")
        assert int(overdue.headers["retry-after"]) >= 1
        assert slow.read(answers[0].text) == slow.expected
        until(lambda: server.scheduler.load.waiting == 0)


def test_what_a_request_holds_is_given_back(monkeypatch):
    alive = weakref.WeakSet()
    begin = scheduler._Ticket.__init__

    def begin_and_watch(ticket, *given):
        begin(ticket, *given)
        alive.add(ticket)

    monkeypatch.setattr(scheduler._Ticket, "__init__", begin_and_watch)
    chance, left = random.Random(2), []
    with running({"nonce": NonceBackbone()}, slots=4) as server:
        for _ in range(2):
            asyncio.run(flood(server.url, [Question.draw(chance) for _ in range(6)], clients=6))
            gc.collect()
            left.append(len(alive))
    assert left == [0, 0]
