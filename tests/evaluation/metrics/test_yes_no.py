"""POPE and MME: how yes and no are read, and what is made of them."""

import json
from pathlib import Path

import pytest

from weft.errors import UsageError
from weft.evaluation.metrics.yes_no import (
    COGNITION,
    PERCEPTION,
    POPE_SPLITS,
    MmeQuestion,
    mme,
    pope,
    pope_mean,
    read_mme,
    read_pope,
)

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "pope"


@pytest.mark.skipif(not DATA.is_dir(), reason="the known answers are not here")
def test_pope_known_answers():
    items = json.loads((DATA / "input.json").read_text())
    expected = json.loads((DATA / "expected.json").read_text())
    found = pope([each["answer"] for each in items], [each["label"] for each in items])
    assert (found.true_yes, found.false_yes) == (expected["TP"], expected["FP"])
    assert (found.true_no, found.false_no) == (expected["TN"], expected["FN"])
    assert found.figures == {
        "accuracy" if name == "acc" else name: expected[name]
        for name in ("acc", "precision", "recall", "f1", "yes_ratio")
    }
    assert found.figures["accuracy"] == found.accuracy.value


@pytest.mark.parametrize(
    "reply, answer",
    [
        ("No", "no"), ("no, there is", "no"), ("It is not", "no"), ("Yes. No.", "yes"), ("NO", "yes"), ("none", "yes"),
        ("It isn't", "yes"), ("", "yes"), ("Nothing", "yes"), ("well,no", "yes"), ("no\n", "yes"),
    ],
)  # fmt: skip
def test_pope_hears_no_only_in_three_words(reply, answer):
    assert read_pope(reply) == answer


def test_pope_of_one_kind_of_answer_only():
    found = pope(["no", "no"], ["yes", "no"])
    assert found.figures == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}


def test_pope_mean_is_of_the_three_splits():
    right, wrong = pope(["yes", "no"], ["yes", "no"]).figures, pope(["no", "yes"], ["yes", "no"]).figures
    means = pope_mean(dict(zip(POPE_SPLITS, (right, right, wrong), strict=True)))
    assert means["accuracy"] == means["f1"] == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match="random, popular"):
        pope_mean({"random": right})


@pytest.mark.parametrize(
    "reply, answer",
    [
        ("Yes", "yes"), ("no.", "no"), ("YES!", "yes"), ("know it", "no"), ("not so", "no"), (" yes", "yes"),
        ("  yes", "other"), ("Sure", "other"), ("I say no", "other"), ("", "other"), ("noyes", "no"),
    ],
)  # fmt: skip
def test_mme_looks_at_four_characters(reply, answer):
    assert read_mme(reply) == answer


def test_mme_scores():
    questions = [MmeQuestion("count", image, answer) for image in ("a", "b") for answer in ("yes", "no")]
    task = mme(["yes", "no", "yes", "hm"], questions).tasks["count"]
    assert (task.accuracy.value, task.both.value, task.other) == (0.75, 0.5, 1)
    assert task.score == 125


def test_mme_sums_need_all_their_tasks():
    def answered(names):
        questions = [MmeQuestion(task, "a", answer) for task in names for answer in ("yes", "no")]
        return mme(["yes", "no"] * len(names), questions)

    assert answered(PERCEPTION).perception == 2000
    assert answered(COGNITION).cognition == 800
    assert answered(PERCEPTION).cognition is None
    assert answered(PERCEPTION[1:]).perception is None


def test_mme_refuses_what_it_cannot_score():
    with pytest.raises(UsageError, match="1 questions instead of two"):
        mme(["yes"], [MmeQuestion("count", "a", "yes")])
    with pytest.raises(UsageError, match="no task 'taste'"):
        mme(["yes"], [MmeQuestion("taste", "a", "yes")])
