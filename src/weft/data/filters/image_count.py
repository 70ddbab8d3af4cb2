"""Documents with too few or too many pictures."""

from typing import Literal

from pydantic import NonNegativeInt

from weft.config import Config
from weft.data.filters.removal import rejected
from weft.data.stage import Outcome, Stage, count
from weft.document import Document


class ImageCount(Config):
    """Keeps documents with `min` to `max` pictures."""

    kind: Literal["image_count"] = "image_count"
    min: NonNegativeInt = 1
    max: NonNegativeInt | None = None


def build(config: ImageCount) -> Stage:
    def stage(document: Document) -> Outcome:
        n = count(document).images
        if n < config.min:
            return rejected("too_few_images", f"{n} pictures, fewer than {config.min}", n, config.min)
        if config.max is not None and n > config.max:
            return rejected("too_many_images", f"{n} pictures, more than {config.max}", n, config.max)
        return document, ()

    return stage
