"""Accuracies of answers, with every slip of the evaluators that published numbers have."""

import json
from pathlib import Path

import pytest

from weft.errors import UsageError
from weft.evaluation.metrics.vqa import (
    CONTRACTIONS,
    CURLY_CONTRACTIONS,
    by_group,
    extract_answer,
    gqa_accuracy,
    normalise,
    vizwiz_accuracy,
    vqa_accuracy,
)

SHARED = Path(__file__).parents[4] / "shared" / "data" / "eval"
known = pytest.mark.skipif(not SHARED.is_dir(), reason="the known answers are not here")


def read(folder):
    annotations = json.loads((SHARED / folder / "annotations.json").read_text())
    said = {
        each["question_id"]: each["answer"] for each in json.loads((SHARED / folder / "predictions.json").read_text())
    }
    expected = json.loads((SHARED / folder / "expected.json").read_text())
    return annotations, [said[each["question_id"]] for each in annotations], expected


@known
def test_textvqa():
    annotations, said, expected = read("vqa_textvqa")
    scores = vqa_accuracy(said, [each["answers"] for each in annotations])
    assert round(100 * scores.value, 2) == expected["overall"]
    each = {str(a["question_id"]): round(100 * v, 2) for a, v in zip(annotations, scores.per_sample, strict=True)}
    assert each == expected["per_question"]
    types = by_group(scores, [each["question_type"] for each in annotations])
    assert {name: round(100 * s.value, 2) for name, s in types.items()} == expected["perQuestionType"]


@known
def test_vizwiz():
    annotations, said, expected = read("vqa_vizwiz")
    scores = vizwiz_accuracy(said, [[person["answer"] for person in each["answers"]] for each in annotations])
    theirs = expected["vizwiz_evaluator"]
    assert round(100 * scores.value, 2) == theirs["overall"]
    each = {a["image"]: round(100 * v, 2) for a, v in zip(annotations, scores.per_sample, strict=True)}
    assert each == theirs["per_image"]
    types = by_group(scores, [each["answer_type"] for each in annotations])
    assert {name: round(100 * s.value, 2) for name, s in types.items()} == theirs["perAnswerType"]


@known
@pytest.mark.parametrize(
    "identify, name",
    [(False, "vqav2_evaluator_on_this_file_no_answer_id"), (True, "vqav2_evaluator_after_adding_answer_id_1_to_10")],
)
def test_answers_without_ids_vanish_together_unless_they_are_told_apart(identify, name):
    annotations, said, expected = read("vqa_vizwiz")
    scores = vqa_accuracy(said, [each["answers"] for each in annotations], identify=identify)
    assert round(100 * scores.value, 2) == expected[name]["overall"]


def accuracy(said, *people):
    return vqa_accuracy([said], [people]).value


def test_an_answer_is_as_right_as_a_third_of_those_who_agree():
    for agree, value in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)):
        assert accuracy("cat", *["cat"] * agree, *["dog"] * (10 - agree)) == pytest.approx(value)


def test_strings_are_compared_as_they_are_where_all_people_agree():
    assert accuracy("Yes.", *["yes"] * 10) == 0
    assert accuracy("Yes.", *["yes"] * 9, "no") == 1
    assert accuracy(" yes\n", *["yes\t"] * 10) == 1


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Two dogs", "2 dogs"), ("none", "0"), ("an apple a day", "apple day"), ("black-white", "black white"),
        ("black -white", "black white"), ("black- white", "black white"), ("a-b c- d", "ab c d"),
        ("b;-b c-d", "b b c d"),
        ("1,000-2,000", "10002000"), ("3.5", "3.5"), ("u.s.a.", "usa"), ("v.2", "v.2"), ("what?", "what"),
        ("dont", "don't"), ("wouldntve", "wouldntve"), ("wouldnt've", "wouldn't've"), ("wouldn'tve", "wouldn't've"),
        ("somebody'd", "somebodyd"), ("ow's'at", "'ow's'at"), ("Im", "im"), ("Id've", "id've"), ("let's", "let's"),
        ("." * 40, "." * 8), ("." * 32, ""),
    ],
)  # fmt: skip
def test_normalising_keeps_the_slips_of_the_evaluator(text, normal):
    assert normalise(text) == normal


def test_vizwiz_contractions_have_typographic_apostrophes_and_so_miss_straight_ones():
    assert CURLY_CONTRACTIONS["dont"] == "don\u2019t" and CURLY_CONTRACTIONS["cant"] == "can't"
    assert vizwiz_accuracy(["dont"], [["don't"] * 10]).value == 0
    assert vizwiz_accuracy(["dont"], [["don\u2019t"] * 10]).value == 1
    assert vizwiz_accuracy(["The cat."], [["cat"] * 10]).value == 1
    assert vizwiz_accuracy(["cat"], [["Cat"] * 10]).value == 0
    assert len(CONTRACTIONS) == len(CURLY_CONTRACTIONS) == 114


def test_gqa():
    assert gqa_accuracy([" Yes", "a cat"], ["yes", "cat"]).per_sample == (1.0, 0.0)


@pytest.mark.parametrize(
    "reply, answer",
    [
        ('It is a "cat".', "cat"), ("the cat, I think", "cat"), ("pizza hut", "hut"), ("Cats and dogs", "cats"),
        ("the top of the hill", "top"), ("red or blue", "red"), ("This is it! Really", ""), ("yes\nno", "yes"),
        ("There are the boys", "boys"), ("", ""),
    ],
)  # fmt: skip
def test_answers_cut_out_of_sentences(reply, answer):
    assert extract_answer(reply, "mm-interleaved") == answer
    assert extract_answer(reply, "whole") == reply


@pytest.mark.parametrize("people", [[[]], ["yes"], [["yes"], ["no"]]])
def test_annotations_that_are_no_lists_of_answers_are_refused(people):
    for metric in (vqa_accuracy, vizwiz_accuracy):
        with pytest.raises(UsageError):
            metric(["yes"], people)
