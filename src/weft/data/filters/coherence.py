"""How well pictures fit the text around them: CLIPScore, kept as cosines with the name of the model they are of.

Cosines of different models cannot be compared, so a threshold belongs to a model. Where a source gives cosines of that
same model (MMC4, OmniCorpus), they are used as they are.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import Field

from weft.config import Config
from weft.data.annotate.material import material_of, noted, source_of
from weft.data.filters.removal import Problem, about, decoding, rejected, without
from weft.data.sentences import sentences
from weft.data.stage import Outcome, Stage
from weft.document import Document, Image, Part, Text
from weft.images import decode_image

SCALE = 2.5
"""A CLIPScore is so many times the cosine, and not below 0."""
Cosines = Callable[[Image, Sequence[str]], Sequence[float]]
_AGGREGATE: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda values: math.fsum(values) / len(values),
    "min": min,
    "max": max,
}


class Coherence(Config):
    """Drops documents, or pictures, whose texts and pictures have little to do with each other."""

    kind: Literal["coherence"] = "coherence"
    unit: Literal["document", "image"] = "document"
    """What is judged and lost: a document by the `aggregate` of its pictures' scores, or each picture by its own."""
    aggregate: Literal["mean", "min", "max"] = "mean"
    threshold: float = Field(0.24, ge=-1, le=2.5)
    units: Literal["cosine", "clipscore"] = "cosine"
    """What the threshold is given in."""
    threshold_model: str = "clip-vit-large-patch14"
    """The model that the threshold was chosen for, as its folder is called."""
    model: Path | None = None
    """That folder. None: only what sources give is used."""
    reuse: bool = True
    """Use cosines that the source gives, if they are of `threshold_model`."""
    skip: tuple[str, ...] = ("vist", "youcook2", "mmdialog")
    """Sources that are not judged: what people wrote about pictures in the first person scores low."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> "Coherence":
        if self.model is not None and self.model.name != self.threshold_model:
            raise ValueError(
                f"threshold was chosen for {self.threshold_model}, the model is {self.model.name}: their cosines "
                "cannot be compared; choose a threshold for that model and set threshold_model to its name"
            )
        if self.unit == "image" and "aggregate" in self.model_fields_set:
            raise ValueError("unit: image has nothing to aggregate")
        if self.model is None and not self.reuse:
            raise ValueError("there is nothing to score with: set model, or reuse: true")
        return self

    @property
    def min_cosine(self) -> float:
        return self.threshold if self.units == "cosine" else self.threshold / SCALE


def build(config: Coherence) -> Stage:
    cosines = None if config.model is None else cosines_of(config.model)

    def stage(document: Document) -> Outcome:
        if source_of(document) in config.skip or not any(True for _ in document.images):
            return document, ()
        scores = stored(document, config.threshold_model) if config.reuse else None
        if scores is None and cosines is None:
            return rejected("no_similarity", f"it holds no cosines of {config.threshold_model}, and no model was given")
        if scores is None:
            assert cosines is not None
            found = scored(document, cosines)
            if found is None:
                return rejected("no_text", "no text to compare the pictures with")
            scores = found
        judged = _by_image if config.unit == "image" else _by_document
        return judged(document, scores, config)

    return decoding(stage)


def stored(document: Document, model: str) -> list[float] | None:
    """The source's cosine of each picture, if it has them all, and of this model."""
    if document.meta.get("similarity_model") != model:
        return None
    found = [about(document, image).get("similarity") for image in document.images]
    known = [float(value) for value in found if isinstance(value, int | float)]
    return known if len(known) == len(found) else None


def scored(document: Document, cosines: Cosines) -> list[float] | None:
    """Of each picture the largest cosine with a sentence of the texts beside it; None where there is no text."""
    parts = material_of(document).parts
    if not any(isinstance(part, Text) and part.text.strip() for part in parts):
        return None
    return [max(cosines(part, beside(parts, i))) for i, part in enumerate(parts) if isinstance(part, Image)]


def beside(parts: Sequence[Part], place: int) -> list[str]:
    """Sentences of the texts next to a picture; where pictures stand together, of the nearest ones."""
    texts = {abs(i - place): i for i, part in enumerate(parts) if isinstance(part, Text) and part.text.strip()}
    nearest = min(texts)
    at = (place - nearest, place + nearest)
    chosen = [parts[i] for i in at if 0 <= i < len(parts)]
    return [each for part in chosen if isinstance(part, Text) for each in sentences(part.text)]


def _by_document(document: Document, scores: list[float], config: Coherence) -> Outcome:
    value = aggregate_of(scores, config)
    if value < config.min_cosine:
        message = f"{config.aggregate} of the cosines is {value:.4f}, below {config.min_cosine:g}"
        return rejected("incoherent", message, value, config.min_cosine)
    return _noted(document, scores, config), ()


def _by_image(document: Document, scores: list[float], config: Coherence) -> Outcome:
    def problem(image: Image, number: int) -> Problem | None:
        value = scores[number]
        if value >= config.min_cosine:
            return None
        message = f"its cosine is {value:.4f}, below {config.min_cosine:g}"
        return Problem("incoherent_image", message, value, config.min_cosine)

    left, losses = without(document, problem, "image")
    assert left is not None
    return _noted(left, [score for score in scores if score >= config.min_cosine], config), losses


def _noted(document: Document, scores: list[float], config: Coherence) -> Document:
    cosines = [round(score, 4) for score in scores]
    return noted(document, coherence={"model": config.threshold_model, "cosines": cosines})


def aggregate_of(scores: Sequence[float], config: Coherence) -> float:
    """What of a document's scores is compared with the threshold, as a cosine."""
    return _AGGREGATE[config.aggregate](scores)


def cosines_of(folder: Path) -> Cosines:
    from weft.scorers import CLIP

    model = CLIP(folder)

    def cosines(image: Image, texts: Sequence[str]) -> Sequence[float]:
        return model.cosines([decode_image(image.data or b"")], texts)[0].tolist()

    return cosines
