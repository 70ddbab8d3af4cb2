"""Which documents are kept, and what is made of them: one file each, one row each; cheapest first in the default."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from weft.data.filters import (
    coherence,
    decode,
    decontaminate,
    duplicate_images,
    enough_images,
    has_answer,
    image_count,
    image_diversity,
    image_limits,
    instruct,
    licence,
    rewrite,
    safety,
    sentence_count,
    split,
    text_length,
    text_quality,
)
from weft.data.stage import AnyStage

FILTERS: dict[str, Callable[[Any], AnyStage]] = {
    "coherence": coherence.build,
    "decode": decode.build,
    "decontaminate": decontaminate.build,
    "duplicate_images": duplicate_images.build,
    "enough_images": enough_images.build,
    "has_answer": has_answer.build,
    "image_count": image_count.build,
    "image_diversity": image_diversity.build,
    "image_limits": image_limits.build,
    "instruct": instruct.build,
    "licence": licence.build,
    "rewrite": rewrite.build,
    "safety": safety.build,
    "sentence_count": sentence_count.build,
    "split": split.build,
    "text_length": text_length.build,
    "text_quality": text_quality.build,
}

FilterConfig = Annotated[
    coherence.Coherence
    | decode.Decode
    | decontaminate.Decontaminate
    | duplicate_images.DuplicateImages
    | enough_images.EnoughImages
    | has_answer.HasAnswer
    | image_count.ImageCount
    | image_diversity.ImageDiversity
    | image_limits.ImageLimits
    | instruct.Instruct
    | licence.Licence
    | rewrite.Rewrite
    | safety.Safety
    | sentence_count.SentenceCount
    | split.Split
    | text_length.TextLength
    | text_quality.TextQuality,
    Field(discriminator="kind"),
]

DEFAULT: tuple[FilterConfig, ...] = (has_answer.HasAnswer(), decode.Decode())
