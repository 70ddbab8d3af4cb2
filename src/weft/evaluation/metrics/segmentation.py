"""Do generated pictures show what their segmentation asked for? ADE20K's mean IoU, over the whole set's pixels.

    IoU of a class = shared pixels of all pictures / pixels that have it in either, unlabelled pixels left out

As ADE20K's own code has it, the mean runs over all 150 classes and a class that never occurs counts 0, so that numbers
of few pictures are small; the mean over classes that occur stands beside it. Records keep the counts of each picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as PILImage

CLASSES = 150


@dataclass(frozen=True)
class Areas:
    """Pixels of each class in one picture, where its label is known."""

    shared: tuple[int, ...]
    predicted: tuple[int, ...]
    labelled: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Share of labelled pixels that are right; 0 of none."""
        return sum(self.shared) / max(sum(self.labelled), 1)


def areas(predicted: "np.ndarray", labels: "np.ndarray", classes: int = CLASSES) -> Areas:
    """Counts of one picture.

    Args:
        predicted: (rows, cols) of whole numbers, 0..classes - 1, as segmenters answer.
        labels: (rows, cols) of whole numbers: 0 where unlabelled, else the class, from 1 on, as ADE20K's files.

    Raises:
        UsageError: sizes differ, or a number is no class.
    """
    import numpy as np

    if predicted.shape != labels.shape:
        raise UsageError(
            f"the prediction is {predicted.shape}, its labels are {labels.shape}",
            where="mIoU",
            fix="resize the generated picture to the labels' size before it is segmented",
        )
    for name, values, highest in (("predicted", predicted, classes - 1), ("label", labels, classes)):
        if values.size and not 0 <= values.min() <= values.max() <= highest:
            raise UsageError(f"a {name} class is outside of 0..{highest}: {values.min()}..{values.max()}", where="mIoU")
    known = labels > 0
    ours, theirs = predicted[known].astype(np.int64), labels[known].astype(np.int64) - 1
    shared, of_ours, of_theirs = (
        tuple(np.bincount(each, minlength=classes).tolist()) for each in (ours[ours == theirs], ours, theirs)
    )
    return Areas(shared, of_ours, of_theirs)


@dataclass(frozen=True)
class Segmentation:
    per_class: tuple[float | None, ...]
    """IoU of class 1, 2, ...; None where no picture has it and none was predicted."""
    accuracy: float
    """Of labelled pixels."""

    @property
    def value(self) -> float:
        """mIoU: over all classes, those that never occur as 0."""
        return sum(iou or 0.0 for iou in self.per_class) / len(self.per_class)

    @property
    def occurring(self) -> float:
        """The mean over classes that occur; 0 of none."""
        found = [iou for iou in self.per_class if iou is not None]
        return sum(found) / max(len(found), 1)


def miou(pictures: Sequence[Areas]) -> Segmentation:
    """Of a set of at least one."""
    if not pictures:
        raise UsageError("there are no pictures", where="mIoU")
    sums = [[sum(column) for column in zip(*rows, strict=True)] for rows in (
        [each.shared for each in pictures], [each.predicted for each in pictures], [each.labelled for each in pictures]
    )]  # fmt: skip
    per_class = []
    for shared, predicted, labelled in zip(*sums, strict=True):
        union = predicted + labelled - shared
        per_class.append(shared / union if union else None)
    return Segmentation(tuple(per_class), sum(sums[0]) / max(sum(sums[2]), 1))


def to_label_size(generated: "PILImage.Image", labels: "PILImage.Image") -> "PILImage.Image":
    """What is given to the segmenter: RGB, bicubic, of the labels' size."""
    from PIL import Image as PILImage

    return generated.convert("RGB").resize(labels.size, PILImage.Resampling.BICUBIC)
