"""The port to chat models, against a real server on this machine that fails in every way that servers do."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from weft.errors import UsageError
from weft.llm import (
    BatchConfig,
    Cached,
    Failure,
    Http,
    HttpConfig,
    LLMError,
    Reply,
    Request,
    open_port,
    seed_of,
)


class Stub:
    """Answers `echo: TEXT`; what a test puts into `behave` by text comes before."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.running = self.most = 0
        self.behave: dict[str, Callable[[Any, int], bool]] = {}
        """Text -> whether (handler, attempt from 1) was dealt with."""
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][-1]["content"]
                with stub.lock:
                    stub.seen[text] += 1
                    attempt = stub.seen[text]
                    stub.headers.append(dict(self.headers))
                    stub.running += 1
                    stub.most = max(stub.most, stub.running)
                try:
                    behave = stub.behave.get(text)
                    if behave is None or not behave(self, attempt):
                        self.say(chat(f"echo: {text}"))
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with stub.lock:
                        stub.running -= 1

            def say(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"


def chat(text: Any) -> dict[str, Any]:
    return {"model": "stub-1", "choices": [{"message": {"content": text}}], "usage": {"total_tokens": 7}}


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.server.shutdown()
    server.server.server_close()


def config(stub: Stub, **changes: Any) -> HttpConfig:
    given = {"base_url": stub.url, "model": "m", "in_flight": 4, "timeout": 1, "attempts": 3, "longest_wait": 0.01}
    return HttpConfig(**{**given, **changes})


def ask(*texts: str) -> list[Request]:
    return [Request(text, ({"role": "user", "content": text},)) for text in texts]


def answers(port: Any, *texts: str) -> dict[str, Any]:
    found = [(request.id, result) for request, result in port.complete(ask(*texts))]
    assert len(found) == len(texts)
    return dict(found)


def once(act: Callable[[Any], None]) -> Callable[[Any, int], bool]:
    """The first attempt goes wrong."""

    def behave(handler: Any, attempt: int) -> bool:
        if attempt > 1:
            return False
        act(handler)
        return True

    return behave


def always(act: Callable[[Any], None]) -> Callable[[Any, int], bool]:
    def behave(handler: Any, attempt: int) -> bool:
        act(handler)
        return True

    return behave


def cut(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def drop(handler: Any) -> None:
    handler.close_connection = True
    handler.connection.close()


def silence(handler: Any) -> None:
    """Until the client has had enough of it."""
    handler.close_connection = True
    handler.connection.settimeout(60)
    handler.rfile.read(1)


WAYS: dict[str, Callable[[Any], None]] = {
    "too many": lambda h: h.say({}, 429, {"Retry-After": "0"}),
    "too many until a date": lambda h: h.say({}, 429, {"Retry-After": "Sat, 01 Jan 2000 00:00:00 GMT"}),
    "server error": lambda h: h.say(b"oops", 500),
    "bad gateway": lambda h: h.say(b"<html>", 502),
    "silence": silence,
    "cut body": cut,
    "dropped connection": drop,
    "not JSON": lambda h: h.say(b"{nope"),
    "a list": lambda h: h.say([]),
    "no choices": lambda h: h.say({"choices": []}),
    "content is null": lambda h: h.say(chat(None)),
    "content is a number": lambda h: h.say(chat(3)),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_bad_answer_costs_one_more_attempt(stub: Stub, way: str) -> None:
    stub.behave["bad"] = once(WAYS[way])
    found = answers(Http(config(stub)), "good", "bad", "also good")
    assert {text: result.text for text, result in found.items()} == {
        text: f"echo: {text}" for text in ("good", "bad", "also good")
    }
    assert stub.seen == {"good": 1, "bad": 2, "also good": 1}


@pytest.mark.parametrize("way", WAYS)
def test_a_request_that_never_works_fails_alone(stub: Stub, way: str) -> None:
    stub.behave["bad"] = always(WAYS[way])
    found = answers(Http(config(stub)), "good", "bad", "also good")
    assert isinstance(found["bad"], Failure) and isinstance(found["good"], Reply)
    assert isinstance(found["also good"], Reply) and stub.seen["bad"] == 3


def test_a_refusal_is_not_repeated(stub: Stub) -> None:
    stub.behave["bad"] = always(lambda h: h.say({"error": "too long"}, 400))
    assert answers(Http(config(stub)), "bad")["bad"] == Failure("refused", 'status 400: {"error": "too long"}')
    assert stub.seen["bad"] == 1


def test_the_server_says_how_long_to_wait(stub: Stub) -> None:
    stub.behave["bad"] = once(lambda h: h.say({}, 429, {"Retry-After": "0.4"}))
    start = time.monotonic()
    answers(Http(config(stub, longest_wait=5)), "bad")
    assert 0.4 <= time.monotonic() - start < 3


def test_no_more_in_flight_than_asked_for(stub: Stub) -> None:
    texts = [str(i) for i in range(12)]
    stub.behave = {text: (lambda h, _: bool(time.sleep(0.05))) for text in texts}
    assert len(answers(Http(config(stub, in_flight=3)), *texts)) == 12
    assert stub.most == 3


def test_what_was_answered_is_never_sent_again(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "replies.jsonl"
    stub.behave["bad"] = always(lambda h: h.say(b"", 500))
    first = answers(open_port(config(stub), file), "a", "b", "bad")
    with open(file, "ab") as handle:
        handle.write(b'{"key": "half a li')  # a process died here
    second = answers(open_port(config(stub), file), "a", "b", "bad", "c")
    assert stub.seen == {"a": 1, "b": 1, "bad": 6, "c": 1}
    assert (first["a"], first["b"]) == (second["a"], second["b"])
    assert answers(open_port(config(stub), file), "a", "c")["c"].text == "echo: c"
    assert stub.seen["c"] == 1


def test_the_cache_knows_what_could_change_a_reply(stub: Stub, tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    message = ({"role": "user", "content": "a"},)
    different = [Request("1", message), Request("2", message, temperature=1.0), Request("3", message, seed=1)]
    port = open_port(config(stub), file)
    assert len(list(port.complete([*different, Request("the same as 1", message)]))) == 4
    assert stub.seen["a"] == 3
    list(open_port(config(stub, model="other"), file).complete(different[:1]))
    assert stub.seen["a"] == 4


def test_a_dead_server_stops_the_work_and_keeps_what_was_answered(stub: Stub, tmp_path: Path) -> None:
    texts = [str(i) for i in range(30)]
    for text in texts[5:]:
        stub.behave[text] = always(lambda h: h.say(b"", 503))
    file = tmp_path / "replies.jsonl"
    port = Cached(Http(config(stub, in_flight=1, attempts=1, failures_in_a_row=4)), file)
    with pytest.raises(LLMError, match="4 requests in a row came to nothing"):
        list(port.complete(ask(*texts)))
    assert sum(stub.seen.values()) == 9
    assert len(file.read_text().splitlines()) == 5


@pytest.mark.parametrize("limit", [{"max_requests": 3}, {"max_tokens": 21}])
def test_a_budget_is_kept(stub: Stub, limit: dict[str, int]) -> None:
    with pytest.raises(LLMError, match="budget"):
        list(Http(config(stub, in_flight=1, **limit)).complete(ask("a", "b", "c", "d", "e")))
    assert sum(stub.seen.values()) == 3


def test_a_budget_that_is_just_enough(stub: Stub) -> None:
    assert len(answers(Http(config(stub, max_requests=2)), "a", "b")) == 2


def test_the_key_is_sent_and_shown_nowhere(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STUB_KEY", "sesame")
    wanted = config(stub, key_variable="STUB_KEY")
    answers(open_port(wanted, tmp_path / "cache.jsonl"), "a")
    assert stub.headers[0]["Authorization"] == "Bearer sesame"
    assert "sesame" not in caplog.text + (tmp_path / "cache.jsonl").read_text() + wanted.model_dump_json()
    monkeypatch.delenv("STUB_KEY")
    with pytest.raises(UsageError, match="STUB_KEY is not set"):
        Http(wanted)


def test_batch_files(tmp_path: Path) -> None:
    wanted = BatchConfig(folder=tmp_path, model="m")
    with pytest.raises(LLMError, match="2 requests have no answer yet"):
        list(open_port(wanted).complete(ask("a", "b")))
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [line["body"]["messages"][0]["content"] for line in lines] == ["a", "b"]
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    results = [
        {"custom_id": lines[1]["custom_id"], "response": {"status_code": 500}},
        {"custom_id": lines[0]["custom_id"], "response": {"status_code": 200, "body": chat("yes")}},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    found = answers(open_port(wanted), "a", "b")
    assert found == {"a": Reply("yes", "stub-1", 7), "b": Failure("http", "status 500")}
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write("nonsense\n")
    with pytest.raises(LLMError, match="no result of the batch protocol") as error:
        answers(open_port(wanted), "a")
    assert "line 3" in str(error.value.where)


def test_seeds_are_the_same_everywhere() -> None:
    assert seed_of("doc", "filter", 0) == seed_of("doc", "filter", 0) == 1341395569
    assert seed_of("doc", "filter", 0) != seed_of("docfilter", "", 0)
