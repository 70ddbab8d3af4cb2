"""Keys, rates and bodies: what is refused before anything is made of it."""

import contextlib
import inspect
import socket
import threading
import time

import pytest

from tests.serve.nonce import NonceBackbone, ask, new_nonce
from tests.serve.running import PATIENCE, running, until
from weft.serve import guard
from weft.serve.guard import NOBODY, Callers, NoKey, _wrong
from weft.serve.limits import Limits
from weft.serve.scheduler import Busy

KEYS = ["first-key", "second-key", "schlüssel"]
PATHS = [
    ("POST", "/v1/responses"), ("POST", "/v1/chat/completions"), ("POST", "/v1/images/generations"),
    ("GET", "/v1/models"), ("GET", "/v1/models/nonce"), ("GET", "/v1/files/abc/content"), ("GET", "/metrics"),
]  # fmt: skip
WRONG = [
    None, "", "Bearer", "Bearer wrong", "Bearer first-ke", "Bearer first-keyy", "Bearer FIRST-KEY",
    "Basic first-key", "first-key", "Bearer first-key second-key", "Bearer\tfirst-key", "Bearer first-key,x",
]  # fmt: skip


@pytest.fixture(scope="module")
def locked():
    with running({"nonce": NonceBackbone()}, keys=KEYS) as server:
        yield server


@pytest.mark.parametrize("method, path", PATHS)
def test_without_a_key_nothing_is_told(locked, method, path):
    for wrong in WRONG:
        headers = {} if wrong is None else {"authorization": wrong}
        reply = locked.http().request(method, path, headers=headers, content=b"no JSON")
        assert reply.status_code == 401, wrong
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.json()["error"]["type"] == "authentication_error"
    assert locked.http("first-key").request(method, path, content=b"no JSON").status_code != 401


def test_every_key_opens_and_health_needs_none(locked):
    for key in KEYS:
        reply = locked.http().get("/v1/models", headers={"authorization": b"Bearer " + key.encode()})
        assert [model["id"] for model in reply.json()["data"]] == ["nonce"]
    assert locked.openai("second-key").models.list().data[0].id == "nonce"
    assert locked.http().get("/health").status_code == locked.http().get("/ready").status_code == 200


def test_a_request_without_a_key_is_refused_before_its_body_is_read(locked):
    host, port = locked.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        head = f"POST /v1/responses HTTP/1.1\r\nHost: {host}\r\nContent-Length: 60000000\r\n\r\n"
        connection.sendall(head.encode())  # and nothing of it
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch):
    compared = []
    real = guard.hmac.compare_digest

    def counted(a, b):
        compared.append(b)
        return real(a, b)

    monkeypatch.setattr(guard.hmac, "compare_digest", counted)
    callers = Callers(KEYS, Limits())
    assert callers.owner("Bearer first-key") != callers.owner("Bearer second-key")
    with pytest.raises(NoKey):
        callers.owner("Bearer wrong")
    assert compared == 3 * [key.encode() for key in KEYS]
    # and nowhere else
    assert "==" not in inspect.getsource(Callers.owner)


def test_owners_do_not_tell_keys():
    callers = Callers(KEYS, Limits())
    names = {callers.owner(f"Bearer {key}") for key in KEYS[:2]}
    assert len(names) == 2
    assert not any(key in name for key in KEYS for name in names)
    assert callers.owner("bearer  first-key ") in names
    assert Callers([], Limits()).owner(None) == NOBODY


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_the_rate_is_that_of_the_last_minute():
    clock = Clock()
    callers = Callers(KEYS, Limits(requests_per_minute=3), clock)

    def once(owner="a"):
        with callers.asking(owner):
            pass

    for second in (0, 10, 20):
        clock.now = 1000.0 + second
        once()
    for at, retry_after in ((20, 40), (59.5, 1), (59.999, 1), (30.2, 30)):
        clock.now = 1000.0 + at
        with pytest.raises(Busy) as refused:
            once()
        assert refused.value.retry_after == retry_after
        assert type(refused.value.retry_after) is int
    once("b")  # another key is another count
    clock.now = 1060.0
    once()  # the first has left, and what was refused was never counted
    with pytest.raises(Busy) as refused:
        once()
    assert refused.value.retry_after == 10
    # 100 minutes at the limit: never more than 3 in any 60 seconds
    let, clock.now = [], 2000.0
    for step in range(6000):
        clock.now = 2000.0 + step
        try:
            once()
            let.append(clock.now)
        except Busy:
            pass
    assert len(let) == 300
    assert all(later - earlier >= 60 for earlier, later in zip(let, let[3:], strict=False))


def test_what_runs_at_once_is_counted_until_it_ends_however_it_ends():
    callers = Callers(KEYS, Limits(concurrent=2, requests_per_minute=None))
    with callers.asking("a"):
        with contextlib.suppress(RuntimeError), callers.asking("a"):
            with pytest.raises(Busy), callers.asking("a"):
                pass
            with callers.asking("b"):
                pass
            raise RuntimeError
        with callers.asking("a"):
            pass


def test_nobody_is_counted_where_no_key_is_asked_for():
    callers = Callers([], Limits(requests_per_minute=1, concurrent=1))
    with callers.asking(NOBODY), callers.asking(NOBODY), callers.asking(NOBODY):
        pass


def test_who_asks_too_often_is_told_when_to_come_back():
    with running({"nonce": NonceBackbone()}, keys=KEYS, limits=Limits(requests_per_minute=2)) as server:
        asked = {"model": "nonce", "input": ask(new_nonce(), "t")}
        replies = [server.http("first-key").post("/v1/responses", json=asked) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200, 200, 429]
        assert 1 <= int(replies[2].headers["retry-after"]) <= 60
        assert replies[2].json()["error"]["type"] == "rate_limit_error"
        assert server.http("second-key").post("/v1/responses", json=asked).status_code == 200
        # the stock client knows what it is
        import openai

        with pytest.raises(openai.RateLimitError):
            server.openai("first-key").responses.create(model="nonce", input="a")


def test_prompts_that_are_still_read_count_as_well(monkeypatch):
    """What they hold is most of what a request costs before it is answered."""
    from weft.serve import app

    go, begun, read = threading.Event(), threading.Event(), app.of_responses

    def slowly(*given):
        begun.set()
        assert go.wait(PATIENCE)
        return read(*given)

    monkeypatch.setattr(app, "of_responses", slowly)
    with running({"nonce": NonceBackbone()}, keys=KEYS, limits=Limits(concurrent=1)) as server:
        asked = {"model": "nonce", "input": ask(new_nonce(), "t")}
        replies = []
        first = threading.Thread(
            target=lambda: replies.append(server.http("first-key").post("/v1/responses", json=asked))
        )
        first.start()
        assert begun.wait(PATIENCE)
        replies.append(server.http("first-key").post("/v1/responses", json=asked))
        go.set()
        first.join(PATIENCE)
        assert [reply.status_code for reply in replies] == [429, 200]


DEEP = Limits(json_depth=4, json_values=50)


@pytest.mark.parametrize(
    "body, code",
    [
        (b'{"a":[[[1]]]}', None),
        (b'{"a":[[[[1]]]]}', "too_deep"),
        (b"[" * 5, "too_deep"),
        (b'{"a":"[[[[[[[[[["}', None),
        (b'{"a":"\\"[[[[[[[[[["}', None),
        (b'{"a":"\\\\",' + b'"b":[[[[[', "too_deep"),
        (b'"' + b"[" * 90, None),  # a string that does not end is left to the parser
        (b'"\\', None),
        (('["\u5b22' + "[" * 9).encode("utf-16"), "invalid"),  # whose bytes hide brackets in a string
        (b"]]]]]]]][[[[[[[[[[", None),
        (b"[" + b"1," * 48 + b"1]", None),
        (b"[" + b"1," * 49 + b"1]", None),
        (b"[" + b"1," * 50 + b"1]", "too_many_values"),
        (b"[" + b"{}," * 25 + b"1]", "too_many_values"),
        (b'["' + b"," * 900 + b'"]', None),
        (b'["' + b'\\",' * 900 + b'"]', None),
        (b"[,,,," + b'""' * 101, "too_many_values"),
    ],
)
def test_brackets_and_values_are_counted_outside_of_strings(body, code):
    found = _wrong(body, DEEP)
    assert (None if found is None else found[1]) == code


HEAVY = {
    "one string": lambda: b'["' + b"a" * 2**25 + b'",[[[[[,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,',
    "escapes without an end": lambda: b"[" * 40 + b'"' + b'\\"' * 2**24,
    "backslashes": lambda: b"[" * 40 + b'"' + b"\\" * 2**25,
    "quotes": lambda: b"[" * 40 + b'"' * 2**25,
    "brackets": lambda: b"[]" * 2**24,
    "values": lambda: b"[" + b"1," * 2**24,
}


@pytest.mark.parametrize("name", HEAVY)
def test_no_body_takes_long_to_be_judged(name):
    body = HEAVY[name]()
    begin = time.process_time()
    _wrong(body, Limits())
    # linear in 32 MiB: a tenth of this here; what is tried twice takes hours
    assert time.process_time() - begin < 5


def test_an_error_that_nobody_thought_of_is_told_and_logged_without_what_is_in_it(nonce_server, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("CANARY")

    monkeypatch.setattr("weft.serve.app._model", fail)
    reply = nonce_server.http().get("/v1/models")
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    until(lambda: "unexpected RuntimeError" in caplog.text)
    assert "CANARY" not in reply.text + caplog.text


def test_nothing_is_sent_to_whom_a_variable_names(nonce_server, monkeypatch):
    """FastAPI would tell of errors and of fields that are wrong, with what is in them."""
    telemetry = nonce_server.app._native_telemetry
    monkeypatch.setattr("fastapi.telemetry._asgi._unconfigured", lambda provider: False)
    assert not telemetry.enabled()
    assert not telemetry.config["auto_configure"]
