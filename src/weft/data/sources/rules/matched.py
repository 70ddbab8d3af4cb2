"""Sentences in order, and pictures that each belong to one of them, as MMC4 has it."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from weft.data.sources.base import FileSource
from weft.data.sources.draft import Draft, coin, identity
from weft.data.sources.fields import Object, of_type, optional, required, same_length
from weft.data.sources.files import Place
from weft.data.sources.rules.parallel import remote_image
from weft.data.stage import Record
from weft.document import Part, assistant

Placement = Literal["random", "before", "after"]


@dataclass(frozen=True)
class Picture:
    """Of the sentence with this number; one of `name` (a file), `inline` (base64) and `url` says where it is."""

    sentence: int
    similarity: float | None
    name: str | None = None
    inline: str | None = None
    url: str | None = None
    about: Object = field(default_factory=dict)


def matches(record: Object, infos: Sequence[Object]) -> list[tuple[int, float | None]]:
    """Sentence and cosine of every picture: the match that the record states, else the most similar sentence."""
    matrix = optional(record, "similarity_matrix", list)
    if matrix is not None:
        same_length(image_info=infos, similarity_matrix=matrix)
    found: list[tuple[int, float | None]] = []
    for i, info in enumerate(infos):
        if matrix is None or "matched_text_index" in info:
            at = f"image_info[{i}]."
            found.append((required(info, "matched_text_index", int, at), optional(info, "matched_sim", float, at)))
        else:
            row = [of_type(value, float, f"similarity_matrix[{i}]") for value in of_type(matrix[i], list, "matrix")]
            best = max(range(len(row)), key=row.__getitem__, default=-1)
            found.append((best, row[best] if row else None))
    return found


def matched(
    config: FileSource,
    placement: Placement,
    record: Object,
    place: Place,
    source: str,
    native: str | None,
    pictures: Sequence[Picture],
    meta: Object,
) -> Record:
    """The document of `text_list` and its pictures.

    Args:
        placement: on which side of its sentence a picture goes; `random` is drawn from the document's id.
    """
    texts = required(record, "text_list", list)
    name = identity(source, native, [texts, meta])
    draft = Draft(config, place)
    sides: list[tuple[list[Part], list[Part]]] = [([], []) for _ in texts]
    for i, picture in enumerate(pictures):
        at = f"image_info[{i}]"
        if not 0 <= picture.sentence < len(texts):
            message = f"sentence {picture.sentence} of {len(texts)}"
            draft.lost_image("index_range", message, f"{at}.matched_text_index", picture.name or picture.url)
            continue
        before = coin(name, i) if placement == "random" else placement == "before"
        sides[picture.sentence][0 if before else 1].extend(_load(draft, picture, at))
    parts: list[Part] = []
    for i, (text, (before_it, after_it)) in enumerate(zip(texts, sides, strict=True)):
        parts += [*before_it, *draft.text(text, f"text_list[{i}]"), *after_it]
    return draft.record(name, [assistant(*parts)], meta)


def _load(draft: Draft, picture: Picture, at: str) -> list[Part]:
    about: dict[str, Any] = dict(picture.about)
    if picture.similarity is not None:
        about["similarity"] = picture.similarity
    if picture.url is not None:
        return remote_image(draft, picture.url, f"{at}.image_url", about)
    if picture.inline is None:
        return draft.image(picture.name, f"{at}.image_name", about=about)
    try:
        data = base64.b64decode(picture.inline, validate=True)
    except (binascii.Error, ValueError):
        return draft.lost_image("image_inline", "not base64", f"{at}.image_base64", picture.name)
    return draft.image({"bytes": data, "path": picture.name}, f"{at}.image_base64", about=about)
