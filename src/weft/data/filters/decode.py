"""Every picture can be decoded, by the one door for picture bytes."""

from typing import Literal

from pydantic import PositiveInt

from weft.config import Config
from weft.data.stage import Loss, Outcome, Stage
from weft.document import Document, Image, Part, Turn
from weft.errors import ImageError
from weft.images import MAX_PIXELS, decode_image


class Decode(Config):
    """Decodes every picture and forgets the pixels: the dataset keeps the bytes as they came."""

    kind: Literal["decode"] = "decode"
    on_bad_image: Literal["record", "image"] = "record"
    """What a picture that cannot be decoded costs: the `record`, or only the `image`."""
    max_pixels: PositiveInt = MAX_PIXELS


def build(config: Decode) -> Stage:
    def stage(document: Document) -> Outcome:
        losses: list[Loss] = []
        turns = []
        for i, turn in enumerate(document.turns):
            parts: list[Part] = []
            for j, part in enumerate(turn.parts):
                problem = _problem(part, config.max_pixels) if isinstance(part, Image) else None
                if problem is None:
                    parts.append(part)
                elif isinstance(part, Image):
                    losses.append(Loss("image", problem.reason, problem.what, f"messages[{i}].content[{j}]", part.path))
            turns.append(Turn(turn.role, tuple(parts), turn.loss))
        if not losses:
            return document, ()
        if config.on_bad_image == "image":
            return Document(tuple(turns), document.id, document.meta), tuple(losses)
        first = losses[0]
        return None, (Loss("record", first.reason, first.message, first.field, first.image),)

    return stage


def _problem(image: Image, max_pixels: int) -> ImageError | None:
    try:
        decode_image(image.data or b"", max_pixels=max_pixels, least=1)
    except ImageError as error:
        return error
    return None
