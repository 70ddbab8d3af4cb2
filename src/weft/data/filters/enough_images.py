"""A look at the number of pictures before any is opened: taking some out can only lower it."""

from typing import Literal

from pydantic import NonNegativeInt

from weft.config import Config
from weft.data.filters.removal import rejected
from weft.data.stage import Outcome, Stage
from weft.document import Document


class EnoughImages(Config):
    """Drops early what `image_count` with the same `min` would drop later; it changes nothing else."""

    kind: Literal["enough_images"] = "enough_images"
    min: NonNegativeInt = 1


def build(config: EnoughImages) -> Stage:
    def stage(document: Document) -> Outcome:
        n = sum(1 for _ in document.images)
        if n < config.min:
            return rejected("too_few_images", f"{n} pictures, fewer than {config.min}", n, config.min)
        return document, ()

    return stage
