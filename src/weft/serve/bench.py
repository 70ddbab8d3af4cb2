"""How fast a server answers, what it does when it is asked too much, and whether it loses or mixes up anything.

    with serving([sys.executable, "-m", "weft.cli", "serve", "tiny", "--port", "0"]) as (url, process):
        figures = asyncio.run(measure(url, process, "tiny", QUICK, say=print))

The server runs in a process of its own and is asked over HTTP, as callers do:

    alone      one request after the other
    together   so many callers at once, each asking again when it has its answer
    overload   as many requests as were answered together, and several times as many, whatever becomes of them, in pairs
               of short windows: what else a machine does comes and goes, and both of a pair have their share of it
               these three in rounds; one in which the machine's host took processors away is done again
    load       many callers; each question twice, whole and streamed, and both answers must be the same

Every question has a seed of its own and so an answer of its own: whoever gets another's differs from his twin.
"""

import asyncio
import base64
import hashlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any, NamedTuple

import aiohttp
import psutil

from weft.data.sources.picturebook import random_scene
from weft.errors import WeftError

Say = Callable[[str], None]
TOGETHER = 32
OVERLOAD = 5
PATIENCE = 300.0
"""Seconds for one answer; a request that takes longer is lost."""
IDLE = 2.0
"""Seconds that a connection is kept without a request; the server closes it later than that."""
LINE = 1 << 26
"""Bytes of a streamed line, with a picture in it."""
STOLEN = 0.02
"""Of a round's processor time, at most: what a virtual machine's host gave to others. More says little of a server."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    """Of alone, together and overload; the median counts. Many short ones: other work comes and goes."""
    spare: int
    """Further rounds at most, in place of those in which the machine's host took processors away."""
    alone: int
    """Requests of a round."""
    ramp: float
    """Seconds before anything counts, each time: until all slots, and under overload the queue, are taken."""
    window: float
    """Seconds of requests together that count."""
    pairs: int
    """Of windows of a round under overload."""
    settle: float
    """Seconds before each of these windows, in which the queue is filled, or refuses no more."""
    overload: float
    """Seconds of each that count."""
    asked: int
    """Requests of the load."""
    callers: int = 200
    pictures: int = 4
    """Of a prompt and of an answer, at most."""


FULL = Size(rounds=9, spare=9, alone=6, ramp=6, window=8, pairs=6, settle=1, overload=2, asked=2000)
QUICK = Size(rounds=2, spare=1, alone=4, ramp=6, window=8, pairs=5, settle=1, overload=2, asked=300, pictures=1)


@dataclass(frozen=True)
class Figures:
    throughput_32_over_1: float
    """Tokens per second, of text and pictures."""
    overload_keep: float
    """Of the throughput, when several times as many ask as can be answered, and not just as many."""
    reject_p99_ms: float
    """Until a request that finds no room is told so."""
    mixed_up: int
    """Questions whose two answers differ."""
    lost: int
    """Requests without an outcome: neither a whole answer nor a refusal."""
    rss_growth: float
    """The server's memory in the second half of the load over that in the first, at their peaks."""


@dataclass(frozen=True)
class Question:
    seed: int
    is_streamed: bool = False
    given: int = 0
    """Pictures of the prompt."""
    wanted: int = 1
    """Pictures of the answer."""

    def body(self, model: str) -> dict[str, Any]:
        text = {"type": "text", "text": random_scene(random.Random(self.seed)).caption()}
        pictures = [{"type": "image_url", "image_url": {"url": _picture(self.seed + i)}} for i in range(self.given)]
        return {
            "model": model,
            "messages": [{"role": "user", "content": [*pictures, text]}],
            "seed": self.seed,
            "temperature": 1,
            "min_images": self.wanted,
            "max_images": self.wanted,
            "max_tokens": 70 * self.wanted + 60,
            "response_image_format": "parts",
            "image_delivery": "inline",
            "stream": self.is_streamed,
            **({"stream_options": {"include_usage": True}} if self.is_streamed else {}),
        }


@dataclass(frozen=True)
class Reply:
    status: int
    seconds: float
    digest: str = ""
    """Of all parts in order."""
    tokens: int = 0
    retry_after: int = 0

    @property
    def is_refused(self) -> bool:
        """For now: the queue is full, or it took too long."""
        return self.status in (429, 503) and self.retry_after >= 1


class Lost(Exception):
    """A request without an outcome."""


class _Overdue(Exception):
    """A stream that was begun says that no slot became free."""


class Client:
    """Asks one server."""

    def __init__(self, http: aiohttp.ClientSession, url: str, model: str) -> None:
        self._http, self._url, self._model = http, url, model

    async def ask(self, question: Question) -> Reply:
        """
        Raises:
            Lost: no answer came, or not all of one.
        """
        begun = time.perf_counter()
        try:
            request = self._http.post(f"{self._url}/v1/chat/completions", json=question.body(self._model))
            async with request as response:
                if response.status != 200:
                    await response.read()
                    after = int(response.headers.get("retry-after", 0))
                    return Reply(response.status, time.perf_counter() - begun, retry_after=after)
                read = _streamed if question.is_streamed else _whole
                parts, usage = await read(response)
        except _Overdue:
            return Reply(503, time.perf_counter() - begun, retry_after=1)
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError) as error:
            raise Lost(f"{type(error).__name__}: {error}") from error
        return Reply(200, time.perf_counter() - begun, _digest(parts), usage["completion_tokens"])

    async def health(self) -> float:
        """Seconds that it takes; asked from a thread, which does not wait for the other requests of this process."""
        return await asyncio.to_thread(health, self._url)


@asynccontextmanager
async def client(url: str, model: str) -> AsyncIterator[Client]:
    # of the clients the one that takes least of the processors, which are the server's
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE),
        timeout=aiohttp.ClientTimeout(total=PATIENCE),
        read_bufsize=LINE,
    ) as http:
        yield Client(http, url.rstrip("/"), model)


async def measure(
    url: str, process: psutil.Process, model: str, size: Size, *, say: Say = lambda line: None
) -> Figures:
    """All figures of a running server.

    Raises:
        WeftError: nothing was answered, nothing was refused, or different questions got the same answer: the figures
            would say nothing.
    """
    async with client(url, model) as asking:
        for seed in range(2):
            await asking.ask(Question(seed))  # the first of all fills caches
        rounds = await _rounds(asking, size, say)
        # by what was stolen, whatever they say of the server
        kept = sorted(rounds, key=lambda each: each.stolen)[: size.rounds]
        rejects = [milliseconds for each in kept for pair in each.pairs for milliseconds in pair.over.rejects]
        if not rejects:
            raise WeftError("the server refused nothing", fix="measure for longer, until its queue is full")
        loaded = await load(asking, process, size)
        slowest = percentile(loaded.health, 99)
        say(f"{size.callers} callers, {size.asked} requests: /health within {slowest:.0f} ms, all p99")
    return Figures(
        round(statistics.median(each.many.tokens / each.one for each in kept), 2),
        round(statistics.median(pair.keep for each in kept for pair in each.pairs), 3),
        round(percentile(rejects, 99), 1),
        loaded.mixed_up,
        loaded.lost + sum(each.lost for each in rounds),
        round(max(loaded.memory[1]) / max(loaded.memory[0]), 3),
    )


async def _rounds(asking: "Client", size: Size, say: Say) -> "list[_Round]":
    done: list[_Round] = []
    while len(done) < size.rounds + size.spare and sum(each.stolen <= STOLEN for each in done) < size.rounds:
        done.append(await _round(asking, size, say))
    return done


async def _round(asking: "Client", size: Size, say: Say) -> "_Round":
    stolen, passed = _stolen()
    one = await alone(asking, size.alone)
    say(f"alone: {one:.0f} tokens/s")
    many = await together(asking, size)
    if not many.answers:
        raise WeftError(f"no answer ended within {size.window:g} s", fix="measure for longer")
    say(f"{TOGETHER} together: {many.tokens:.0f} tokens/s, {many.answers:.2f} answers/s")
    pairs = await overload(asking, size, many.answers)
    then_stolen, then_passed = _stolen()
    share = (then_stolen - stolen) / (then_passed - passed)
    over, enough = (statistics.fmean(rate.tokens for rate in rates) for rates in zip(*pairs, strict=True))
    rejects = [milliseconds for pair in pairs for milliseconds in pair.over.rejects]
    refused = f" in {percentile(rejects, 99):.1f} ms, p99" if rejects else ""
    kept = sorted(pair.keep for pair in pairs)
    say(
        f"{OVERLOAD} times as many: {over:.0f} tokens/s for {enough:.0f}, by pairs {kept[0]:.2f} to {kept[-1]:.2f}; "
        f"{len(rejects)} refused{refused}"
        f"{f'; the host took {share:.0%} of the processors' if share > STOLEN else ''}"
    )
    return _Round(one, many, pairs, share)


def _stolen() -> tuple[float, float]:
    """Seconds of all processors that the host of a virtual machine took, and all that passed; 0 where none tells."""
    times = psutil.cpu_times()
    return getattr(times, "steal", 0.0), sum(times)


async def alone(asking: Client, requests: int) -> float:
    """Tokens per second.

    Raises:
        WeftError: a single caller is not answered.
    """
    # a server that was just asked too much refuses the first ones
    while (reply := await asking.ask(Question(0))).is_refused:
        await asyncio.sleep(reply.retry_after)
    begun = time.perf_counter()
    replies = [await asking.ask(Question(seed)) for seed in range(requests)]
    seconds = time.perf_counter() - begun
    if wrong := [reply.status for reply in replies if reply.status != 200]:
        raise WeftError(f"a request with nothing beside it got status {wrong[0]}")
    return sum(reply.tokens for reply in replies) / seconds


@dataclass
class Rate:
    """What became of requests within a window of time."""

    since: float
    seconds: float
    tokens: float = 0
    """Per second, of the answers that ended in it."""
    answers: float = 0
    """Per second."""
    lost: int = 0
    rejects: list[float] = field(default_factory=list)
    """Milliseconds until each refusal."""

    def add(self, reply: Reply) -> None:
        if not self.since <= time.perf_counter() < self.since + self.seconds:
            return
        if reply.status == 200:
            self.tokens += reply.tokens / self.seconds
            self.answers += 1 / self.seconds
        elif reply.is_refused:
            if reply.status == 429:
                self.rejects.append(1000 * reply.seconds)
        else:
            self.lost += 1


class Pair(NamedTuple):
    """Two windows of which one follows the other."""

    over: Rate
    """Too many ask."""
    enough: Rate
    """As many ask as can be answered; and some still wait."""

    @property
    def keep(self) -> float:
        return self.over.tokens / self.enough.tokens


@dataclass(frozen=True)
class _Round:
    """Tokens per second alone, then together, then what becomes of too many."""

    one: float
    many: Rate
    pairs: Sequence[Pair]
    stolen: float
    """Of its processor time, by the machine's host."""

    @property
    def lost(self) -> int:
        return self.many.lost + sum(rate.lost for pair in self.pairs for rate in pair)


async def together(asking: Client, size: Size) -> Rate:
    rate, seeds = Rate(time.perf_counter() + size.ramp, size.window), iter(range(10**9))

    async def caller(number: int) -> None:
        # not all at once: all answers would end at the same moments, and a window hold one of these more or less
        await asyncio.sleep(size.ramp / 2 * number / TOGETHER)
        for seed in seeds:
            await _count(asking, Question(seed), lambda: rate)

    await _for(size.ramp + size.window, [asyncio.create_task(caller(i)) for i in range(TOGETHER)])
    return rate


async def overload(asking: Client, size: Size, answered: float) -> list[Pair]:
    """Windows in pairs, in the order in which what grows or falls with time does least: a b, b a, a b, ...

    Args:
        answered: requests per second that can be answered.

    Raises:
        WeftError: nothing was answered in a window.
    """
    asked, rate = list[asyncio.Task[None]](), Rate(math.inf, 0.0)
    per_second = answered

    async def ask() -> None:
        due, last = 0.0, time.perf_counter()
        while True:
            await asyncio.sleep(0.5 / (OVERLOAD * answered))
            now = time.perf_counter()
            due, last = due + (now - last) * per_second, now
            while due >= 1:
                due -= 1
                asked.append(asyncio.create_task(_count(asking, Question(len(asked)), lambda: rate)))

    asking_on = asyncio.create_task(ask())
    # at first as many as can be answered, so that answers do not all end at the same moments; then the queue is filled
    await asyncio.sleep(size.ramp / 2)
    per_second = OVERLOAD * answered
    await asyncio.sleep(size.ramp / 2)
    pairs = []
    for number in range(size.pairs):
        rates = {}
        for times in (OVERLOAD, 1) if number % 2 == 0 else (1, OVERLOAD):
            per_second = times * answered
            rates[times] = rate = Rate(time.perf_counter() + size.settle, size.overload)
            await asyncio.sleep(size.settle + size.overload)
        pairs.append(Pair(rates[OVERLOAD], rates[1]))
    await _for(0, [asking_on, *asked])
    if not all(each.tokens for pair in pairs for each in pair):
        raise WeftError(f"no answer ended within {size.overload:g} s", fix="measure for longer")
    return pairs


@dataclass
class Loaded:
    """What became of the load."""

    digests: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    lost: int = 0
    health: list[float] = field(default_factory=list)
    """Milliseconds of each answer of /health."""
    memory: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    """Bytes, in the first and in the second half."""

    @property
    def mixed_up(self) -> int:
        return sum(len(set(twins)) > 1 for twins in self.digests.values())


async def load(asking: Client, process: psutil.Process, size: Size) -> Loaded:
    """
    Raises:
        WeftError: different questions got the same answer.
    """
    questions = twins(size)
    found, left = Loaded(), iter(questions)
    done = 0

    async def caller() -> None:
        nonlocal done
        for question in left:
            try:
                while (reply := await asking.ask(question)).is_refused:
                    await asyncio.sleep(reply.retry_after)
                if reply.status != 200:
                    raise Lost(f"status {reply.status}")
                found.digests[question.seed].append(reply.digest)
            except Lost:
                found.lost += 1
            done += 1

    async def watch() -> None:
        while True:
            with suppress(OSError, HTTPException):
                found.health.append(1000 * await asking.health())
            found.memory[done * 2 >= len(questions)].append(memory(process))
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(caller() for _ in range(size.callers)))
    await _for(0.1, [watching])
    different = len({digest for pair in found.digests.values() for digest in pair})
    if different < 0.9 * len(found.digests):
        raise WeftError(f"{len(found.digests)} questions had {different} answers: a mix-up would not show")
    return found


def twins(size: Size) -> list[Question]:
    """Every question whole and streamed, in an order without meaning."""
    chance, questions = random.Random(0), []
    for seed in range(size.asked // 2):
        # with a picture in it no answer is like another
        given, wanted = chance.randint(0, size.pictures), chance.randint(1, max(1, size.pictures))
        questions += [Question(seed, is_streamed, given, wanted) for is_streamed in (False, True)]
    chance.shuffle(questions)
    return questions


def stand_back() -> None:
    """From here on this thread takes no processor from a server's that is at work, where a system knows such a thing.

    What asks is woken by each answer, on the processor that sends it; elsewhere it has processors of its own.
    """
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """A server in a process of its own, until the block ends: its address, which it writes to standard error.

    Raises:
        WeftError: it ended before it told its address.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "WEFT_API_KEY"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=inherited)
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if address := re.search(r"http://\S+", line):
                break
        else:
            raise WeftError("the server did not start", where=" ".join(command), fix="".join(said[-5:]).strip())
        # nobody else reads what it says
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield address[0], psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def memory(process: psutil.Process) -> int:
    """Bytes of a server's processes."""
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def health(url: str) -> float:
    """Seconds until a server has said that it is well.

    Raises:
        OSError: it does not.
    """
    begun = time.perf_counter()
    with closing(HTTPConnection(url.partition("://")[2].rstrip("/"), timeout=PATIENCE)) as connection:
        connection.request("GET", "/health")
        if connection.getresponse().status != 200:
            raise OSError(f"{url} is not well")
    return time.perf_counter() - begun


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, -(-len(ranked) * percent // 100).__int__() - 1)]


async def _count(asking: Client, question: Question, rate: Callable[[], Rate]) -> None:
    """For the rate that there is when it has its outcome."""
    try:
        reply = await asking.ask(question)
    except Lost:
        rate().lost += 1
    else:
        rate().add(reply)


async def _for(seconds: float, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Let them run so long, then end them."""
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task


async def _whole(response: aiohttp.ClientResponse) -> tuple[list[Any], dict[str, int]]:
    answer = json.loads(await response.read())
    return answer["choices"][0]["message"]["content"], answer["usage"]


async def _streamed(response: aiohttp.ClientResponse) -> tuple[list[Any], dict[str, int]]:
    parts, usage, is_ended = list[Any](), dict[str, int](), False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            is_ended = True
            continue
        chunk = json.loads(data)
        if chunk.get("error", {}).get("code") == "overdue":
            raise _Overdue
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            parts += choice["delta"].get("content") or ()
    if not is_ended:
        raise ValueError("the stream broke off")
    return parts, usage


def _digest(parts: Sequence[Any]) -> str:
    """Of texts and pictures in order; it does not matter into how many pieces a text is cut."""
    found, last = hashlib.sha256(), ""
    for part in parts:
        if part["type"] != last:
            found.update(f"\0{part['type']}\0".encode())
        last = part["type"]
        found.update((part["text"] if last == "text" else f"{part['image_url']['url']}\0").encode())
    return found.hexdigest()


def _picture(seed: int) -> str:
    """A small picture of its own as a data URL."""
    from PIL import Image

    from weft.images import encode_png

    pixels = random.Random(seed).randbytes(3 * 8 * 8)
    made = Image.frombytes("RGB", (8, 8), pixels).resize((64, 64), Image.Resampling.NEAREST)
    return f"data:image/png;base64,{base64.b64encode(encode_png(made)).decode()}"
