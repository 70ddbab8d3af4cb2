"""InterleavedBench: prompts with reference answers, texts and pictures in turn. A benchmark: evaluate with it.

{id, task_name, image: [paths], conversations: [{from, value}]}; the pictures of the prompt come first in `image`, and
`<image>` marks where each stands. Documents carry `evaluation_only` in `meta`.
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import name, of_type, plain
from weft.data.sources.files import ARRAYS, LINES, Place, file_source
from weft.data.sources.rules.conversations import Message, messages_of, pictures_of, turns
from weft.data.stage import Record

_BEGIN = "<BEGIN>"


class InterleavedBench(FileSource):
    """The file of the release; pictures, unpacked from its archives, are relative to `images`."""

    kind: Literal["interleavedbench"] = "interleavedbench"


def _documents(config: InterleavedBench, value: Any, place: Place) -> Iterator[Record]:
    record = of_type(value, dict, "record")
    native = name(record, "id")
    draft = Draft(config, place)
    messages = [Message(m.role, m.text.replace(_BEGIN, ""), m.at) for m in messages_of(record)]
    meta = plain(record, "task_name", "dataset_id", "goal", "category")
    said = turns(draft, messages, pictures_of(record, ("image",)), strict=True)
    yield draft.record(identity("interleavedbench", native, None), said, {**meta, "evaluation_only": True})


SOURCE = file_source("interleavedbench", _documents, (*ARRAYS, *LINES))
