"""Every limit: what reaches it passes, one more is refused."""

import asyncio
import base64
import json
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from tests.data.corpus import encoded, picture
from tests.serve.nonce import NonceBackbone, ask, new_nonce
from tests.serve.running import PATIENCE, running, until
from weft.serve.files import Files
from weft.serve.limits import Limits

JSON = {"content-type": "application/json"}
PNG = encoded(picture(1))
LARGER = encoded(picture(2, (30, 20)))


def url(data=PNG):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def asking(*content, **asked):
    parts = [{"type": "input_text", "text": each} if not each.startswith("data:") else shown(each) for each in content]
    return json.dumps({"model": "nonce", "input": [{"role": "user", "content": parts}], **asked}).encode()


def shown(address):
    return {"type": "input_image", "image_url": address}


def turns(count):
    return json.dumps({"model": "nonce", "input": [{"role": "user", "content": "a"}] * count}).encode()


def padded(body, length):
    return body + b" " * (length - len(body))


@dataclass
class Case:
    """What passes a limit and what does not, as bodies of `/v1/responses`."""

    limits: dict[str, Any]
    passes: bytes
    refused: bytes
    status: int = 400
    code: str = "document"
    path: str = "/v1/responses"


CASES = {
    "body_bytes": Case({"body_bytes": 4096}, padded(turns(1), 4096), padded(turns(1), 4097), 413, "request_too_large"),
    "json_depth": Case({"json_depth": 5}, asking("a"), asking("a", metadata={}, tools=[{"type": [{"a": [1]}]}]),
                       400, "too_deep"),
    "json_values": Case({"json_values": 41}, turns(13), turns(14), 400, "too_many_values"),
    "turns": Case({"turns": 3}, turns(3), turns(4)),
    "text_characters": Case({"text_characters": 20}, asking("a" * 9, "b" * 11), asking("a" * 9, "b" * 12)),
    "images": Case({"images": 2}, asking(url(), url()), asking(url(), url(), url()), 400, "image"),
    "image_bytes": Case({"image_bytes": len(PNG)}, asking(url(), url()), asking(url(LARGER)), 400, "image"),
    "images_bytes": Case({"images_bytes": len(PNG) * 2}, asking(url(), url()), asking(url(), url(LARGER)),
                         400, "image"),
    "image_pixels": Case({"image_pixels": 24 * 16}, asking(url()), asking(url(LARGER)), 400, "image"),
    "answer_images": Case({"answer_images": 2}, asking("a", max_images=2), asking("a", max_images=3), 400, "usage"),
}  # fmt: skip
ELSEWHERE = {
    "head_bytes": "test_connection.py", "head_seconds": "test_connection.py", "body_seconds": "test_connection.py",
    "requests_per_minute": "test_guard.py", "concurrent": "test_guard.py",
    "answer_text_tokens": "", "queue": "", "queue_seconds": "", "file_seconds": "", "files_bytes": "",
    "keep_alive_seconds": "test_responses.py", "send_seconds": "test_disconnect.py", "drain_seconds": "",
}  # fmt: skip
"""Tested below, or there."""


def test_no_limit_is_forgotten():
    assert set(Limits.model_fields) == CASES.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("name", CASES)
def test_what_reaches_a_limit_passes_and_one_more_is_refused(name):
    case = CASES[name]
    with running({"nonce": NonceBackbone()}, limits=Limits(**case.limits)) as server:
        reply = server.http().post(case.path, content=case.passes, headers=JSON)
        assert reply.status_code == 200, reply.text
        reply = server.http().post(case.path, content=case.refused, headers=JSON)
        assert (reply.status_code, reply.json()["error"]["code"]) == (case.status, case.code), reply.text
    if name != "json_depth":  # nothing that nests is asked for
        # without these limits, it is answered: they alone refused it
        with running({"nonce": NonceBackbone()}) as server:
            assert server.http().post(case.path, content=case.refused, headers=JSON).status_code == 200


def test_pictures_of_the_assistant_and_in_chat_count_as_well():
    with running({"nonce": NonceBackbone()}, limits=Limits(images=1)) as server:
        part = {"type": "image_url", "image_url": {"url": url()}}
        for second in (
            {"role": "assistant", "content": [part]},
            {"role": "assistant", "content": "a", "images": [{**part, "text_offset": 1}]},
        ):
            messages = [{"role": "user", "content": [part]}, second, {"role": "user", "content": "b"}]
            for count, status in ((1, 400), (2, 200)):
                if count == 2:
                    messages[0] = {"role": "user", "content": "a"}
                asked = {"model": "nonce", "messages": messages}
                assert server.http().post("/v1/chat/completions", json=asked).status_code == status


def test_the_text_of_an_answer_is_bounded_whatever_it_asks_for():
    with running({"nonce": NonceBackbone()}, limits=Limits(answer_text_tokens=17)) as server:
        for plan, status in (("t", "completed"), ("tt", "incomplete")):
            asked = {"model": "nonce", "input": ask(new_nonce(), plan), "max_output_tokens": 1000}
            answer = server.http().post("/v1/responses", json=asked).json()
            assert (answer["status"], answer["usage"]["output_tokens"]) == (status, 17)


@pytest.fixture
def held():
    """A model that waits, and what lets it go."""
    go = threading.Event()
    yield NonceBackbone(before_step=lambda: go.wait(PATIENCE)), go
    go.set()


def post_later(server, found, **asked):
    def post():
        found.append(server.http().post("/v1/responses", json={"model": "nonce", "input": "a", **asked}))

    thread = threading.Thread(target=post)
    thread.start()
    return thread


def test_one_more_than_may_wait_is_told_to_come_back(held):
    model, go = held
    with running({"nonce": model}, slots=1, limits=Limits(queue=2)) as server:
        threads = [post_later(server, replies := [])]
        until(lambda: (server.scheduler.load.running, server.scheduler.load.waiting) == (1, 0))
        threads += [post_later(server, replies) for _ in range(2)]
        until(lambda: server.scheduler.load.waiting == 2)
        reply = server.http().post("/v1/responses", json={"model": "nonce", "input": "a"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "busy")
        assert int(reply.headers["retry-after"]) >= 1
        go.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert [each.status_code for each in replies] == [200] * 3


def test_who_waits_too_long_for_a_slot_is_told_so():
    begun, go = threading.Event(), threading.Event()

    def step():
        begun.set()
        # long enough for the other one to be overdue
        threading.Event().wait(0 if go.is_set() else 0.02)

    with running({"nonce": NonceBackbone(before_step=step)}, slots=1, limits=Limits(queue_seconds=1)) as server:
        first, second = [], []
        threads = [post_later(server, first, input=ask(new_nonce(), "t" * 60))]
        assert begun.wait(PATIENCE)
        threads.append(post_later(server, second))
        threads[1].join(PATIENCE)
        go.set()
        threads[0].join(PATIENCE)
        assert (second[0].status_code, second[0].json()["error"]["code"]) == (503, "overdue")
        assert first[0].status_code == 200


def test_pictures_are_kept_within_their_time_and_room():
    now = [0.0]
    files = Files(Limits(file_seconds=5).file_seconds, Limits(files_bytes=20).files_bytes, lambda: now[0])
    first, second = files.put(bytes(10), "a"), files.put(bytes(10), "a")
    assert files.get(first, "a") is not None
    third = files.put(b"1", "a")
    assert [files.get(each, "a") is not None for each in (first, second, third)] == [False, True, True]
    now[0] = 5.0
    assert files.get(second, "a") is not None
    now[0] = 5.001
    assert files.get(second, "a") is None


def test_what_runs_at_the_end_may_go_on_so_long(held):
    model, go = held
    with running({"nonce": model}, slots=1) as server:
        found = []
        thread = post_later(server, found)
        until(lambda: server.scheduler.load.running == 1)
        releasing = threading.Timer(0.3, go.set)
        releasing.start()
        asyncio.run(server.scheduler.drain(PATIENCE))
        thread.join(PATIENCE)
        assert found[0].status_code == 200


def test_what_runs_longer_is_ended_with_a_word():
    def slowly():
        threading.Event().wait(0.01)

    with running({"nonce": NonceBackbone(before_step=slowly)}, slots=1) as server:
        found = []
        thread = post_later(server, found, input=ask(new_nonce(), "t" * 200))
        until(lambda: server.scheduler.load.running == 1)
        asyncio.run(server.scheduler.drain(0.1))
        thread.join(PATIENCE)
        assert (found[0].status_code, found[0].json()["error"]["code"]) == (503, "closing")
