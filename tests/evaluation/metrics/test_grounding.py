"""Boxes in replies, and how well they lie."""

import json
from pathlib import Path

import pytest

from weft.errors import UsageError
from weft.evaluation.metrics.grounding import (
    GRAMMARS,
    grounding_accuracy,
    iou,
    iou_whole_pixels,
    parse_corners,
    parse_list,
)

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "grounding_iou"


@pytest.mark.skipif(not DATA.is_dir(), reason="the known answers are not here")
def test_the_known_answers():
    items = json.loads((DATA / "input.json").read_text())
    expected = json.loads((DATA / "expected.json").read_text())
    found = grounding_accuracy(
        [each["pred_box"] for each in items],
        [tuple(each["gt_box"]) for each in items],
        [(each["width"], each["height"]) for each in items],
        grammar="mm-interleaved",
    )
    assert sum(found.accuracy.per_sample) == expected["correct"]
    assert found.accuracy.value == expected["accuracy_iou_ge_0.5"]
    for item, value, box in zip(items, found.iou.per_sample, found.boxes, strict=True):
        assert value == pytest.approx(expected["iou"][item["id"]], rel=0, abs=1e-5)
        assert list(box or (0, 0, 0, 0)) == expected["parsed"][item["id"]]
    assert found.unparsed == sum(box == [0, 0, 0, 0] for box in expected["parsed"].values())


@pytest.mark.parametrize(
    "text, box",
    [
        ("(1,2)(3,4)", (1, 2, 3, 4)), ("It is (1, 2)(3.5, 4). Sure", (1, 2, 3.5, 4)), ("(1,2) (3,4)", None),
        ("(1;2)(3;4)", None), ("(1,2,3)(4,5)", None), ("[1,2][3,4]", None), ("(a,b)(c,d)", None), ("", None),
        ("(see) (1,2)(3,4)", None), ("(1,2)(3,4) or (5,6)(7,8)", (1, 2, 3, 4)), ("(nan,1)(2,3)", None),
    ],
)  # fmt: skip
def test_corners_on_a_grid(text, box):
    assert parse_corners(text) == box


@pytest.mark.parametrize(
    "text, box",
    [("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)), ("[1,2,3]", None), ("1,2,3,4", None), ("[a,b,c,d]", None)],
)
def test_lists(text, box):
    assert parse_list(text) == box


def test_a_half_falls_where_single_precision_lets_it_fall():
    reply, box, size = "(154,238)(237,456)", (154.0, 238.0, 237.0, 674.0), (480, 640)
    found = grounding_accuracy([reply], [box], [size], grammar="mm-interleaved")
    assert found.iou.per_sample == (0.4999999701976776,)
    assert found.accuracy.value == 0


def test_an_overlap_of_just_half_is_right():
    found = grounding_accuracy(["(0,0)(5,10)"], [(0.0, 0.0, 10.0, 10.0)], [(640, 480)], grammar="mm-interleaved")
    assert found.iou.value == pytest.approx(0.5)
    assert found.accuracy.value == 1


def test_iou_adds_no_pixel_unless_the_boxes_are_made_of_whole_ones():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    # Of 3 x 3 pixels each, 2 x 2 are shared.
    assert iou_whole_pixels((0, 0, 3, 3), (1, 1, 3, 3)) == pytest.approx(4 / 14)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert iou((3, 3, 1, 1), (0, 0, 4, 4)) == 0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_every_grammar_finds_its_own_box_and_counts_what_has_none(grammar):
    written = {"mm-interleaved": "(100,200)(300,400)", "unit": "[0.1, 0.2, 0.3, 0.4]", "coco": "[10, 20, 30, 40]"}
    box = GRAMMARS[grammar].parse(written[grammar])
    found = grounding_accuracy([written[grammar], "nowhere"], [box, box], [(640, 480)] * 2, grammar=grammar)
    assert found.iou.per_sample == pytest.approx((1.0, 0.0))
    assert found.unparsed == 1


def test_a_true_box_is_written_as_a_grammar_reads_it():
    corners = (64.0, 96.0, 192.0, 192.0)
    assert GRAMMARS["unit"].write(corners, 640, 480) == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert GRAMMARS["mm-interleaved"].write(corners, 640, 480) == pytest.approx((99.9, 199.8, 299.7, 399.6))
    assert GRAMMARS["coco"].write(corners, 640, 480) == (64.0, 96.0, 128.0, 96.0)


def test_an_unknown_grammar_is_refused():
    with pytest.raises(UsageError, match="polar"):
        grounding_accuracy([], [], [], grammar="polar")
