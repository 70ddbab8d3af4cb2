"""OmniCorpus: web pages in Parquet or JSON Lines; texts and picture URLs side by side, or as MMC4 has them."""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource, OnBadImage, parse_json
from weft.data.sources.fields import Object, objects, of_type, optional, plain, required, same_length
from weft.data.sources.files import LINES, ROWS, Place, file_source
from weft.data.sources.rules.matched import Picture, matched, matches
from weft.data.sources.rules.parallel import parallel
from weft.data.stage import Record

_KEPT = ("width", "height", "aesthetic_prob", "unsafe_prob", "p_hash", "d_hash")
_PAGE = ("id", "url", "fluency_prob", "non_advertisement_prob", "politics_prob", "porn_prob", "toxic_prob")


class OmniCorpus(FileSource):
    """Parquet or JSONL files. A picture is looked for in `images` under the SHA-256 of its URL."""

    kind: Literal["omnicorpus"] = "omnicorpus"
    on_bad_image: OnBadImage = "image"
    placement: Literal["random", "before", "after"] = "random"
    """Where records match pictures with sentences: on which side of its sentence a picture is put."""


def _documents(config: OmniCorpus, row: Any, place: Place) -> Iterator[Record]:
    row = of_type(row, dict, "record")
    general = row.get("general_metadata")
    page = plain(row, *_PAGE) | plain(parse_json(general.encode()) if isinstance(general, str) else general, *_PAGE)
    native = str(page.pop("id")) if "id" in page else None
    if "text_list" in row:
        yield _matched(config, row, place, native, page)
        return
    images = required(row, "images", list)
    valid = optional(row, "valid_image", list)
    about = _about(row, images)
    if valid is not None:
        same_length(images=images, metadata=about, valid_image=valid)
        about = [{**entry, "invalid": ok is False} for entry, ok in zip(about, valid, strict=True)]
    yield from parallel(config, row, place, "omnicorpus", native, about, page)


def _about(row: Object, images: list[Any]) -> list[Object]:
    """`metadata` may be missing, a list, or a list as JSON text; one entry to a picture, or one to a place."""
    found = row.get("metadata")
    entries = parse_json(found.encode()) if isinstance(found, str) else found
    if entries is None:
        return [{} for _ in images]
    known = [plain(entry, *_KEPT) for entry in of_type(entries, list, "metadata")]
    pictures = [i for i, url in enumerate(images) if url is not None]
    if len(known) == len(pictures) != len(images):
        by_place = dict(zip(pictures, known, strict=True))
        return [by_place.get(i, {}) for i in range(len(images))]
    return known


def _matched(config: OmniCorpus, row: Object, place: Place, native: str | None, page: Object) -> Record:
    infos = objects(required(row, "image_info", list), "image_info")
    valid = optional(row, "valid_image_ids", list)
    found = matches(row, infos)
    pictures = [
        Picture(
            sentence,
            similarity,
            url=required(info, "image_url", str, f"image_info[{i}]."),
            about={"invalid": valid is not None and i not in valid},
        )
        for i, (info, (sentence, similarity)) in enumerate(zip(infos, found, strict=True))
    ]
    return matched(config, config.placement, row, place, "omnicorpus", native, pictures, page)


SOURCE = file_source("omnicorpus", _documents, (*ROWS, *LINES))
