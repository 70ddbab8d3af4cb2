"""Documents whose pictures look too much alike, by a distance between all pairs of them.

Which way a score runs decides what is thrown away, so four fields say it: the `metric`, the `space` its values are
read in, the `threshold`, and whether values `above` or `below` it discard a document. The paper's sentence, "higher
than 0.6", has three readings: A takes what LPIPS gives as a similarity, one minus the distance; B as the distance that
it is; C keeps the sentence as it stands. The paper wants near-duplicates gone, and LPIPS is 0 for the same picture, so
C does the opposite of what is meant; A is the default, because it changes the least that makes the sentence true.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
from pydantic import PositiveInt

from weft.config import Config
from weft.data.filters.removal import decoding, rejected
from weft.data.stage import Outcome, Stage
from weft.document import Document, Image
from weft.images import decode_image

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from torch import Tensor

log = logging.getLogger(__name__)

Metric = Literal["lpips", "phash", "clip", "dino"]
Space = Literal["distance", "similarity"]
Discard = Literal["above", "below"]
Distances = Callable[[Sequence["PILImage.Image"]], "Tensor"]
"""Pictures -> (M, M), 0 for the same picture."""

PRESETS: dict[str, dict[str, Any]] = {
    "A": {"metric": "lpips", "space": "similarity", "threshold": 0.6, "discard": "above"},
    "B": {"metric": "lpips", "space": "distance", "threshold": 0.6, "discard": "below"},
    "C": {"metric": "lpips", "space": "distance", "threshold": 0.6, "discard": "above"},
}


class Weights(Config):
    """Of LPIPS: safetensors files with the published names."""

    network: Literal["alex", "vgg", "squeeze"] = "alex"
    backbone: Path
    linear: Path
    side: PositiveInt = 224
    """Pictures are resized to a square of so many pixels, without cropping."""


class ImageDiversity(Config):
    """Drops documents with a pair of pictures on the wrong side of the threshold.

    `preset: A | B | C` stands for the four fields. Without any of them and without weights, perceptual hashes are
    compared, which needs no download.
    """

    kind: Literal["image_diversity"] = "image_diversity"
    metric: Metric = "phash"
    space: Space = "distance"
    threshold: float = 0.1
    discard: Discard = "below"
    allow_inverted: bool = False
    """Discarding pictures for being unlike each other is refused without it."""
    lpips: Weights | None = None
    model: Path | None = None
    """The folder of CLIP or DINO."""
    max_images: PositiveInt = 16
    """Documents with more are dropped: the work grows with their square."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("preset", "A" if values.get("lpips") and values.keys().isdisjoint(PRESETS["A"]) else None)
        if name is None:
            return values
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        rest = {key: value for key, value in values.items() if key != "preset"}
        twice = PRESETS[name].keys() & rest.keys()
        if twice:
            raise ValueError(f"preset {name} sets {', '.join(sorted(twice))} too: give one or the other")
        return {**rest, **PRESETS[name]}

    @pydantic.model_validator(mode="after")
    def _check(self) -> "ImageDiversity":
        if not math.isfinite(self.threshold):
            raise ValueError("threshold must be finite")
        if self.is_inverted and not self.allow_inverted:
            raise ValueError(
                f"{self.space} {self.discard} {self.threshold:g} discards pictures that are unlike and keeps those "
                "that are alike; turn space or discard round, or set allow_inverted: true"
            )
        if self.metric == "lpips" and self.lpips is None:
            raise ValueError("metric lpips needs weights: set lpips.backbone and lpips.linear, or metric: phash")
        if self.metric in ("clip", "dino") and self.model is None:
            raise ValueError(f"metric {self.metric} needs model, a folder of weights")
        return self

    @property
    def is_inverted(self) -> bool:
        """Whether it is unlikeness that discards."""
        return (self.space == "distance") == (self.discard == "above")


def build(config: ImageDiversity) -> Stage:
    if config.is_inverted:
        log.warning(
            "image_diversity discards documents whose pictures are unlike each other, and keeps look-alikes "
            "(allow_inverted: true): reading C of the paper, for comparison only"
        )
    distances = distances_of(config)

    def stage(document: Document) -> Outcome:
        images = list(document.images)
        if len(images) > config.max_images:
            message = f"{len(images)} pictures, more than the {config.max_images} that are compared"
            return rejected("too_many_to_compare", message, len(images), config.max_images)
        if len(images) < 2:
            return document, ()
        return _judge(document, distances(pictures_of(images, config)).tolist(), config)

    return decoding(stage)


def values_of(distances: Sequence[Sequence[float]], space: Space) -> list[tuple[float, int, int]]:
    """Of every pair of pictures (i, j), i < j: the value that the threshold is compared with."""
    pairs = [(distances[i][j], i, j) for j in range(len(distances)) for i in range(j)]
    return [(distance if space == "distance" else 1 - distance, i, j) for distance, i, j in pairs]


def worst_of(values: Sequence[tuple[float, int, int]], discard: Discard) -> tuple[float, int, int]:
    """The pair that is closest to being discarded, or furthest beyond."""
    return max(values) if discard == "above" else min(values)


def is_discarded(value: float, config: ImageDiversity) -> bool:
    return value > config.threshold if config.discard == "above" else value < config.threshold


def _judge(document: Document, distances: Sequence[Sequence[float]], config: ImageDiversity) -> Outcome:
    value, i, j = worst_of(values_of(distances, config.space), config.discard)
    if not is_discarded(value, config):
        return document, ()
    message = f"pictures {i} and {j} have {config.metric} {config.space} {value:.4f}, {config.discard}"
    reason = "unlike_images" if config.is_inverted else "alike_images"
    return rejected(reason, f"{message} {config.threshold:g}", value, config.threshold)


def pictures_of(images: Iterable[Image], config: ImageDiversity) -> list["PILImage.Image"]:
    """Decoded as far as the metric needs.

    Raises:
        ImageError: one cannot be decoded.
    """
    from weft.scorers import HASHED

    sides = {"phash": HASHED, "lpips": config.lpips.side if config.lpips else None}
    least = sides.get(config.metric)
    return [decode_image(image.data or b"", least=least) for image in images]


def distances_of(config: ImageDiversity) -> Distances:
    """
    Raises:
        CheckpointError: weights are missing or of another shape.
    """
    from weft import scorers

    if config.metric == "lpips":
        assert config.lpips is not None
        weights = config.lpips
        network = scorers.LPIPS(weights.network).load(weights.backbone, weights.linear)
        return lambda pictures: network.of_pictures(pictures, weights.side)
    if config.metric == "phash":
        return scorers.hash_distances
    assert config.model is not None
    model = scorers.CLIP(config.model) if config.metric == "clip" else scorers.DINO(config.model)
    return lambda pictures: scorers.cosine_distances(model.picture_features(pictures))
