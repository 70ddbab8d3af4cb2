"""MM-Interleaved's shards of pairs: text files, every line {image, caption} as JSON or as a Python literal.

A literal is read by the parser for literals, which builds values and runs nothing.
"""

import ast
import warnings
from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource, check_unicode, decode_utf8, parse_json
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import of_type, present, required
from weft.data.sources.files import LINES, TEXT, Place, file_source
from weft.data.sources.rules.pairs import Order, caption_of, pair
from weft.data.stage import Record, RecordError

_MAX_LITERAL = 2**16
"""Bytes: the parser's memory is a large multiple of them."""


class PairShards(FileSource):
    """Text or JSONL files; pictures are relative to `images`."""

    kind: Literal["pair_shards"] = "pair_shards"
    order: Order = "random"
    """Which of a pair comes first; `random` is drawn from the document's id."""
    lower: bool = True
    """Put captions into lower case, as MM-Interleaved does."""


def _parse(line: bytes) -> Any:
    try:
        return parse_json(line)
    except RecordError as error:
        if error.reason != "broken_json" or len(line) > _MAX_LITERAL:
            raise
        return _literal(decode_utf8(line).strip(), error)


def _literal(text: str, error: RecordError) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about backslashes in strings
            value = ast.literal_eval(text)
        return check_unicode(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as other:
        raise RecordError("broken_json", f"neither JSON nor a Python literal: {error.what}") from other


def _documents(config: PairShards, value: Any, place: Place) -> Iterator[Record]:
    record = of_type(value, dict, "record")
    path = required(record, "image", str)
    caption = caption_of(present(record, "caption"), "caption", lower=config.lower)
    draft = Draft(config, place)
    name = identity("pair_shards", None, [path, caption])
    yield draft.record(name, pair(draft, name, draft.image(path, "image"), caption, "caption", config.order), {})


SOURCE = file_source("pair_shards", _documents, (*TEXT, *LINES), parse=_parse)
