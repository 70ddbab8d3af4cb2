"""How a server ends: nothing is cut without a word, neither when it is asked to end nor when its models fail."""

import json
import signal
import threading
import time

import httpx2
import pytest

from tests.serve.apart import apart, nonce
from tests.serve.nonce import NonceBackbone, new_nonce
from tests.serve.running import PATIENCE, running, until
from tests.serve.test_disconnect import metric
from tests.serve.test_load import Question
from weft.serve.limits import Limits


class Asked:
    """A question that is being answered to a thread of its own."""

    def __init__(self, url, endpoint, plan, is_streamed):
        self.question = Question(new_nonce(), plan, (), endpoint, is_streamed)
        self.status, self.text, self.error, self.is_begun = 0, "", None, threading.Event()
        self.ended = 0.0
        self.thread = threading.Thread(target=self.read, args=(url,))
        self.thread.start()

    def read(self, url):
        try:
            with httpx2.stream("POST", f"{url}/v1/{self.question.endpoint}", json=self.question.body,
                               timeout=PATIENCE, trust_env=False) as answer:  # fmt: skip
                self.status = answer.status_code
                for piece in answer.iter_text():
                    self.text += piece
                    self.is_begun.set()
        except httpx2.HTTPError as error:
            self.error = repr(error)
        self.ended = time.monotonic()
        self.is_begun.set()

    @property
    def is_whole(self):
        failed = self.status != 200 or (self.question.is_streamed and self.is_ended)
        return not failed and self.question.read(self.text) == self.question.expected

    @property
    def is_refused(self):
        return self.status in (500, 503) and "error" in json.loads(self.text)

    @property
    def is_ended(self):
        """The last thing of its stream says that it failed."""
        events = [json.loads(line[6:]) for line in self.text.splitlines() if line.startswith("data: {")]
        if self.question.endpoint == "responses":
            return events[-1]["type"] == "response.failed" and events[-1]["response"]["error"]["message"]
        return "error" in events[-1]

    def join(self):
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self


def ask_all(url, plan):
    return [
        Asked(url, endpoint, plan, is_streamed)
        for endpoint in ("responses", "chat/completions")
        for is_streamed in (True, False)
    ]


def test_asked_to_end_it_refuses_what_is_new_and_ends_what_runs():
    go_on = threading.Event()
    model = NonceBackbone(before_step=lambda: go_on.wait(PATIENCE) and None)
    with running({"nonce": model}, slots=2) as server, server.http() as http:
        asked = ask_all(server.url, "tp")  # for two of which there are slots
        until(lambda: server.scheduler.load.running + server.scheduler.load.waiting == len(asked))
        assert http.get("/ready").status_code == 200
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/health").status_code == 200
        refused = http.post("/v1/responses", json=asked[0].question.body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "closing")
        go_on.set()
        assert all(each.join().is_whole for each in asked)
        until(lambda: server.server.should_exit)


def test_what_takes_longer_than_it_may_gets_a_last_word():
    """Even where a single step takes longer."""
    go_on = threading.Event()
    model = NonceBackbone(before_step=lambda: go_on.wait(PATIENCE) and None)
    with running({"nonce": model}, slots=2, limits=Limits(drain_seconds=0.1)) as server:
        asked = ask_all(server.url, "tp")
        until(lambda: server.scheduler.load.running + server.scheduler.load.waiting == len(asked))
        server.server.handle_exit(signal.SIGTERM, None)
        assert all(each.join().is_refused for each in asked)  # none had got anything yet
        go_on.set()
        until(lambda: server.server.should_exit)


@pytest.mark.parametrize("drain", [30.0, 0.2])
def test_streams_that_are_under_way_end_whole_or_with_a_word(drain):
    go_on = threading.Event()
    model = NonceBackbone(before_step=lambda: go_on.wait(PATIENCE) and time.sleep(0.005))
    with running({"nonce": model}, slots=4, limits=Limits(drain_seconds=drain)) as server:
        asked = ask_all(server.url, "tptp")
        until(lambda: server.scheduler.load.running + server.scheduler.load.waiting == len(asked))
        go_on.set()
        for each in asked:
            if each.question.is_streamed:
                assert each.is_begun.wait(PATIENCE)
        server.server.handle_exit(signal.SIGTERM, None)
        for each in asked:
            each.join()
            assert each.error is None
            if drain > 1:
                assert each.is_whole
            else:
                assert each.is_ended if each.question.is_streamed else each.is_refused


def test_where_the_models_fail_every_stream_says_so():
    stays, fails = threading.Event(), threading.Event()

    def step():
        time.sleep(0.005)
        if stays.is_set():
            assert fails.wait(PATIENCE)
            raise RuntimeError("what somebody asked")

    with running({"nonce": NonceBackbone(before_step=step)}, slots=2) as server, server.http() as http:
        asked = [Asked(server.url, endpoint, "t" * 30, True) for endpoint in ("responses", "chat/completions")]
        assert all(each.is_begun.wait(PATIENCE) for each in asked)
        stays.set()
        asked += ask_all(server.url, "t")
        until(lambda: server.scheduler.load.waiting == 4)
        begun = time.monotonic()
        fails.set()
        until(lambda: http.get("/health").status_code == 500)
        refused = http.post("/v1/responses", json=asked[0].question.body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "engine_down")
        for each in asked:
            each.join()
            assert each.error is None
            assert each.ended - begun < 5
            assert each.is_refused if each.status != 200 else each.is_ended
            assert "somebody" not in each.text
        until(lambda: server.server.should_exit)


def test_a_process_whose_models_fail_exits_with_an_error():
    with apart(nonce, "--slots", "2", "--steps", "20") as server:
        asked = Asked(server.url, "responses", "t" * 30, True).join()
        assert asked.is_ended
        assert server.wait() == 1
        assert "error: the models stopped working: RuntimeError" in server.said
        assert "in before_step" in server.said  # where it happened
        assert "somebody" not in server.said.replace('RuntimeError("what somebody asked")', "") + asked.text


@pytest.mark.slow
def test_where_the_models_are_killed_every_stream_says_so_and_the_process_exits_with_an_error():
    with apart(nonce, "--slots", "4", "--pause", "0.05") as server:
        asked = ask_all(server.url, "tptp")
        assert all(each.is_begun.wait(PATIENCE) for each in asked if each.question.is_streamed)
        (models,) = server.process.children()
        begun = time.monotonic()
        models.kill()
        for each in asked:
            each.join()
            assert each.error is None
            assert each.ended - begun < 5
            assert each.is_ended if each.question.is_streamed else each.is_refused
        assert server.wait() == 1
        assert "error: the models stopped working: their process was ended by SIGKILL" in server.said


@pytest.mark.slow
def test_no_models_are_left_of_a_server_that_is_killed():
    with apart(nonce, "--slots", "4", "--pause", "1000") as server:
        asked = ask_all(server.url, "t")  # in a step that does not end
        with httpx2.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            until(lambda: metric(http, "weft_running ") == 1)
        (models,) = server.process.children()
        server.process.kill()
        models.wait(PATIENCE)
        for each in asked:
            each.join()


def test_a_process_asked_to_end_under_load_ends_well():
    check_end_under_load(drain=30.0, plan="tptptp", requests=16)


@pytest.mark.slow
@pytest.mark.parametrize("drain", [30.0, 1.0])
def test_a_process_asked_to_end_under_heavy_load_ends_well(drain):
    check_end_under_load(drain=drain, plan="tptptp", requests=48)


def check_end_under_load(*, drain, plan, requests):
    arguments = ("--slots", "8", "--queue", "200", "--pause", "0.01", "--drain", str(drain))
    with apart(nonce, *arguments) as server:
        asked = [each for _ in range(requests // 4) for each in ask_all(server.url, plan)]
        with httpx2.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:
            until(lambda: metric(http, "weft_running ") + metric(http, "weft_waiting ") == len(asked))
            server.process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            until(lambda: http.get("/ready").status_code == 503)
            assert http.post("/v1/responses", json=asked[0].question.body).status_code == 503
        for each in asked:
            each.join()
            assert each.error is None
            assert each.is_whole or (drain < 30 and (each.is_ended if each.status == 200 else each.is_refused))
        assert time.monotonic() - begun < drain + 5
        assert server.wait() == 0
