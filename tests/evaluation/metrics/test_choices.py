"""Which option a reply names: MMMU's parser and MMBench's, slips included."""

import json
import random
from pathlib import Path

import pytest

from weft.errors import UsageError
from weft.evaluation.metrics.choices import (
    Choice,
    Question,
    Row,
    infer_letter,
    mmbench,
    mmmu,
    open_is_right,
    parse_choice,
    parse_open,
    prefix_letter,
)

SHARED = Path(__file__).parents[4] / "shared" / "data" / "eval"
known = pytest.mark.skipif(not SHARED.is_dir(), reason="the known answers are not here")
OPTIONS = {"A": "a red bus", "B": "a blue car", "C": "two dogs", "D": "nothing"}


@known
def test_mmmu_known_answers():
    items = json.loads((SHARED / "mmmu_val" / "responses.json").read_text())
    expected = json.loads((SHARED / "mmmu_val" / "expected.json").read_text())
    questions = []
    for each in items:
        answers = each["answer"] if isinstance(each["answer"], list) else [each["answer"]]
        questions.append(Question(each.get("index2ans") or {}, tuple(answers)))
    result = mmmu([each["response"] for each in items], questions)
    for item, prediction, right in zip(items, result.predictions, result.accuracy.per_sample, strict=True):
        theirs = expected["parsed"][item["id"]]
        if isinstance(prediction, Choice):
            assert prediction.letter == theirs
        else:
            assert prediction == frozenset(theirs)
        assert ("Correct" if right else "Wrong") == expected["judge_where_not_random"][item["id"]]
    assert result.drawn == expected["n_random_fallback"]
    assert sum(result.without_drawn.per_sample) == expected["n_correct_excluding_random"]


@pytest.mark.parametrize(
    "reply, letter",
    [
        ("A", "A"), ("B.", "B"), ("(C)", "C"), ("I say (A), no, (B).", "B"), ("It is A or D", "D"),
        ("(A) but then B", "A"),
        ("well, it is a blue car", "B"), ("a red bus, then two dogs, I think", "C"), ("'D'", "D"),
    ],
)  # fmt: skip
def test_mmmu_letters(reply, letter):
    assert parse_choice(reply, OPTIONS, random.Random(0)) == Choice(letter, random=False)


@pytest.mark.parametrize("reply", ["", "two dogs", "b", "A,.", "no idea at all, I am afraid"])
def test_what_mmmu_cannot_parse_is_drawn_and_said_to_be(reply):
    assert parse_choice(reply, OPTIONS, random.Random(0)).random


def test_drawn_answers_follow_the_seed_and_the_order_of_questions():
    questions = [Question(OPTIONS, ("A",))] * 40
    replies = ["hm"] * 40
    first = mmmu(replies, questions)
    draw = random.Random(42)
    assert [p.letter for p in first.predictions] == [draw.choice("ABCD") for _ in range(40)]
    assert mmmu(replies, questions, seed=1).predictions != first.predictions
    assert first.drawn == 40 and first.without_drawn.value == 0 < first.accuracy.value


@pytest.mark.parametrize(
    "reply, found",
    [
        ("5", {5.0}), ("1,234.567", {1234.57, 1234.0, 234.57}), ("The answer is 3.14159 V.", {"3.14159 v", 3.14}),
        ("So it is 2e3", {2000.0, 3.0}), ("x = 7\ny = 8", {8.0}), ("b", {" b", "b "}), ("It is A.\nNo", {"a."}),
        ("so = is", {"is"}), ("The result is. Then 5", {"is. then 5", 5.0}),
    ],
)  # fmt: skip
def test_mmmu_open_answers(reply, found):
    assert parse_open(reply) == found


def test_mmmu_open_verdicts():
    assert open_is_right(parse_open("The answer is 24 watts"), ["24"])
    assert open_is_right(parse_open("it is a red bus"), ["Red Bus"])
    assert not open_is_right(parse_open("it is 2.5"), ["24"])
    assert not open_is_right(parse_open("about"), ["b"]), "a single letter is not found inside a word"
    assert open_is_right(parse_open("plan b"), ["b"])
    assert open_is_right(parse_open("12"), ["11", "12"])


@known
def test_mmbench_known_answers():
    items = json.loads((SHARED / "mmbench_circular" / "input.json").read_text())
    expected = json.loads((SHARED / "mmbench_circular" / "expected.json").read_text())
    rows = [Row(each["index"], each["options"], each["answer"]) for each in items]
    result = mmbench([each["prediction"] for each in items], rows)
    assert list(result.letters) == expected["parsed"]
    assert result.circular.value == expected["circular_accuracy"]
    assert result.rows.value == expected["vanilla_accuracy_all_rows"]
    assert result.first.value == expected["vanilla_accuracy_first_rotation"]
    hits = dict(zip(map(str, result.questions), result.circular.per_sample, strict=True))
    assert hits == expected["circular_hit"]
    assert result.unparsed == expected["parsed"].count(None)


@pytest.mark.parametrize(
    "reply, letter",
    [
        ("B", "B"), ("(B).", "B"), ("**B**: a blue car", "B"), ("A good bus", "A"), ("B or C", None),
        ("The answer is B, because of the colour of the thing in the middle", "B"),
        ("B is what I would say after some thought", None), ("The answer is cats", "C"), ("I see two dogs", "C"),
        ("B is my guess", "B"),
        ("a red bus and a blue car", None), ("a red bus " * 20, None), ("Z", "Z"), ("", None),
        ("I can't process this file.", "Z"), ("Failed to obtain answer via API B", None),
    ],
)  # fmt: skip
def test_mmbench_letters(reply, letter):
    assert infer_letter(reply, OPTIONS) == letter


def test_the_letter_at_the_start():
    assert [prefix_letter(r, OPTIONS) for r in ("B. a car", "(C) dogs", " D", "Both", "E", "a", "A1")] == [
        "B", "C", "D", None, None, None, None,
    ]  # fmt: skip


def test_a_question_counts_only_if_every_rotation_is_right():
    rows = [Row(i * 1_000_000 + q, OPTIONS, "A") for q in (7, 3) for i in range(2)]
    result = mmbench(["A", "A", "A", "B"], rows)
    assert result.questions == (3, 7)
    assert result.circular.per_sample == (0.0, 1.0)
    assert (result.rows.value, result.first.value) == (0.75, 1.0)


def test_a_rotation_given_twice_is_refused():
    with pytest.raises(UsageError, match="row 3 is there twice"):
        mmbench(["A", "A"], [Row(3, OPTIONS, "A")] * 2)
