"""A judge is asked what the rubric says, once; rules where an answer lacks what is judged; failures are no scores."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.evaluation.making import SHARED, answered, png
from tests.evaluation.metrics.test_replies import READ, UNREAD, replies
from weft.document import Document, Image, Text, user
from weft.evaluation.evaluate import METRICS
from weft.evaluation.journal import EvaluationError
from weft.evaluation.judge import Judge, JudgeConfig, Question, pairwise
from weft.evaluation.judge.measure import by_rule, figures, rubric_metric
from weft.evaluation.judge.pairwise import duel
from weft.evaluation.judge.rubric import INTERLEAVED_EVAL, OPENING, RUBRICS
from weft.evaluation.metric import Answered
from weft.evaluation.records import Prediction, Record
from weft.evaluation.score import ScoringConfig, score
from weft.evaluation.summary import aggregate, verify
from weft.evaluation.task import Place, Sample, Task, TaskConfig
from weft.llm import Failure, Reply

ASPECTS = [each.name for each in INTERLEAVED_EVAL.criteria]


class Scripted:
    """Replies by a function of the request; counts what it is asked."""

    model = "scripted"

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def complete(self, requests):
        for request in requests:
            self.asked.append(request)
            said = self.reply(request)
            yield request, said if isinstance(said, Failure) else Reply(said, self.model)


def ask(reply, n=1, **more):
    port = Scripted(reply)
    judge = Judge(JudgeConfig(port={"kind": "rule"}, **more), port)
    questions = [Question(f"q{i}", ({"role": "user", "content": f"q{i}"},), "Say `Score: N`.") for i in range(n)]
    from weft.evaluation.metrics.replies import read_score

    found = judge.ask(questions, lambda text: read_score(text, decimals=judge.config.samples > 1).score)
    return {question.id: verdict for question, verdict in found}, port.asked


def test_a_reply_that_cannot_be_read_is_asked_for_again_with_the_form_named():
    verdicts, asked = ask(lambda r: "Score: 3" if len(r.messages) > 1 else "It has 4 pictures, good.")
    assert verdicts["q0"].value == 3 and len(asked) == 2
    assert asked[1].messages[1]["content"].endswith("Say `Score: N`.")
    assert verdicts["q0"].replies == ("It has 4 pictures, good.", "Score: 3")


def test_after_three_tries_a_reply_is_unparsed_not_guessed():
    verdicts, asked = ask(lambda r: "Between 2 and 4.")
    assert verdicts["q0"].value is None and len(asked) == 3
    assert len({request.key("m") for request in asked}) == 3  # or a cache would answer


def test_several_samples_give_mean_and_spread():
    replies = {0: "Score: 2", 100: "Score: 3.5", 200: "Score: 5"}
    verdicts, _ = ask(lambda r: replies[r.seed], samples=3, temperature=1.0)
    assert verdicts["q0"].value == 3.5 and verdicts["q0"].spread == pytest.approx(1.2247, abs=1e-4)
    assert verdicts["q0"].samples == (2.0, 3.5, 5.0)
    verdicts, _ = ask(lambda r: "no" if 100 <= r.seed < 200 else "Score: 2", samples=3, temperature=1.0)
    assert verdicts["q0"].samples == (2.0, None, 2.0) and verdicts["q0"].value == 2.0


def test_a_failed_request_gives_no_verdict():
    verdicts, _ = ask(lambda r: Failure("http", "500") if r.id.startswith("q1") else "Score: 1", n=3)
    assert set(verdicts) == {"q0", "q2"}


# --- rules ---


def answer(text, images, inputs, outputs, composition=False):
    parts = tuple([Text("t")] * text + [Image(png(), f"pictures/{i}.png") for i in range(images)])
    prompt = Document((user("do", *[Image(png()) for _ in range(inputs)]),))
    sample = Sample("a", prompt, {"outputs": list(outputs)})
    return Answered(sample, Prediction("a", parts), Place(None, "", ""), None)


@pytest.mark.parametrize(
    "text, images, inputs, outputs, wanted",
    [
        (1, 2, 1, ("text", "image"), [None] * 5),
        (1, 0, 1, ("text", "image"), [None, "by_rule", "by_rule", "by_rule", None]),
        (0, 2, 0, ("text", "image"), ["by_rule", None, None, "by_rule", None]),
        (0, 0, 1, ("text", "image"), ["by_rule"] * 5),
        (1, 1, 1, ("image",), ["not_applicable", None, None, "not_applicable", None]),
        (0, 0, 0, ("image",), ["not_applicable", "by_rule", "by_rule", "not_applicable", "by_rule"]),
        (1, 0, 0, ("text",), [None, "not_applicable", "not_applicable", "not_applicable", None]),
        (1, 1, 0, ("text", "image"), [None, None, "alone", None, None]),
    ],
)
@pytest.mark.parametrize("single", ["ask", "not_applicable"])
def test_rules_for_missing_parts(text, images, inputs, outputs, wanted, single):
    judge = Judge(JudgeConfig(port={"kind": "rule"}, single_image=single), Scripted(lambda r: ""))
    asked = answer(text, images, inputs, outputs)
    alone = None if single == "ask" else "not_applicable"
    wanted = [alone if each == "alone" else each for each in wanted]
    assert [by_rule(criterion, asked, judge) for criterion in INTERLEAVED_EVAL.criteria] == wanted


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_the_published_average_column_is_the_mean_of_the_aspects():
    table = json.loads((SHARED / "interleavedeval_tables/tables.json").read_text())
    for _, *aspects, average in table["interleavedbench_full_gpt4o_0_5"]:
        records = [Record("m", "a", dict(zip(ASPECTS, aspects, strict=True)), extra={"words": 1})]
        assert round(figures(INTERLEAVED_EVAL)(records)["overall"], 2) == average


def test_an_average_of_fewer_aspects_is_not_called_the_average():
    edit = Record("m", "a", dict(zip(ASPECTS, [None, 3.0, 2.0, None, 1.0], strict=True)), extra={"words": 0})
    assert figures(INTERLEAVED_EVAL)([edit]) == {"perceptual_quality": 3, "image_coherence": 2, "helpfulness": 1}


def test_opening_averages_rounded_means():
    names = [each.name for each in OPENING.criteria]
    thirds = [
        Record("m", str(i), {names[0]: [1.0, 8.0, 8.0][i], **dict.fromkeys(names[1:], [7.0, 8.0, 8.0][i])},
               extra={"words": 1})
        for i in range(3)
    ]  # fmt: skip
    assert figures(OPENING)(thirds)["overall"] == pytest.approx((5.67 + 6 * 7.67) / 7, abs=1e-12)


# --- length ---


def told(scores_by_words, status=None):
    return [
        Record("m", str(i), dict.fromkeys(ASPECTS, score), status=status or {}, extra={"words": words})
        for i, (words, score) in enumerate(scores_by_words)
    ]


def test_a_judge_that_likes_length_is_told_by_the_score_at_equal_length():
    # one more point for each doubling: the same judgement of a short writer and of a long one
    short = figures(INTERLEAVED_EVAL)(told([(32, 1.0), (64, 2.0), (128, 3.0), (64, 2.0)]))
    long = figures(INTERLEAVED_EVAL)(told([(128, 3.0), (256, 4.0), (512, 5.0), (256, 4.0)]))
    assert (short["text_quality"], long["text_quality"]) == (2.0, 4.0)
    for each in (short, long):
        assert each["text_quality_at_128_words"] == pytest.approx(3.0)
        assert each["helpfulness_per_doubling"] == pytest.approx(1.0)
        assert "image_coherence_at_128_words" not in each


@pytest.mark.parametrize(
    "records",
    [
        told([(8, 1.0), (16, 2.0), (32, 3.0)]),  # none as long
        told([(200, 1.0), (300, 2.0), (400, 3.0)]),
        told([(128, 1.0), (128, 2.0), (128, 3.0)]),
        told([(64, 1.0), (256, 2.0)]),
        told([(64, 1.0), (0, 0.0), (256, 2.0)]),
        told([(64, 0.0), (128, 0.0), (256, 0.0)], dict.fromkeys(ASPECTS, "by_rule")),
    ],
)
def test_no_score_at_a_length_that_no_answers_stand_around(records):
    found = figures(INTERLEAVED_EVAL)(records)
    assert found["overall"] >= 0 and not [name for name in found if "words" in name or "doubling" in name]


def test_rubrics_are_data_with_their_own_scales():
    assert [len(each.criteria) for each in RUBRICS.values()] == [5, 7, 5]
    assert (OPENING.low, OPENING.high) == (0, 10)
    system = OPENING.system(OPENING.criteria[:1])
    assert "Correctness" in system and "whole number from 0 to 10" in system
    assert rubric_metric(OPENING).judged


# --- the whole way, over HTTP ---

ANSWERS = {
    "s0": ["Once.", png("blue"), "Twice.", png("green")],
    "s1": ["Only text."],
    "s2": [],
    "s3": [png("pink", (900, 300))],
}


def read(place):
    for i in range(4):
        prompt = Document((user("Tell ", Image(png()), f"story {i}"),))
        yield Sample(f"s{i}", prompt, {"outputs": ["text", "image"]}, facets={"use case": "story"})


TASKS = {"stories": Task("stories", "", read, ("interleavedeval/v1", "prose/length"))}


class Server(ThreadingHTTPServer):
    """A chat model that scores by what it is asked, and fails when it is told to."""

    def __init__(self):
        self.bodies, self.failing, self.lock = [], False, threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
        text = "" if self.server.failing else f"I see 2 of 5 things.\nScore: {self.score(body)}"
        reply = {"model": "gpt-4o", "choices": [{"message": {"content": text}}], "usage": {"total_tokens": 9}}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def score(self, body):
        return 4 if "Text quality" in body["messages"][0]["content"] else 2

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("weft.evaluation.evaluate.TASKS", TASKS)
    return answered(tmp_path / "run", TaskConfig(name="stories"), ANSWERS)


def settings(server, **more):
    port = {"kind": "http", "base_url": f"http://127.0.0.1:{server.server_port}/v1", "model": "gpt-4o", "attempts": 1}
    return ScoringConfig(judge={"port": port, **more})


def test_an_interleaved_task_from_answers_to_summary(run, server):
    assert score(run, TASKS, METRICS, settings(server)) == {}
    summary = aggregate(run, METRICS)
    cells = summary["metrics"]["interleavedeval/v1/gpt-4o"]["values"]
    assert cells["text_quality"]["value"] == (4 + 4 + 0 + 0) / 4 and cells["text_quality"]["by_rule"] == 2
    assert cells["perceptual_quality"]["value"] == (2 + 0 + 0 + 2) / 4
    assert cells["text_image_coherence"]["value"] == 2 / 4 and cells["text_image_coherence"]["by_rule"] == 3
    assert cells["helpfulness"]["value"] == (2 + 2 + 0 + 2) / 4
    assert cells["overall"]["value"] == pytest.approx((2 + 1 + 1 + 0.5 + 1.5) / 5)
    assert {"low", "high"} <= set(cells["overall"]) and summary["empty"] == 1
    assert summary["metrics"]["prose/length"]["values"]["words"]["n"] == 4
    assert [r.extra["words"] for r in run.read_records()["interleavedeval/v1/gpt-4o"].values()] == [2, 2, 0, 0]
    assert len(server.bodies) == 5 + 2 + 0 + 3  # one for each aspect that no rule decides
    replies = run.read_records()["interleavedeval/v1/gpt-4o"]["s0"].extra["replies"]
    assert replies["text_quality"] == ["I see 2 of 5 things.\nScore: 4"]
    assert verify(run, METRICS) == []


def test_a_request_shows_instruction_and_output_with_named_pictures_in_their_places(run, server):
    score(run, TASKS, METRICS, settings(server))
    body = next(b for b in server.bodies if len(b["messages"][1]["content"]) == 12)
    parts = body["messages"][1]["content"]
    told = [part["text"] if part["type"] == "text" else "[picture]" for part in parts]
    assert told == ["### Instruction", "Tell ", "input image 1", "[picture]", "story 0", "### Output", "Once.",
                    "output image 1", "[picture]", "Twice.", "output image 2", "[picture]"]  # fmt: skip
    assert parts[3]["image_url"]["url"].startswith("data:image/png;base64,")
    assert body["temperature"] == 0


def test_all_aspects_of_an_answer_in_one_request(run, server, monkeypatch):
    def together(self, body):
        system = body["messages"][0]["content"]
        titles = [line[len("Aspect: ") :].split(".")[0] for line in system.splitlines() if line.startswith("Aspect: ")]
        return "\n".join(["-", *(f"Score ({title}): {min(5, len(title) // 4)}" for title in titles)])

    monkeypatch.setattr(Handler, "score", together)
    score(run, TASKS, METRICS, settings(server, together=True))
    assert len(server.bodies) == 3  # the fourth answer is empty
    records = run.read_records()["interleavedeval/v1/gpt-4o-together"]
    lengths = [len(each.title) // 4 for each in INTERLEAVED_EVAL.criteria]
    assert list(records["s0"].values.values()) == lengths
    # of an answer without pictures only two aspects are left to ask about
    assert list(records["s1"].values.values()) == [lengths[0], 0, 0, 0, lengths[4]]
    asked = sorted(body["messages"][0]["content"].count("Aspect: ") for body in server.bodies)
    assert asked == [2, 3, 5]


def test_pictures_are_sent_no_larger_than_said(run, server):
    import base64
    import io

    from PIL import Image as PILImage

    score(run, TASKS, METRICS, settings(server, image_side=100, image_format="jpeg"))
    sizes = set()
    for body in server.bodies:
        for part in body["messages"][1]["content"]:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
                sizes.add(PILImage.open(io.BytesIO(data)).size)
    assert sizes == {(16, 12), (100, 33)}


def test_nothing_is_asked_twice_and_a_replay_needs_no_server(run, server, tmp_path):
    score(run, TASKS, METRICS, settings(server))
    n, records = len(server.bodies), run.records.file.read_bytes()
    run.records.file.unlink()  # as if it had been lost
    score(run, TASKS, METRICS, settings(server))
    assert len(server.bodies) == n and run.records.file.read_bytes() == records
    stored = {"kind": "replay", "file": str(run.folder / "judge.jsonl"), "model": "gpt-4o"}
    run.records.file.unlink()
    score(run, TASKS, METRICS, ScoringConfig(judge={"port": stored}))
    assert len(server.bodies) == n and run.records.file.read_bytes() == records


def test_empty_replies_are_failures_that_no_cache_keeps(run, server):
    server.failing = True
    with pytest.raises(EvaluationError, match="gave nothing for 3 answers, the first s0"):
        score(run, TASKS, METRICS, settings(server))
    kept = run.folder / "judge.jsonl"
    assert not kept.is_file() or kept.read_text() == ""
    assert set(run.read_records()["interleavedeval/v1/gpt-4o"]) == {"s2"}  # which no judge was asked about
    server.failing = False
    score(run, TASKS, METRICS, settings(server))
    assert aggregate(run, METRICS)["metrics"]["interleavedeval/v1/gpt-4o"]["n"] == 4


def test_unparsed_replies_are_counted_left_out_and_make_a_number_invalid(run, server, monkeypatch):
    monkeypatch.setattr(Handler, "score", lambda self, body: "high")
    score(run, TASKS, METRICS, settings(server))
    found = aggregate(run, METRICS)["metrics"]["interleavedeval/v1/gpt-4o"]
    assert found["valid"] is False and found["unparsed"] == 3
    assert found["values"]["text_quality"]["value"] == 0 and found["values"]["text_quality"]["unparsed"] == 2


ODD = {
    "read": ("json quotes a score line", "fenced json", "said twice, last counts", "quoted afterwards", "out of five",
             "of five", "share in words", "bold number alone", "nested json", "reason in the same line"),
    "unread": ("prose with numbers", "a range", "two minds", "another scale", "outside", "decimal", "two shares",
               "share of the pictures", "json, two scores", "date"),
}  # fmt: skip


def test_a_thousand_replies_in_twenty_shapes_are_records_of_what_they_say(tmp_path, monkeypatch):
    said = [
        *replies({name: READ[name] for name in ODD["read"]}, 50, seed=2),
        *((name, text, None) for name, text, _ in replies({each: UNREAD[each] for each in ODD["unread"]}, 50, seed=3)),
    ]
    by_id = {f"a{i:04d}": reply for i, reply in enumerate(said)}
    assert len(by_id) == 1000 and len({name for name, _, _ in said}) == 20

    def read_all(place):
        for name in by_id:
            yield Sample(name, Document((user("do"),)), {"outputs": []})  # helpfulness is all that applies

    tasks = {"thousand": Task("", "", read_all, ("interleavedeval/v1",))}
    monkeypatch.setattr("weft.evaluation.evaluate.TASKS", tasks)
    port = Scripted(lambda request: by_id[request.id.partition("\0")[0]][1])
    monkeypatch.setattr(Judge, "open", lambda config, cache: Judge(config, port))
    run = answered(tmp_path, TaskConfig(name="thousand"), {name: ["Text."] for name in by_id})
    score(run, tasks, METRICS, ScoringConfig(judge={"port": {"kind": "rule"}}))
    for name, record in run.read_records()["interleavedeval/v1/scripted"].items():
        shape, text, n = by_id[name]
        assert record.values["helpfulness"] == n, (shape, text)
        assert record.status.get("helpfulness") == ("unparsed" if n is None else None), (shape, text)
    cell = aggregate(run, METRICS, resamples=10)["metrics"]["interleavedeval/v1/scripted"]
    assert cell["values"]["helpfulness"]["n"] == 500 and cell["values"]["helpfulness"]["unparsed"] == 500
    assert cell["values"]["helpfulness"]["value"] == sum(n for _, _, n in said if n is not None) / 500
    assert cell["valid"] is False and len(port.asked) == 500 + 3 * 500


def test_length_and_repetition_come_with_every_judged_score(run, server):
    only = ScoringConfig(judge=settings(server).judge, metrics=("interleavedeval/v1",))
    score(run, TASKS, METRICS, only)
    found = aggregate(run, METRICS)["metrics"]
    assert {"words", "repetition"} <= set(found["prose/length"]["values"])
    assert set(run.read_records()["prose/length"]) == set(ANSWERS)
    assert {name for name, row in METRICS.items() if row.judged and row.beside != ("prose/length",)} == set()


def test_without_a_judge_the_metric_is_skipped_and_says_so(run):
    assert "no judge is given" in score(run, TASKS, METRICS, ScoringConfig())["interleavedeval/v1"]
    summary = aggregate(run, METRICS)
    assert list(summary["metrics"]) == ["prose/length"] and "interleavedeval/v1" in summary["skipped"]


# --- which of two is better ---


def duels(run, tmp_path, server):
    other = answered(tmp_path / "other", TaskConfig(name="stories"), {**ANSWERS, "s1": ["Only text, and longer."]})
    return duel(run, other, TASKS, settings(server).judge, tmp_path / "duel")


def winner(by):
    def score(self, body):
        told = [part.get("text", "") for part in body["messages"][1]["content"]]
        return f"7\nWinner: {by(told.index('### Answer A') < told.index('### Answer B'), ' '.join(told))}"

    return score


def test_a_judge_that_always_prefers_one_place_decides_nothing(run, server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "score", winner(lambda a_first, text: "A"))
    found = duels(run, tmp_path, server)
    assert found["verdicts"] == {"A": 0, "B": 0, "Tie(A)": 0, "Tie(B)": 0, "Tie": 4}
    assert found["flipped"]["value"] == 1.0 and found["first_wins"]["half"] == 0.5 and found["n"] == 4


def test_a_judge_that_prefers_an_answer_is_heard_and_asked_twice_once(run, server, tmp_path, monkeypatch):
    def by(a_first, text):
        at = text.find("longer")
        return "Tie(A)" if at < 0 else "A" if at < text.index("### Answer B") else "B"

    monkeypatch.setattr(Handler, "score", winner(by))
    found = duels(run, tmp_path, server)
    assert found["verdicts"]["B"] == 1 and found["verdicts"]["Tie"] == 3
    assert found["words"] == {"first": 1.0, "second": 1.5} and found["repetition"] == {"first": 0.0, "second": 0.0}
    assert len(server.bodies) == 2 + 3  # answers that are the same make the same request in both orders
    assert duels(run, tmp_path, server) == found and len(server.bodies) == 5
    rows = [json.loads(line) for line in (tmp_path / "duel/duels.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["s0", "s1", "s2", "s3"]
    assert (rows[1]["shown"], rows[1]["swapped"], rows[1]["verdict"]) == ("B", "A", "B")


def row(name, verdict, words):
    return {"id": name, "verdict": verdict, "shown": verdict, "swapped": verdict, "words": words, "repetition": (0, 0)}


def test_wins_that_are_only_longer_texts_are_gone_at_equal_length():
    longer_wins = [row(str(i), "A" if i % 3 else "B", (100, 50) if i % 3 else (50, 100)) for i in range(60)]
    found = pairwise.summarise(longer_wins)
    assert found["first_wins"]["half"] == pytest.approx(2 / 3)
    assert found["first_at_equal_length"]["value"] == pytest.approx(0.5, abs=0.01)
    better = [row(str(i), "A", (100, 50) if i % 3 else (50, 100)) for i in range(60)]
    assert pairwise.summarise(better)["first_at_equal_length"]["value"] == pytest.approx(1.0)
    always_longer = [row(str(i), "A", (100, 50 + i)) for i in range(9)]
    assert pairwise.summarise(always_longer)["first_at_equal_length"] is None


def test_verdicts_that_cannot_be_read_are_counted(run, server, tmp_path):
    found = duels(run, tmp_path, server)  # this server gives scores
    assert found["unparsed"] == 4 and found["n"] == 0 and found["first_of_decided"] is None
