"""In which order filters run: the cheapest first, or as the paper has them. Both keep the same documents.

What takes single pictures out changes what later filters see, so it is always first, and so is what writes always
last. Between them filters only say yes or no, and may trade places.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from weft.data.filters import FilterConfig
from weft.data.filters.coherence import Coherence
from weft.data.filters.enough_images import EnoughImages
from weft.data.filters.image_count import ImageCount
from weft.errors import ConfigError

Order = Literal["given", "cheapest", "paper"]

REMOVING = ("safety", "licence", "image_limits", "decode", "coherence")
"""Those that may take pictures out, in the order in which they do."""
CHEAPEST = (
    "text_length",
    "sentence_count",
    "has_answer",
    "image_count",
    "decontaminate",
    "duplicate_images",
    "image_diversity",
    "coherence",
    "text_quality",
)
PAPER = (
    "has_answer",
    "decontaminate",
    "image_count",
    "sentence_count",
    "text_length",
    "coherence",
    "text_quality",
    "duplicate_images",
    "image_diversity",
)
WRITING = ("instruct", "rewrite", "split")
OF_TEXTS = ("text_length", "sentence_count")
"""Which see nothing of pictures, and so need not wait for what takes them out."""


def ordered(filters: Sequence[FilterConfig], order: Order) -> tuple[FilterConfig, ...]:
    """The same filters; in the cheapest order also a look at the number of pictures before any is opened.

    Raises:
        ConfigError: a kind is there twice, which has no place of its own.
    """
    if order == "given":
        return tuple(filters)
    kinds = [config.kind for config in filters]
    if len(set(kinds)) < len(kinds):
        raise ConfigError("a kind of filter is there twice", fix="leave one out, or set order: given")
    removing = sorted(filter(_removes, filters), key=_place(REMOVING))
    writing = sorted((config for config in filters if config.kind in WRITING), key=_place(WRITING))
    # it counts what was read, so it stays in front of what takes pictures out
    enough = [config for config in filters if config.kind == "enough_images"]
    judging = [config for config in filters if config not in (*removing, *writing, *enough)]
    if order == "paper":
        return (*enough, *removing, *sorted(judging, key=_place(PAPER)), *writing)
    judging.sort(key=_place(CHEAPEST))
    early = [config for config in judging if config.kind in OF_TEXTS]
    late = [config for config in judging if config.kind not in OF_TEXTS]
    return (*(enough or _enough(late)), *early, *removing, *late, *writing)


def _removes(config: FilterConfig) -> bool:
    return config.kind in REMOVING and not (isinstance(config, Coherence) and config.unit == "document")


def _enough(filters: Sequence[FilterConfig]) -> list[EnoughImages]:
    return [EnoughImages(min=config.min) for config in filters if isinstance(config, ImageCount)]


def _place(kinds: Sequence[str]) -> Callable[[FilterConfig], int]:
    return lambda config: kinds.index(config.kind) if config.kind in kinds else len(kinds)
