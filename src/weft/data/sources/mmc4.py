"""MMC4: web pages as sentences, with pictures matched to them; one JSON object to a line.

docs_shard_{N}_v2.jsonl, docs_no_face_shard_{N}_v2.jsonl, ..._v3.jsonl     plain, or each alone in a zip archive
*.tar                                                                       pictures inside, as image_base64
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource, OnBadImage, has_picture, parse_json
from weft.data.sources.fields import Object, objects, of_type, optional, plain, required
from weft.data.sources.files import LINES, PACKED, TARS, Place, file_source
from weft.data.sources.files.tars import Sample
from weft.data.sources.rules.matched import Picture, Placement, matched, matches
from weft.data.stage import Record, RecordError

SIMILARITY = "clip-vit-large-patch14"
"""The model whose cosines the records hold."""


class Mmc4(FileSource):
    """Shards of MMC4; pictures, which it does not come with, are looked for by name in `images`."""

    kind: Literal["mmc4"] = "mmc4"
    on_bad_image: OnBadImage = "image"
    placement: Placement = "random"
    """On which side of its sentence a picture is put; `random` is drawn from the document's id."""


def _documents(config: Mmc4, value: Any, place: Place) -> Iterator[Record]:
    if isinstance(value, Sample):
        if "json" not in value.files:
            raise RecordError("missing_key", "sample holds no .json file", field="json")
        value = parse_json(value.files["json"])
    record = of_type(value, dict, "record")
    infos = objects(required(record, "image_info", list), "image_info")
    found = matches(record, infos)
    pictures = [_picture(config, place, info, f"image_info[{i}].", *found[i]) for i, info in enumerate(infos)]
    meta = plain(record, "url", "could_have_url_duplicate") | {"similarity_model": SIMILARITY}
    yield matched(config, config.placement, record, place, "mmc4", None, pictures, meta)


def _picture(config: Mmc4, place: Place, info: Object, at: str, sentence: int, similarity: float | None) -> Picture:
    about = plain(info, "raw_url") | ({"faces": True} if info.get("face_detections") else {})
    inline = optional(info, "image_base64", str, at)
    if inline is not None:
        return Picture(sentence, similarity, name=optional(info, "image_name", str, at), inline=inline, about=about)
    name = required(info, "image_name", str, at)
    shard = f"{place.file.rpartition('/')[2].partition('.')[0]}/{name}"
    # some conversions give every shard a folder of its own
    if has_picture(config.images or place.folder, shard):
        name = shard
    return Picture(sentence, similarity, name=name, about=about)


SOURCE = file_source("mmc4", _documents, (*LINES, *PACKED, *TARS))
