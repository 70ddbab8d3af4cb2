"""Replicas on a real Ray cluster of this machine: one server to whoever asks, whichever of them answers."""

import base64
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx2
import openai
import pytest

from tests.serve.running import PATIENCE, until
from weft.errors import UsageError, WeftError
from weft.serve.files import address

serve = pytest.importorskip("ray.serve", reason="needs the extra `ray`")
ray = pytest.importorskip("ray")

from weft.serve.ray_serve import SPARE, ReplicasConfig, SharedFiles, build  # noqa: E402

NAME = "weft"
SLOTS = 4
BLOCKED = "a small red cat on the left, in the meadow by day."


def test_without_keys_it_is_not_built(monkeypatch):
    monkeypatch.delenv("WEFT_API_KEY", raising=False)
    with pytest.raises(UsageError, match="no key protects them"):
        build(ReplicasConfig(model="nano"))
    build(ReplicasConfig(model="nano", insecure=True))
    monkeypatch.setenv("WEFT_API_KEY", "a")
    build(ReplicasConfig(model="nano"))


def test_a_setting_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="slotz"):
        ReplicasConfig.model_validate({"model": "nano", "slotz": 3})
    # as `serve run` hands them over
    assert ReplicasConfig.model_validate({"model": "nano", "slots": "3", "gpus": "0.5"}).slots == 3


def test_a_replica_takes_what_it_can_answer_and_what_may_wait():
    assert ReplicasConfig(model="nano", slots=3).requests == 3 + 12 + SPARE
    config = {"model": "nano", "slots": 3, "adapters": {"a": "x"}, "limits": {"queue": 5}}
    assert ReplicasConfig.model_validate(config).requests == 6 + 5 + SPARE


def test_where_nobody_can_be_asked_a_replica_keeps_its_own(caplog):
    files = SharedFiles(900, 2**20)
    identity = files.put(b"picture", "somebody")
    assert (files.get(identity, "somebody"), files.get(identity, "else")) == (b"picture", None)
    assert "a picture is kept by one replica alone" in caplog.text


def test_without_ray_serve_the_extra_is_named(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("ray"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(WeftError, match=r"need the package ray\[serve\]") as error:
        build(ReplicasConfig(model="nano", insecure=True))
    assert "weft[ray]" in error.value.fix


# --- a cluster ------------------------------------------------------------------------------------------------------


def start(**settings):
    serve.run(build(ReplicasConfig(model="nano", slots=SLOTS, **settings)), name=NAME)


@pytest.fixture(scope="module")
def alone():
    """The address of a cluster, with one replica."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patched:
        for name in ("RAY_ADDRESS", "WEFT_API_KEY"):
            patched.delenv(name, raising=False)
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            start(insecure=True)
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def cluster(alone):
    """The same with two."""
    start(insecure=True, replicas=2)
    until(lambda: len(replicas()) == 2)
    return alone


def client(url):
    http = openai.DefaultHttpxClient(verify=False, trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE, http_client=http)


def http(url):
    return httpx2.Client(base_url=url, timeout=PATIENCE, trust_env=False, verify=False)


def replicas():
    """Name -> handle of each that runs."""
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if re.fullmatch(rf"SERVE_REPLICA::{NAME}#weft#\w+", actor["name"]):
            found[actor["name"]] = ray.get_actor(actor["name"], namespace=actor["namespace"])
    return found


def running(handle):
    return ray.get(handle.get_num_ongoing_requests.remote())


def process(handle):
    """The process of a replica."""
    return ray.get(handle.__ray_call__.remote(lambda _: os.getpid()))


def answered(url):
    """Answers of each of the two replicas, by when it counted its first."""
    found = {}

    def ask():
        with http(url) as to:  # another connection each time
            shown = to.get("/metrics").text
        begun = re.search(r"^weft_first_piece_seconds_created (\S+)", shown, re.MULTILINE)[1]
        found[begun] = sum(float(n) for n in re.findall(r"^weft_requests_total\{.*\} (\S+)", shown, re.MULTILINE))
        return len(found) == 2

    until(ask)
    return list(found.values())


LONG = {"seed": 5, "min_images": 2, "max_images": 2}


@pytest.mark.slow
def test_the_stock_client_reads_every_shape(alone):
    to = client(alone)
    asked = {"model": "nano", "extra_body": LONG, "temperature": 1}
    whole = to.responses.create(input=BLOCKED, max_output_tokens=80, **asked)
    assert [item.type for item in whole.output].count("image_generation_call") == 2
    events = list(to.responses.create(input=BLOCKED, max_output_tokens=80, stream=True, **asked))
    assert events[-1].type == f"response.{whole.status}"
    assert all(b.sequence_number == a.sequence_number + 1 for a, b in pairwise(events))
    found = [to.files.content(each.split("/")[3]).read() for each in pictures(events[-1].response)]
    assert found == [base64.b64decode(each) for each in pictures(whole)]
    messages = [{"role": "user", "content": BLOCKED}]
    said = to.chat.completions.create(messages=messages, max_tokens=80, **asked).choices[0].message
    chunks = list(to.chat.completions.create(messages=messages, max_tokens=80, stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said.content
    assert len(to.images.generate(model="nano", prompt="a", n=2).data) == 2
    with pytest.raises(openai.BadRequestError, match="n: "):
        to.chat.completions.create(model="nano", messages=messages, n=2)


def pictures(answer):
    return [item.result for item in answer.output if item.type == "image_generation_call"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_on_both(cluster):
    before = sum(answered(cluster))

    def ask(number):
        body = {"model": "nano", "input": BLOCKED, "temperature": 1, "max_output_tokens": 80, **LONG}
        with http(cluster) as to:
            answer = to.post("/v1/responses", json=body).json()
        return str([item.get("content") or item["result"] for item in answer["output"]])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
    after = answered(cluster)
    assert len(set(answers)) == 1
    assert sum(after) - before == 24
    assert min(after) > 0  # both answered


@pytest.mark.slow
def test_a_picture_is_found_whichever_replica_is_asked(cluster):
    to = client(cluster)
    asked = {"model": "nano", "max_images": 1, "min_images": 1, "image_delivery": "url"}
    made = [pictures(to.responses.create(model="nano", input="a", extra_body=asked))[0] for _ in range(2)]
    for each in made:
        found = set()
        for _ in range(16):
            with http(cluster) as other:
                reply = other.get(each)
            assert (reply.status_code, reply.headers["content-type"]) == (200, "image/png")
            found.add(reply.content)
        assert len(found) == 1
        # and taken back as what was said before
        history = [{"type": "image_generation_call", "id": "a", "status": "completed", "result": each}]
        for _ in range(8):
            to.responses.create(model="nano", input=[*history, {"role": "user", "content": "b"}], max_output_tokens=1)
    with http(cluster) as other:
        for wrong in (address("A" * 32), "/v1/files/../../etc/passwd/content", "/v1/files/x/content"):
            assert other.get(wrong).status_code == 404


@pytest.mark.slow
def test_a_caller_who_leaves_ends_his_request(cluster):
    with http(cluster) as to:
        for _ in range(8):
            body = {"model": "nano", "input": "a", "stream": True, "min_images": 4, "temperature": 1}
            with to.stream("POST", "/v1/responses", json=body) as answer:
                next(answer.iter_bytes())
    until(lambda: sum(running(each) for each in replicas().values()) == 0)


@pytest.mark.slow
def test_what_is_asked_stands_in_no_log_of_ray(cluster):
    word = "zyxwvutsrq"
    to = client(cluster)
    asked = {"model": "nano", "extra_body": {"max_images": 1, "min_images": 1, "image_delivery": "url"}}
    (made,) = pictures(to.responses.create(input=word, **asked))
    to.files.content(made.split("/")[3])
    with pytest.raises(openai.BadRequestError):
        to.responses.create(model="nano", input=[{"role": word}])
    logs = ray._private.worker._global_node.get_session_dir_path()
    read = set()
    for folder, _, names in os.walk(f"{logs}/logs"):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                text = file.read()
            read.add(name.partition("_")[0])
            assert word.encode() not in text, name
            assert made.encode() not in text, name
    assert {"replica", "proxy", "controller"} <= read


class Asked:
    """A stream that is read by a thread of its own."""

    def __init__(self, url):
        self.begun, self.outcome, self.items = threading.Event(), "", []
        self.thread = threading.Thread(target=self.read, args=(url,))
        self.thread.start()

    def read(self, url):
        try:
            to = client(url)
            events = to.responses.create(
                model="nano", input=BLOCKED, stream=True, temperature=1, extra_body={"seed": 1, "min_images": 12}
            )
            for event in events:
                self.begun.set()
                self.outcome = event.type
        except Exception as error:  # whatever a client makes of it
            self.outcome = type(error).__name__
        self.begun.set()


@pytest.mark.slow
def test_a_replica_that_is_killed_ends_what_it_was_answering_and_nothing_else(cluster):
    to = client(cluster)
    asked = {"max_images": 1, "min_images": 1, "image_delivery": "url"}
    made = [pictures(to.responses.create(model="nano", input="a", extra_body=asked))[0] for _ in range(6)]
    before = {name: process(handle) for name, handle in replicas().items()}
    assert len(before) == 2
    streams = [Asked(cluster) for _ in range(2 * SLOTS)]
    assert all(each.begun.wait(PATIENCE) for each in streams)
    load = {name: running(handle) for name, handle in replicas().items()}
    victim = max(load, key=load.get)
    assert 0 < load[victim] < len(streams)
    os.kill(before[victim], signal.SIGKILL)
    for each in streams:
        each.thread.join(PATIENCE)
    outcomes = Counter(each.outcome for each in streams)
    print(load, outcomes)
    whole = outcomes["response.completed"] + outcomes["response.incomplete"]
    assert whole >= len(streams) - load[victim]
    assert whole < len(streams)
    # what comes now is answered, and what was made before is there
    for each in made:
        assert to.responses.create(model="nano", input="a", max_output_tokens=1).status
        assert to.files.content(each.split("/")[3]).read()[:4] == b"\x89PNG"
    until(lambda: len(replicas()) == 2 and victim not in replicas(), seconds=120)


def break_models(_):
    """In a replica."""
    from weft.generation import Engine

    def step(_):
        raise RuntimeError("what somebody asked")

    Engine.step = step


@pytest.mark.slow
def test_a_replica_whose_models_fail_is_replaced(cluster):
    until(lambda: len(replicas()) == 2, seconds=120)
    name, handle = next(iter(replicas().items()))
    ray.get(handle.__ray_call__.remote(break_models))
    codes, refused = Counter(), []

    def is_replaced():
        try:
            with http(cluster) as to:
                reply = to.post("/v1/responses", json={"model": "nano", "input": "a", "max_output_tokens": 1})
        except httpx2.HTTPError as error:
            codes[type(error).__name__] += 1
            return False
        codes[reply.status_code] += 1
        if reply.status_code != 200:
            assert reply.status_code == 500
            # what was under way when the replica ended gets a line of text from Ray
            if reply.headers["content-type"] == "application/json":
                assert reply.json()["error"]["code"] == "engine_down"
            assert "somebody" not in reply.text
            refused.append(time.monotonic())
        return len(replicas()) == 2 and name not in replicas()

    until(is_replaced, seconds=120)
    print(codes, f"refused for {refused[-1] - refused[0]:.1f} s, replaced {time.monotonic() - refused[0]:.1f} s after")
    with http(cluster) as to:
        for _ in range(20):
            asked = {"model": "nano", "input": "a", "max_output_tokens": 1}
            assert to.post("/v1/responses", json=asked).status_code == 200


@pytest.mark.slow
def test_keys_are_asked_for_and_pictures_are_their_owners(cluster, tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("one\ntwo\n")
    start(replicas=2, key_file=file)
    asked = {"model": "nano", "prompt": "a", "response_format": "url"}
    with http(cluster) as to:
        assert to.get("/v1/models").status_code == 401
        by_one, by_two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        made = to.post("/v1/images/generations", json=asked, headers=by_one).json()["data"][0]["url"]
        for _ in range(8):
            assert [to.get(made, headers=each).status_code for each in (by_one, by_two, {})] == [200, 404, 401]
