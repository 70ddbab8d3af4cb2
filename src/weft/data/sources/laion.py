"""LAION-style pairs: webdataset archives, JSONL, or the Parquet tables of URLs and captions.

*.tar        <key>.jpg|png|webp, <key>.txt or the `caption` of <key>.json
*.jsonl      {image or url, caption or text}
*.parquet    URL, top_caption or TEXT; the picture is looked for in `images` under the SHA-256 of its URL
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import PICTURES, FileSource, decode_utf8, parse_json
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import Object, first_of, of_type, plain
from weft.data.sources.files import ARRAYS, LINES, ROWS, TARS, Place, file_source
from weft.data.sources.files.tars import Sample
from weft.data.sources.rules.pairs import Order, caption_of, pair
from weft.data.sources.rules.parallel import remote_image
from weft.data.stage import Record, RecordError

_CAPTIONS = ("top_caption", "caption", "TEXT", "text")
_URLS = ("URL", "url")
_SCORES = ("similarity", "punsafe", "pwatermark", "WIDTH", "HEIGHT", "LICENSE", "license")


class Laion(FileSource):
    """Files of pairs."""

    kind: Literal["laion"] = "laion"
    order: Order = "random"
    """Which of a pair comes first; `random` is drawn from the document's id."""
    lower: bool = False
    """Put captions into lower case, as MM-Interleaved does."""


def _documents(config: Laion, value: Any, place: Place) -> Iterator[Record]:
    if isinstance(value, Sample):
        yield _sample(config, value, place)
        return
    record = of_type(value, dict, "record")
    key = first_of(record, _CAPTIONS)
    caption = caption_of(record[key], key, lower=config.lower)
    draft = Draft(config, place)
    url = next((record[key] for key in _URLS if record.get(key) is not None), None)
    name = identity("laion", None, [url, record.get("image"), caption])
    if record.get("image") is not None:
        picture = draft.image(record["image"], "image")
    else:
        field = first_of(record, ("image", *_URLS))
        picture = remote_image(draft, of_type(url, str, field), field, {})
    meta = plain(record, *_SCORES) | ({"url": url} if isinstance(url, str) else {})
    yield draft.record(name, pair(draft, name, picture, caption, key, config.order), meta)


def _sample(config: Laion, sample: Sample, place: Place) -> Record:
    picture = next((kind for kind in sample.files if f".{kind}" in PICTURES), None)
    if picture is None:
        raise RecordError("missing_key", "sample holds no picture", field="jpg")
    about: Object = {}
    if "json" in sample.files:
        about = of_type(parse_json(sample.files["json"]), dict, "json")
    if "txt" in sample.files:
        key, found = "txt", decode_utf8(sample.files["txt"])
    else:
        key = first_of(about, _CAPTIONS)
        found = about[key]
    caption = caption_of(found, key, lower=config.lower)
    draft = Draft(config, place)
    name = identity("laion", f"{place.file}/{sample.key}", None)
    shown = draft.image({"bytes": sample.files[picture], "path": f"{sample.key}.{picture}"}, picture)
    return draft.record(name, pair(draft, name, shown, caption, key, config.order), plain(about, *_SCORES, "url"))


SOURCE = file_source("laion", _documents, (*LINES, *ARRAYS, *ROWS, *TARS))
