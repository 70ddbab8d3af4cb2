"""OBELICS: web pages in Parquet, texts and picture URLs side by side, metadata as JSON in text columns."""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource, OnBadImage, parse_json
from weft.data.sources.fields import Object, objects, of_type, plain, required
from weft.data.sources.files import ROWS, Place, file_source
from weft.data.sources.rules.parallel import parallel
from weft.data.stage import Record, RecordError

_KEPT = ("alt_text", "original_width", "original_height", "format")


class Obelics(FileSource):
    """Parquet files. A picture is looked for in `images` under the SHA-256 of its URL."""

    kind: Literal["obelics"] = "obelics"
    on_bad_image: OnBadImage = "image"


def _documents(config: Obelics, row: Any, place: Place) -> Iterator[Record]:
    about = [plain(entry, *_KEPT) if entry else {} for entry in _entries(row)]
    general = _nested(required(row, "general_metadata", str), "general_metadata")
    meta = plain(of_type(general, dict, "general_metadata"), "url", "warc_filename", "warc_record_offset")
    return parallel(config, row, place, "obelics", None, about, meta)


def _entries(row: Object) -> list[Object | None]:
    entries = of_type(_nested(required(row, "metadata", str), "metadata"), list, "metadata")
    return [None if entry is None else objects([entry], f"metadata[{i}]")[0] for i, entry in enumerate(entries)]


def _nested(text: str, field: str) -> Any:
    try:
        return parse_json(text.encode())
    except RecordError as error:
        raise RecordError(error.reason, f"field {field}: {error.what}", field=field) from error


SOURCE = file_source("obelics", _documents, ROWS)
