"""Documents with too little or too much text."""

from typing import Literal

from pydantic import NonNegativeInt

from weft.config import Config
from weft.data.filters.removal import rejected
from weft.data.stage import Outcome, Stage
from weft.document import Document


class TextLength(Config):
    """Keeps documents with `min` to `max` characters of text, all turns together."""

    kind: Literal["text_length"] = "text_length"
    min: NonNegativeInt = 1
    max: NonNegativeInt | None = None


def build(config: TextLength) -> Stage:
    def stage(document: Document) -> Outcome:
        n = sum([len(text.text) for text in document.texts])
        if n < config.min:
            return rejected("too_little_text", f"{n} characters, fewer than {config.min}", n, config.min)
        if config.max is not None and n > config.max:
            return rejected("too_much_text", f"{n} characters, more than {config.max}", n, config.max)
        return document, ()

    return stage
