"""GenEval's verdicts: the released code's, and each rule by itself."""

import json
from pathlib import Path

import pytest

from weft.errors import UsageError
from weft.evaluation.metrics.geneval import (
    Clause,
    Detection,
    Verdict,
    Wanted,
    geneval,
    read_detections,
    read_wanted,
    relations,
    verdict,
)

KNOWN = Path(__file__).parents[4] / "shared" / "data" / "eval" / "geneval_logic"


@pytest.mark.skipif(not KNOWN.is_dir(), reason="../shared/data/eval/geneval_logic is not there")
def test_verdicts_reasons_and_scores_are_those_of_the_released_code():
    cases = json.loads((KNOWN / "input.json").read_text())["cases"]
    wanted = json.loads((KNOWN / "expected.json").read_text())
    asked = [read_wanted(case["metadata"]) for case in cases]
    found = [verdict(read_detections(case["detections"]), its) for case, its in zip(cases, asked, strict=True)]
    said = [{"correct": each.right, "reason": "\n".join(each.reasons)} for each in found]
    assert said == wanted["cases"]
    scores = geneval(found, [each.tag for each in asked])
    assert scores.value == pytest.approx(wanted["overall_mean_over_tasks"], abs=1e-15)
    assert scores.pictures.value == pytest.approx(wanted["image_accuracy"], abs=1e-15)
    assert {tag: (each.value, sum(each.per_sample), len(each.per_sample)) for tag, each in scores.tags.items()} == {
        tag: (each["score"], each["correct"], each["n"]) for tag, each in wanted["task"].items()
    }


def box(x: float, y: float, width: float = 10, height: float = 10) -> tuple[float, float, float, float]:
    """By its centre."""
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def found(*scores: float, color: str | None = None) -> list[Detection]:
    return [Detection(box(50 * i, 0), score, color) for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    "offset, wanted",
    [
        ((0, 0), ()),
        ((2, 0), ()),  # a tenth of both widths, which is nothing
        ((2.5, 0), ()),  # 0.5 of 2.5 is left
        ((4, 0), ()),  # exactly one half is not more than it
        ((4.1, 0), ("right of",)),
        ((-4.1, 0), ("left of",)),
        ((0, 4.1), ("below",)),
        ((0, -4.1), ("above",)),
        ((100, 100), ("right of", "below")),
        ((-100, -30), ("left of",)),
    ],
)
def test_centres_must_be_apart_by_more_than_the_sizes_explain(offset, wanted):
    assert relations(box(200 + offset[0], 300 + offset[1]), box(200, 300)) == wanted


def test_the_whole_distance_divides():
    # both offsets shrink by 2: (4, 4) leaves (2, 2) of a length of 5.66, too little for either
    assert relations(box(4, 4), box(0, 0)) == ()


@pytest.mark.parametrize("tag, right", [("single_object", True), ("counting", False)])
def test_counting_asks_for_surer_boxes(tag, right):
    assert verdict({"dog": found(0.9)}, Wanted(tag, (Clause("dog", 1),))).right is right
    assert not verdict({"dog": found(0.3)}, Wanted(tag, (Clause("dog", 1),))).right


def test_at_most_sixteen_boxes_of_a_class_count():
    many = {"dog": found(*[0.95] * 20)}
    assert not verdict(many, Wanted("counting", (Clause("dog", 17),))).right
    assert verdict(many, Wanted("counting", (Clause("dog", 16),), (Clause("dog", 17),))).right


def test_more_than_was_asked_for_is_wrong_only_where_it_is_excluded():
    two = {"dog": found(0.95, 0.95)}
    assert verdict(two, Wanted("counting", (Clause("dog", 1),))).right
    excluded = verdict(two, Wanted("counting", (Clause("dog", 1),), (Clause("dog", 2),)))
    assert excluded == Verdict(False, ("expected dog<2, found 2",))


def test_only_the_best_boxes_are_asked_for_their_color():
    dogs = [Detection(box(0, 0), 0.5, "red"), Detection(box(9, 9), 0.8, "blue")]
    assert verdict({"dog": dogs}, Wanted("colors", (Clause("dog", 1, "blue"),))).right
    told = verdict({"dog": dogs}, Wanted("colors", (Clause("dog", 1, "red"),)))
    assert told.reasons == ("expected red dog>=1, found 0 red; and 1 blue",)
    assert not verdict({"dog": dogs}, Wanted("colors", (Clause("dog", 2, "blue"),))).right


def test_of_equal_scores_the_later_box_is_the_best():
    dogs = [Detection(box(0, 0), 0.8, "red"), Detection(box(9, 9), 0.8, "blue")]
    assert verdict({"dog": dogs}, Wanted("colors", (Clause("dog", 1, "blue"),))).right


def test_a_position_needs_a_target_that_was_met():
    wanted = Wanted("position", (Clause("dog", 1), Clause("cat", 1, position=("left of", 0))))
    cat, dog = {"cat": [Detection(box(0, 0), 0.9)]}, {"dog": [Detection(box(90, 0), 0.9)]}
    assert verdict(cat | dog, wanted).right
    told = ("expected dog>=1, found 0", "no target for cat to be left of")
    assert verdict(cat, wanted) == Verdict(False, told)
    # an object that is not there is not placed as well
    assert verdict(dog, wanted).reasons == ("expected cat>=1, found 0",)


def test_every_box_must_stand_so_towards_every_target():
    wanted = Wanted("position", (Clause("dog", 2), Clause("cat", 1, position=("left of", 0))))
    dogs = [Detection(box(90, 0), 0.9), Detection(box(-90, 0), 0.8)]
    told = verdict({"dog": dogs, "cat": [Detection(box(0, 0), 0.9)]}, wanted)
    assert told.reasons == ("expected cat left of target, found right of target",)


def test_overlapping_boxes_are_dropped_where_that_is_asked_for():
    dogs = {"dog": [Detection((0, 0, 9, 9), 0.9), Detection((0, 0, 8, 8), 0.95), Detection((50, 0, 59, 9), 0.4)]}
    two, three = (Wanted("two", (Clause("dog", n),)) for n in (2, 3))
    assert verdict(dogs, three).right
    # with the last pixels included they share 81 of 100
    assert verdict(dogs, three, overlap=0.815).right
    assert verdict(dogs, two, overlap=0.805).right and not verdict(dogs, three, overlap=0.805).right


def test_the_overall_score_is_the_mean_of_tags():
    verdicts = [Verdict(True), Verdict(True), Verdict(True), Verdict(False)]
    scores = geneval(verdicts, ["a", "a", "a", "b"])
    assert scores.value == 0.5 and scores.pictures.value == 0.75
    assert scores.pictures.per_sample == (1, 1, 1, 0)
    with pytest.raises(UsageError, match="4 verdicts"):
        geneval(verdicts, ["a"])


@pytest.mark.parametrize(
    "detections, wanted, told",
    [
        ({"dog": found(0.9)}, Wanted("colors", (Clause("dog", 1, "red"),)), "color"),
        ({"dog": found(0.9)}, Wanted("position", (Clause("dog", 1, position=("above", 0)),)), "clause 0"),
    ],
)
def test_what_cannot_be_judged_is_refused(detections, wanted, told):
    with pytest.raises(UsageError, match=told):
        verdict(detections, wanted)


def test_records_that_are_none_are_refused():
    for metadata in (
        {},
        {"tag": "x", "include": [{"count": 1}]},
        {"tag": "x", "include": [{"class": "a", "count": "b"}]},
    ):
        with pytest.raises(UsageError, match="metadata"):
            read_wanted(metadata)
    for boxes in ([{"box": [1, 2, 3], "score": 1}], [{"box": [1, 2, 3, 4]}], [{"box": None, "score": 1}]):
        with pytest.raises(UsageError, match="dog"):
            read_detections({"dog": boxes})
