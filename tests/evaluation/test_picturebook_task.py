"""Stories are scored by what was asked, not by what looks right."""

import json
import random

import pytest

from weft.data.sources.picturebook import Reader, draw, is_held_out, random_story
from weft.document import Image, Text
from weft.errors import UsageError
from weft.evaluation import demo
from weft.evaluation.demo import run_demo
from weft.evaluation.interval import Share, share
from weft.evaluation.report import Arm, render
from weft.evaluation.tasks.picturebook import held_out_stories, score_story, summarise
from weft.images import encode_png


@pytest.fixture(scope="module")
def reader():
    return Reader()


def perfect(story):
    parts = []
    for sentence, scene in zip(story.sentences(), story.scenes, strict=True):
        parts += [Text(sentence), Image(encode_png(draw(scene)))]
    return parts


def story(seed=0):
    return random_story(random.Random(seed))


def test_a_perfect_answer_scores_everything(reader):
    for seed in range(5):
        score = score_story(story(seed), perfect(story(seed)), True, reader)
        assert score.wellformed and all(score.pictures) and all(score.sentences) and score.seen == story(seed).scenes


@pytest.mark.parametrize(
    "change,wellformed,pictures,sentences",
    [
        (lambda p: p[:-1], False, (True, True, False), (True, True, True)),
        (lambda p: [], False, (False,) * 3, (False,) * 3),
        (lambda p: [*p, p[0]], False, (True,) * 3, (True,) * 3),
        (lambda p: [p[0], p[3], p[2], p[1], *p[4:]], True, (False, False, True), (True,) * 3),
        (lambda p: [p[1], p[0], *p[2:]], False, (True,) * 3, (True,) * 3),
        (lambda p: [Text("once there was a dragon."), *p[1:]], True, (True,) * 3, (False, True, True)),
    ],
    ids=["last picture missing", "empty", "one part too many", "pictures swapped", "picture first", "other sentence"],
)
def test_what_is_wrong_is_counted_where_it_is_wrong(reader, change, wellformed, pictures, sentences):
    score = score_story(story(), change(perfect(story())), True, reader)
    assert (score.wellformed, score.pictures, score.sentences) == (wellformed, pictures, sentences)


def test_an_answer_that_did_not_end_by_itself_is_not_well_formed(reader):
    score = score_story(story(), perfect(story()), False, reader)
    assert not score.wellformed and all(score.pictures)


def test_held_out_stories_are_fixed_and_start_with_scenes_that_no_training_data_shows():
    stories = held_out_stories(40)
    assert stories == held_out_stories(40) and all(is_held_out(story.scenes[0]) for story in stories)
    assert len({story.instruction() for story in stories}) == 40


@pytest.mark.parametrize(
    "hits,n,low,high", [(0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (5, 10, 0.237, 0.763), (93, 100, 0.863, 0.966)]
)
def test_wilson_intervals_against_published_values(hits, n, low, high):
    assert Share(hits, n).interval == pytest.approx((low, high), abs=1e-3)


def test_the_report_shows_every_model_and_escapes_what_models_write(reader):
    stories = [story(1), story(2)]
    hostile = [[Text("<script>alert(1)</script>"), *perfect(s)[1:]] for s in stories]
    arms = []
    for name, answers in (("base", [[], []]), ("moss", hostile)):
        scores = [score_story(s, parts, True, reader) for s, parts in zip(stories, answers, strict=True)]
        metrics = [{"step": 1, "text_loss": 2.0, "image_loss": 3.0}, {"step": 2, "text_loss": 1.0, "image_loss": 2.0}]
        arms.append(Arm(name, 7, answers, scores, summarise(scores), metrics if name == "moss" else []))
    page = render(arms, stories, title="T & T", summary="S", facts={"time": "1 s"})
    assert "<script>" not in page and "&lt;script&gt;" in page and "T &amp; T" in page
    assert page.count('<img src="data:image/png;base64,') == 6 and "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert page == render(arms, stories, title="T & T", summary="S", facts={"time": "1 s"}), (
        "the same input, the same page"
    )


def test_share_counts():
    assert share([True, False, True]) == Share(2, 3) and Share(2, 3).to_json()["n"] == 3


@pytest.mark.parametrize("wrong", ["steps", "stories", "threads"])
def test_a_demo_of_nothing_is_refused_before_it_starts(wrong, tmp_path):
    numbers = {"steps": 1, "stories": 1, "threads": 1} | {wrong: 0}
    with pytest.raises(UsageError, match=f"--{wrong}"):
        run_demo(tmp_path / "demo", **numbers, say=print)
    assert not (tmp_path / "demo").exists()


def test_a_short_demo_runs_whole_and_says_what_it_reused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAINING_STORIES", 8)
    monkeypatch.setattr(demo, "SLOTS", 2)
    monkeypatch.setattr(demo, "CONTEXT", 128)  # what is written ends early
    for reused in ([], ["lora", "moss"]):
        result = run_demo(tmp_path, steps=1, stories=2, threads=1, say=lambda line, *, done=False: None)
        assert list(result["models"]) == ["base", "lora", "moss"] and result["reused"] == reused
        assert json.loads((tmp_path / "report.json").read_text()) == result
        assert (tmp_path / "report.html").read_text().count('class="story"') == 2
