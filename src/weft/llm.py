"""The one port to chat models: for annotating data and for judging answers.

    requests --complete--> (request, Reply | Failure), in any order

Transports: any OpenAI-compatible server over HTTP, or files of the batch protocol, for servers that work offline. Every
reply is kept in a cache, an append-only file, so that nothing is sent twice, whatever happened in between. Web text in
a request is untrusted: no tools are ever offered, and a reply is data for whoever asked to check.
"""

import hashlib
import json
import logging
import os
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pydantic
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from weft.atomic import write_text
from weft.config import Config
from weft.errors import UsageError, WeftError

log = logging.getLogger(__name__)

FailureKind = Literal["http", "timeout", "network", "malformed", "refused", "missing"]


class LLMError(WeftError):
    """The server cannot be used at all: work stops here, and goes on here when it is back."""


@dataclass(frozen=True)
class Request:
    id: str
    """The caller's own; the cache does not know it."""
    messages: tuple[Mapping[str, Any], ...]
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    choice: tuple[str, ...] = ()
    """The reply is one of these, where the server can be held to it."""

    def body(self, model: str) -> dict[str, Any]:
        """What is sent; everything that could change the reply is in it."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [dict(message) for message in self.messages],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        return {**body, "guided_choice": list(self.choice)} if self.choice else body

    def key(self, model: str) -> str:
        text = json.dumps(self.body(model), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    text: str
    model: str
    """As the server names it."""
    tokens: int = 0
    """Of prompt and reply."""


@dataclass(frozen=True)
class Failure:
    """One request came to nothing; others go on."""

    kind: FailureKind
    detail: str


Result = Reply | Failure


class Port(Protocol):
    """Somebody who answers."""

    model: str

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]: ...


class HttpConfig(Config):
    """A server with `POST {base_url}/chat/completions`."""

    kind: Literal["http"] = "http"
    base_url: str
    model: str
    key_variable: str | None = None
    """The environment variable that holds the key. Neither is written anywhere."""
    in_flight: PositiveInt = 64
    timeout: PositiveFloat = 120.0
    """Seconds for one attempt."""
    attempts: PositiveInt = 5
    longest_wait: PositiveFloat = 60.0
    """Seconds between two attempts at most, whatever the server asks for."""
    failures_in_a_row: PositiveInt = 20
    """So many requests that came to nothing, one after the other, and nothing more is sent."""
    max_requests: NonNegativeInt | None = None
    """Of one run; the cache does not count."""
    max_tokens: NonNegativeInt | None = None
    """Of all replies and prompts of one run: once they are used up, nothing more is sent."""


class BatchConfig(Config):
    """Files of the batch protocol: requests are written, and what answers them is read when it is there."""

    kind: Literal["batch"] = "batch"
    folder: Path
    """Holds `requests.jsonl`, and later `results.jsonl`."""
    model: str


LLMConfig = Annotated[HttpConfig | BatchConfig, pydantic.Field(discriminator="kind")]


def open_port(config: HttpConfig | BatchConfig, cache: Path | None = None) -> Port:
    """
    Args:
        cache: a file that keeps every reply, made if it is not there.
    """
    port: Port = Http(config) if isinstance(config, HttpConfig) else Batch(config)
    return port if cache is None else Cached(port, cache)


def seed_of(*parts: str | int) -> int:
    """A seed that is the same wherever and whenever it is asked for."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


class Cached:
    """Answers from a file what was answered before."""

    def __init__(self, port: Port, file: Path) -> None:
        self._port, self._file, self.model = port, file, port.model
        self._known = _read_cache(file)

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        missing: dict[str, list[Request]] = {}
        for request in requests:
            key = request.key(self.model)
            if key in self._known:
                yield request, self._known[key]
            else:
                missing.setdefault(key, []).append(request)
        if not missing:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as file:
            for request, result in self._port.complete([of_key[0] for of_key in missing.values()]):
                key = request.key(self.model)
                if isinstance(result, Reply):
                    file.write(json.dumps({"key": key, **asdict(result)}, ensure_ascii=False) + "\n")
                    file.flush()
                    self._known[key] = result
                for same in missing[key]:
                    yield same, result


def _read_cache(file: Path) -> dict[str, Reply]:
    known: dict[str, Reply] = {}
    if not file.is_file():
        return known
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):  # a process died while it wrote the last line
        os.truncate(file, len(whole))
    for line in whole.splitlines():
        try:
            record = json.loads(line)
            key = record.pop("key")
            known[key] = Reply(**record)
        except (ValueError, TypeError, KeyError):
            log.warning("%s: a damaged line is left out; its request is sent again", file)
    return known


class Http:
    """Asks a server, several requests at a time."""

    def __init__(self, config: HttpConfig) -> None:
        """
        Raises:
            UsageError: the key's environment variable is not set.
        """
        import httpx2

        headers = {}
        if config.key_variable is not None:
            key = os.environ.get(config.key_variable)
            if not key:
                raise UsageError(
                    f"the environment variable {config.key_variable} is not set", fix="put the server's key into it"
                )
            headers["Authorization"] = f"Bearer {key}"
        self.model = config.model
        self._config = config
        self._client = httpx2.Client(
            headers=headers,
            timeout=config.timeout,
            limits=httpx2.Limits(max_connections=config.in_flight),
            trust_env=False,
            follow_redirects=False,
        )
        self._budget = _Budget(config)

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        """
        Raises:
            LLMError: the budget is used up, or nothing was answered for long; what was answered has been yielded.
        """
        waiting, asked = iter(requests), dict[Future[Result], Request]()
        with ThreadPoolExecutor(self._config.in_flight) as pool:
            try:
                while True:
                    while len(asked) < self._config.in_flight and self._budget.is_open:
                        request = next(waiting, None)
                        if request is None:
                            break
                        asked[pool.submit(self._ask, request)] = request
                    if not asked:
                        break
                    for future in wait(asked, return_when=FIRST_COMPLETED).done:
                        yield asked.pop(future), future.result()
            finally:
                for future in asked:
                    future.cancel()
        if next(waiting, None) is not None:
            raise self._budget.error(self._config.base_url)

    def _ask(self, request: Request) -> Result:
        from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_attempt

        result: Result
        try:
            for attempt in Retrying(
                retry=retry_if_exception_type(_TryAgain),
                stop=stop_after_attempt(self._config.attempts),
                wait=self._wait,
            ):
                with attempt:
                    result = self._once(request)
        except RetryError as error:
            last = error.last_attempt.exception()
            assert isinstance(last, _TryAgain)
            result = last.failure
        self._budget.count(result)
        return result

    def _wait(self, state: Any) -> float:
        asked_for = state.outcome.exception().wait
        backoff = random.uniform(0.5, 1.0) * 2 ** (state.attempt_number - 1)
        return min(backoff if asked_for is None else asked_for, self._config.longest_wait)

    def _once(self, request: Request) -> Result:
        """
        Raises:
            _TryAgain: another attempt may do better.
        """
        import httpx2

        try:
            answer = self._client.post(
                f"{self._config.base_url.rstrip('/')}/chat/completions", json=request.body(self.model)
            )
        except httpx2.TimeoutException as error:
            raise _TryAgain(Failure("timeout", f"no answer in {self._config.timeout:g} s")) from error
        except httpx2.HTTPError as error:
            raise _TryAgain(Failure("network", type(error).__name__)) from error
        if answer.status_code == 429 or answer.status_code >= 500:
            raise _TryAgain(Failure("http", f"status {answer.status_code}"), _retry_after(answer.headers))
        if answer.status_code != 200:
            return Failure("refused", f"status {answer.status_code}: {answer.text[:200]}")
        try:
            return _reply(answer.json(), self.model)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise _TryAgain(Failure("malformed", f"{type(error).__name__} in the server's answer")) from error


@dataclass
class _TryAgain(Exception):
    failure: Failure
    wait: float | None = None
    """Seconds that the server asks for."""


def _reply(body: Any, model: str) -> Reply:
    """
    Raises:
        KeyError, TypeError, IndexError, ValueError: it is no chat completion.
    """
    text = body["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("content is no text")
    usage = body.get("usage") or {}
    return Reply(text, str(body.get("model") or model), int(usage.get("total_tokens") or 0))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when, now = parsedate_to_datetime(value), parsedate_to_datetime(headers["date"])
    except (ValueError, TypeError, KeyError):
        return None
    return max(0.0, (when - now).total_seconds())


@dataclass
class _Budget:
    """What may still be sent. Threads share it."""

    config: HttpConfig
    requests: int = 0
    tokens: int = 0
    in_a_row: int = 0
    last: str = ""
    _lock: Any = field(default_factory=threading.Lock)

    @property
    def is_open(self) -> bool:
        return self._why() is None

    def count(self, result: Result) -> None:
        with self._lock:
            self.requests += 1
            if isinstance(result, Reply):
                self.tokens, self.in_a_row = self.tokens + result.tokens, 0
            else:
                self.in_a_row, self.last = self.in_a_row + 1, result.detail

    def error(self, where: str) -> LLMError:
        what, fix = self._why() or ("nothing more is sent", "run it again")
        return LLMError(what, where=where, fix=f"{fix}; what was answered is kept, the same command goes on from it")

    def _why(self) -> tuple[str, str] | None:
        config = self.config
        if self.in_a_row >= config.failures_in_a_row:
            return f"{self.in_a_row} requests in a row came to nothing, the last: {self.last}", "look at the server"
        if config.max_requests is not None and self.requests >= config.max_requests:
            return f"{self.requests} requests are the budget of a run", "raise max_requests"
        if config.max_tokens is not None and self.tokens >= config.max_tokens:
            return f"{self.tokens} tokens were used, the budget is {config.max_tokens}", "raise max_tokens"
        return None


class Batch:
    """Writes what is to be asked to a file, and reads the file of what was answered."""

    def __init__(self, config: BatchConfig) -> None:
        self.model, self._folder = config.model, config.folder

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        """
        Raises:
            LLMError: some have no answer yet; all of them are in `requests.jsonl` then.
        """
        answers = self._answers()
        missing: list[Request] = []
        for request in requests:
            answer = answers.get(request.key(self.model))
            if answer is None:
                missing.append(request)
            else:
                yield request, answer
        if missing:
            self._write(missing)
            raise LLMError(
                f"{len(missing)} requests have no answer yet",
                where=str(self._folder / "requests.jsonl"),
                fix="let a server answer that file into results.jsonl beside it, then run the same command",
            )

    def _write(self, requests: Sequence[Request]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = {
            request.key(self.model): json.dumps(
                {
                    "custom_id": request.key(self.model),
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": request.body(self.model),
                },
                ensure_ascii=False,
            )
            for request in requests
        }
        write_text(self._folder / "requests.jsonl", "".join(line + "\n" for line in lines.values()))

    def _answers(self) -> dict[str, Result]:
        file = self._folder / "results.jsonl"
        found: dict[str, Result] = {}
        if not file.is_file():
            return found
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                found[record["custom_id"]] = _batch_result(record, self.model)
            except (ValueError, KeyError, TypeError) as error:
                raise LLMError(
                    "a line is no result of the batch protocol", where=f"{file}, line {number}", fix="mend or drop it"
                ) from error
        return found


def _batch_result(record: Mapping[str, Any], model: str) -> Result:
    response = record.get("response") or {}
    if record.get("error") or response.get("status_code", 200) != 200:
        return Failure("http", str(record.get("error") or f"status {response.get('status_code')}")[:200])
    try:
        return _reply(response["body"], model)
    except (KeyError, TypeError, IndexError, ValueError):
        return Failure("malformed", "no chat completion in the answer")
