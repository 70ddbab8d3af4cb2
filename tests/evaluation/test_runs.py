"""Three steps with files between them: whatever happens in between, the same records and the same summary."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.evaluation.making import answered, png, small_task, write
from weft.backbones import load_backbone
from weft.document import Document, Image, Text, user
from weft.errors import UsageError
from weft.evaluation.compare import compare
from weft.evaluation.evaluate import METRICS, EvaluationConfig
from weft.evaluation.generate import GenerationConfig, describe_model, predict
from weft.evaluation.journal import EvaluationError, Journal
from weft.evaluation.records import Prediction, from_json, picture_path, with_pictures
from weft.evaluation.run import Run
from weft.evaluation.score import ScoringConfig, score
from weft.evaluation.summary import aggregate, verify
from weft.evaluation.task import Protocol, Sample, Task, TaskConfig, choose
from weft.images import decode_image

SAMPLING = {"min_images": 1, "max_images": 2, "max_text_tokens": 5}
TASKS = {"small": small_task(sampling=SAMPLING)}
SCORING = ScoringConfig(metrics=("prose/length", "interleavedeval/v1"), judge={"port": {"kind": "rule"}})
FILES = ("run.json", "predictions.jsonl", "records.jsonl", "scoring.json", "summary.json")


@pytest.fixture(scope="module")
def nano():
    return load_backbone("nano")


def evaluate(folder, backbone, tasks=TASKS, die=lambda step: None):
    """All three steps; `die` is told of every answer and record."""
    task, config, place = choose(TaskConfig(name="small"), tasks)
    described = describe_model("nano", None, backbone, {})
    generation = GenerationConfig(slots=2, context=400)
    run = predict(folder, task, config, place, backbone, generation, described, say=lambda done, of: die("answers"))
    score(run, tasks, METRICS, SCORING, say=lambda name, done, of: die(name))
    aggregate(run, METRICS, resamples=100)
    return run


def contents(folder):
    files = [*FILES, *(f"pictures/{each.name}" for each in (folder / "pictures").iterdir())]
    return {name: (folder / name).read_bytes() for name in sorted(files)}


@pytest.fixture(scope="module")
def whole(nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    evaluate(folder, nano)
    return folder


def killed(folder, backbone, at: int) -> bool:
    """Whether a child that is killed (-9) at its `at`-th sign of life was."""
    left = at

    def die(step):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=evaluate, args=(folder, backbone), kwargs={"die": die})
    child.start()
    child.join(60)
    return child.exitcode == -signal.SIGKILL


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(nano, whole, tmp_path):
    folder, kills = tmp_path / "run", 0
    while killed(folder, nano, at=3 + kills % 4):
        kills += 1
        assert kills < 20
    assert kills >= 3
    assert contents(folder) == contents(whole)


def test_a_half_written_line_is_forgotten(nano, whole, tmp_path):
    folder = tmp_path / "run"
    assert killed(folder, nano, at=4)
    with open(folder / "predictions.jsonl", "ab") as file:
        file.write(b'{"id": "s5", "parts": [{"ty')
    evaluate(folder, nano)
    assert contents(folder) == contents(whole)


def test_a_finished_run_changes_nothing(nano, whole):
    before = contents(whole)
    evaluate(whole, nano)
    assert contents(whole) == before


def test_pictures_are_there_and_are_those_that_were_predicted(whole):
    predictions = Run(whole).read_predictions()
    assert all(each.images for each in predictions.values())
    path = whole / str(predictions["s0"].images[0].path)
    assert with_pictures(predictions["s0"], whole).images[0].data == path.read_bytes()
    changed = from_json({**predictions["s0"].to_json(), "parts": [
        {"type": "image", "image": predictions["s1"].images[0].path, "sha256": predictions["s0"].images[0].sha256 + "0"}
    ]}, "here")  # fmt: skip
    with pytest.raises(EvaluationError, match="not the one"):
        with_pictures(changed, whole)


def test_the_folder_of_another_evaluation_is_refused(nano, whole):
    task, config, place = choose(TaskConfig(name="small"), TASKS)
    other = GenerationConfig(slots=3, context=400)
    with pytest.raises(UsageError, match="slots is 2, not 3"):
        predict(whole, task, config, place, nano, other, describe_model("nano", None, nano, {}))


def test_two_processes_do_not_work_in_one_folder(nano, whole):
    with Run(whole).locked(), pytest.raises(UsageError, match="another process"):
        aggregate(Run(whole), METRICS)


def test_later_rounds_read_what_the_model_wrote_before(nano, tmp_path):
    def read(place):
        yield Sample("one", Document((user("a"),)), then=((Text("b"),), (Image(png()), Text("c"))))
        yield Sample("two", Document((user("a"),)), then=((Text("d"),),))

    tasks = {"small": Task("rounds", "", read, ("prose/length",), sampling={**SAMPLING, "max_images": 1})}
    found = evaluate(tmp_path, nano, tasks).read_predictions()
    assert (len(found["one"].images), len(found["two"].images)) == (3, 2)
    assert found["one"].parts[0].sha256 == found["two"].parts[0].sha256 if not found["one"].text else True


class Bluest:
    """In the place of CLIP."""

    def __init__(self, folder):
        pass

    def cosines(self, pictures, texts):
        return torch.tensor([[self.of(each)] for each in pictures])

    @staticmethod
    def of(picture):
        return float(np.asarray(picture, float)[..., 2].mean())


@pytest.fixture
def clip(tmp_path, monkeypatch):
    monkeypatch.setattr("weft.scorers.CLIP", Bluest)
    write(tmp_path / "clip", {"model.safetensors": b"x"})
    return tmp_path / "clip"


def captions(place):
    for i in range(3):
        yield Sample(f"c{i}", Document((user(f"caption {i}"),)), {"caption": f"caption {i}"})


def drawn_once(folder, backbone, seed):
    """Pictures by sample."""
    sampling = {"min_images": 1, "max_images": 1, "max_text_tokens": 0, "image.temperature": 1.0, "seed": seed}
    tasks = {"small": Task("one", "", captions, ("prose/length",), sampling=sampling)}
    found = evaluate(folder, backbone, tasks).read_predictions()
    return {name: with_pictures(each, folder).images[0].data for name, each in found.items()}


def test_of_several_pictures_the_one_most_like_its_caption_is_kept(nano, tmp_path, clip):
    best = Protocol(sampling={"image.temperature": 1.0}, best_of=3, facts={"real": "all"})
    sampling = {"min_images": 1, "max_images": 1, "max_text_tokens": 0, "seed": 2}
    tasks = {"small": Task("best", "", captions, ("prose/length",), sampling=sampling, protocols={"default": best})}
    task, config, place = choose(TaskConfig(name="small"), tasks)
    generation, model = GenerationConfig(slots=2, context=400, clip_l14=clip), {"name": "nano"}
    run = predict(tmp_path / "best", task, config, place, nano, generation, model)
    facts = run.facts()["generation"]
    assert (facts["best_of"], facts["chosen_by"]["name"], facts["protocol"]) == (3, "clip", {"real": "all"})
    assert facts["sampling"]["image"]["temperature"] == 1.0
    # candidate k of seed 2 is drawn from seed 3 * 2 + k
    each = [drawn_once(tmp_path / str(seed), nano, seed) for seed in (6, 7, 8)]
    kept = run.read_predictions()
    for name in ("c0", "c1", "c2"):
        wanted = max((found[name] for found in each), key=lambda data: Bluest.of(decode_image(data)))
        assert with_pictures(kept[name], run.folder).images[0].data == wanted
        assert len({found[name] for found in each}) == 3
    given = EvaluationConfig(best_of=3, slots=2, context=400, weights={"clip_l14": clip}).generation
    assert given == generation.model_copy(update={"best_of": 3})
    one = predict(tmp_path / "one", task, config, place, nano, generation.model_copy(update={"best_of": 1}), model)
    assert "best_of" not in one.facts()["generation"]
    with pytest.raises(UsageError, match="CLIP ViT-L/14, which is not given"):
        predict(tmp_path / "none", task, config, place, nano, GenerationConfig(slots=2), model)
    small, config, place = choose(TaskConfig(name="small"), TASKS)
    with pytest.raises(UsageError, match="s0 does not ask for a picture of a caption"):
        predict(tmp_path / "small", small, config, place, nano, generation.model_copy(update={"best_of": 2}), model)


def test_a_folder_that_was_killed_at_its_first_file_is_no_stranger(nano, whole, tmp_path):
    folder = tmp_path / "run"
    write(folder, {".run.json.abc.part": b"{", "pictures/.x.png.abc.part": b"x"})
    evaluate(folder, nano)
    assert contents(folder) == contents(whole)


def test_names_of_pictures_are_safe_and_distinct():
    names = ["a", "A", "../../etc", "a/b", "x" * 300, "ä"]
    paths = [picture_path(name, 1) for name in names]
    assert len({path.lower() for path in paths}) == len(names)
    assert all(path.startswith("pictures/") and "/" not in path[9:] and len(path) < 120 for path in paths)


# --- answers from elsewhere: gaps, repetitions, tampering ---


def scored(folder, answers, **more):
    config = TaskConfig(name="picturebook-story", limit=len(answers) or 1, **more)
    run = answered(folder, config, answers)
    score(run, STORIES, METRICS, ScoringConfig())
    return run


STORIES = {"picturebook-story": small_task()}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("weft.evaluation.evaluate.TASKS", STORIES)
    run = scored(tmp_path / "run", {f"s{i}": ["word " * (i + 1)] for i in range(6)})
    aggregate(run, METRICS)
    return run


def edit(file, change):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def test_a_missing_prediction_is_an_error_that_names_it(run):
    edit(run.predictions.file, lambda lines: [line for line in lines if line["id"] != "s3"])
    for step in (lambda: score(run, STORIES, METRICS, ScoringConfig()), lambda: aggregate(run, METRICS)):
        with pytest.raises(EvaluationError, match="no prediction for sample s3"):
            step()
    with pytest.raises(EvaluationError, match="s3"):
        verify(run, METRICS)


def test_a_subset_is_taken_when_it_is_asked_for_and_says_so(run):
    edit(run.predictions.file, lambda lines: lines[:4])
    score(run, STORIES, METRICS, ScoringConfig(subset=True))
    summary = aggregate(run, METRICS)
    assert (summary["n"], summary["of"], summary["subset"]) == (4, 6, True)
    assert summary["metrics"]["prose/length"]["values"]["words"]["value"] == 2.5


def test_a_missing_record_is_an_error_that_names_it(run):
    edit(run.records.file, lambda lines: lines[:-1])
    with pytest.raises(EvaluationError, match="sample s5 has no record of prose/length"):
        aggregate(run, METRICS)


def test_a_changed_prediction_is_scored_again_and_never_summed_up_before(run):
    edit(run.predictions.file, lambda lines: [
        {**line, "parts": [{"type": "text", "text": "one two three"}]} if line["id"] == "s0" else line for line in lines
    ])  # fmt: skip
    with pytest.raises(EvaluationError, match="not those that were scored"):
        aggregate(run, METRICS)
    score(run, STORIES, METRICS, ScoringConfig())
    assert run.read_records()["prose/length"]["s0"].values["words"] == 3


def test_twice_the_same_sample_is_refused(run):
    edit(run.predictions.file, lambda lines: [*lines, lines[0]])
    with pytest.raises(EvaluationError, match="s0 is predicted twice"):
        run.read_predictions()


def test_verify_names_what_does_not_follow_from_the_records(run):
    assert verify(run, METRICS) == []
    summary = json.loads(run.summary_file.read_text())
    summary["metrics"]["prose/length"]["values"]["words"]["value"] += 0.01
    run.summary_file.write_text(json.dumps(summary))
    found = verify(run, METRICS)
    assert len(found) == 1 and found[0].startswith("metrics.prose/length.values.words.value is 3.51")


def test_other_data_are_refused(run, monkeypatch):
    def read(place):
        for sample in small_task().read(place):
            yield Sample(sample.id, sample.prompt, {"number": 7})

    other = {"picturebook-story": Task("small", "", read, ("prose/length",))}
    with pytest.raises(EvaluationError, match="data are not those"):
        score(run, other, METRICS, ScoringConfig())


def test_aggregating_imports_neither_torch_nor_a_client(run):
    code = (
        "import sys; from pathlib import Path; from weft.evaluation.evaluate import reaggregate, verify_run\n"
        f"reaggregate(Path({str(run.folder)!r})); print(verify_run(Path({str(run.folder)!r})))\n"
        "print(sorted({'torch', 'transformers', 'httpx2', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[]"], done.stderr


def test_a_comparison_is_paired_and_refuses_other_data(run, tmp_path, monkeypatch):
    better = scored(tmp_path / "better", {f"s{i}": ["word " * (i + 3)] for i in range(6)})
    found = {each.value: each for each in compare(run, better, METRICS)}
    words = found["words"]
    assert (words.difference, words.low, words.high) == pytest.approx((2.0, 2.0, 2.0), abs=1e-12)
    assert words.better == "second"
    assert found["repetition"].n == 6
    same = {each.value: each for each in compare(run, run, METRICS)}["words"]
    assert (same.difference, same.better) == (0.0, "not resolved")

    def read(place):
        yield Sample("s0", Document((user("x"),)), {"number": 9})

    monkeypatch.setitem(STORIES, "picturebook-story", Task("other", "", read, ("prose/length",)))
    other = scored(tmp_path / "other", {"s0": ["word"]})
    with pytest.raises(EvaluationError, match="different data"):
        compare(run, other, METRICS)


def test_a_breakdown_by_facet_stands_beside_the_mean(run):
    summary = json.loads(run.summary_file.read_text())
    halves = summary["metrics"]["prose/length"]["by"]["half"]
    assert {name: each["words"] for name, each in halves["values"].items()} == {"low": 2.0, "high": 5.0}
    assert halves["mean"]["words"] == 3.5


def test_a_damaged_line_is_named(tmp_path):
    write(tmp_path, {"x.jsonl": '{"a": 1}\nnonsense\n{"b": 2}\n'})
    with pytest.raises(EvaluationError) as caught:
        list(Journal(tmp_path / "x.jsonl").read())
    assert caught.value.where.endswith("x.jsonl, line 2")


def test_a_last_line_that_was_not_ended_counts_if_it_is_whole(tmp_path):
    write(tmp_path, {"x.jsonl": '{"a": 1}\n{"b": 2}'})
    journal = Journal(tmp_path / "x.jsonl")
    assert list(journal.read()) == [{"a": 1}, {"b": 2}]
    journal.append([{"c": 3}])
    assert journal.file.read_text() == '{"a": 1}\n{"b": 2}\n{"c": 3}\n'
    write(tmp_path, {"x.jsonl": '{"a": 1}\n{"b": 2'})
    journal.append([{"c": 3}])
    assert journal.file.read_text() == '{"a": 1}\n{"c": 3}\n'


def test_half_a_letter_does_not_stop_a_run(run):
    text = "broken \ud83d"  # the first half of a picture of a face
    edit(run.predictions.file, lambda lines: [
        {**line, "parts": [{"type": "text", "text": text}]} if line["id"] == "s0" else line for line in lines
    ])  # fmt: skip
    score(run, STORIES, METRICS, ScoringConfig())
    aggregate(run, METRICS)
    assert run.read_records()["prose/length"]["s0"].raw == text and verify(run, METRICS) == []


def test_a_prediction_is_read_as_it_was_written():
    prediction = Prediction("a", (Text("x"), Image(b"abc", "pictures/p.png")), "hash", "length", (0.5, -1.0))
    again = from_json(json.loads(json.dumps(prediction.to_json())), "here")
    assert again.to_json() == prediction.to_json()
    with pytest.raises(EvaluationError, match="no prediction"):
        from_json({"id": "a", "parts": [{"type": "sound"}]}, "here")
