"""mIoU: the released code's numbers, and counts by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from weft.errors import UsageError
from weft.evaluation.metrics.segmentation import CLASSES, areas, miou, to_label_size

KNOWN = Path(__file__).parents[4] / "shared" / "data" / "eval" / "ade20k_miou"


@pytest.mark.skipif(not KNOWN.is_dir(), reason="../shared/data/eval/ade20k_miou is not there")
def test_values_are_those_of_the_released_code():
    wanted = json.loads((KNOWN / "expected.json").read_text())
    counts = []
    for file in sorted((KNOWN / "annotations").glob("*.png")):
        predicted, labels = (np.array(PILImage.open(KNOWN / folder / file.name)) for folder in
                             ("predictions_0to149", "annotations"))  # fmt: skip
        counts.append(areas(predicted, labels))
    found = miou(counts)
    assert found.value == pytest.approx(wanted["mean_over_150_classes"], rel=1e-9)
    assert found.occurring == pytest.approx(wanted["mean_over_classes_with_union_gt_0"], rel=1e-9)
    assert found.accuracy == pytest.approx(wanted["pixel_accuracy_over_labelled"], rel=1e-9)
    of_class = {str(number): iou for number, iou in enumerate(found.per_class, 1) if iou is not None}
    assert of_class == pytest.approx(wanted["per_class_iou"], rel=1e-9)
    assert sum(map(sum, (each.labelled for each in counts))) == wanted["labelled_pixels"]
    assert sum(map(sum, (each.shared for each in counts))) == wanted["correct_pixels"]


def test_pixels_of_all_pictures_are_summed_before_they_are_divided():
    first = areas(np.array([[0, 0, 1, 5]]), np.array([[1, 2, 2, 0]]))  # the last pixel has no label
    second = areas(np.array([[0]]), np.array([[1]]))
    found = miou([first, second])
    assert found.per_class[:2] == (2 / 3, 1 / 2)
    assert set(found.per_class[2:]) == {None} and len(found.per_class) == CLASSES
    assert found.value == pytest.approx((2 / 3 + 1 / 2) / 150)
    assert found.occurring == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.accuracy == 3 / 4 and first.accuracy == 2 / 3


def test_nothing_labelled_is_nothing_right():
    found = miou([areas(np.array([[3]]), np.array([[0]]))])
    assert (found.value, found.occurring, found.accuracy) == (0, 0, 0)


@pytest.mark.parametrize(
    "predicted, labels, told",
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), "resize"),
        (np.full((1, 1), 150), np.ones((1, 1), int), "predicted class"),
        (np.zeros((1, 1), int), np.full((1, 1), 151), "label class"),
        (np.full((1, 1), -1), np.ones((1, 1), int), "predicted class"),
    ],
)
def test_what_is_no_labelling_is_refused(predicted, labels, told):
    with pytest.raises(UsageError, match=told):
        areas(predicted, labels)


def test_no_picture_has_no_value():
    with pytest.raises(UsageError):
        miou([])


def test_generated_pictures_get_the_labels_size():
    generated, labels = PILImage.new("L", (8, 8), 7), PILImage.new("L", (5, 3))
    sized = to_label_size(generated, labels)
    assert sized.size == (5, 3) and sized.mode == "RGB" and sized.getpixel((2, 1)) == (7, 7, 7)
