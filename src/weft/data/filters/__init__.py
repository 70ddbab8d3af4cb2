"""Which documents are kept: one file each, one row each; cheapest first in the default."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from weft.data.filters import decode, has_answer, image_count, text_length
from weft.data.stage import Stage

FILTERS: dict[str, Callable[[Any], Stage]] = {
    "decode": decode.build,
    "has_answer": has_answer.build,
    "image_count": image_count.build,
    "text_length": text_length.build,
}

FilterConfig = Annotated[
    decode.Decode | has_answer.HasAnswer | image_count.ImageCount | text_length.TextLength,
    Field(discriminator="kind"),
]

DEFAULT: tuple[FilterConfig, ...] = (has_answer.HasAnswer(), decode.Decode())
