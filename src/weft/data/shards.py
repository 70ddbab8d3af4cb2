"""The finished dataset: Parquet files with the pictures' encoded bytes inside, standard enough for any reader.

    id        string
    messages  list of {role, content: list of {type, text, image}, loss}
    images    list of {bytes, path}
    sha256    list of string
    meta      string (JSON)

A part of type image holds its place in `images`. Pictures keep the bytes they came with. A folder holds the data files,
`ledger.jsonl` (a line for everything that was dropped), `summary.json`, a README that names the data files, and the
manifest that makes it whole.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from weft.document import Document, Image, Part, Role, Text, Turn

ROWS, ROW_BYTES = 100, 32 * 2**20
"""A row group has at most so many rows, and so many bytes of texts and pictures unless one row alone has more."""
FILE_BYTES = 256 * 2**20
"""A file ends with the row group that reaches so many."""
LEDGER, SUMMARY, CARD = "ledger.jsonl", "summary.json", "README.md"

_PART = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.int32())])
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TURN = pa.struct([("role", pa.string()), ("content", pa.list_(_PART)), ("loss", pa.bool_())])
FEATURES: dict[str, Any] = {
    "id": {"dtype": "string", "_type": "Value"},
    "messages": [
        {
            "role": {"dtype": "string", "_type": "Value"},
            "content": [
                {
                    "type": {"dtype": "string", "_type": "Value"},
                    "text": {"dtype": "string", "_type": "Value"},
                    "image": {"dtype": "int32", "_type": "Value"},
                }
            ],
            "loss": {"dtype": "bool", "_type": "Value"},
        }
    ],
    "images": [{"_type": "Image"}],
    "sha256": [{"dtype": "string", "_type": "Value"}],
    "meta": {"dtype": "string", "_type": "Value"},
}
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(_TURN)),
        ("images", pa.list_(_IMAGE)),
        ("sha256", pa.list_(pa.string())),
        ("meta", pa.string()),
    ],
    # read by the `datasets` library, which then shows pictures as pictures
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)
_COMPRESSION = {
    field: "NONE" if field.startswith("images.list.element.bytes") else "ZSTD"
    for field in (
        "id",
        "messages.list.element.role",
        "messages.list.element.content.list.element.type",
        "messages.list.element.content.list.element.text",
        "messages.list.element.content.list.element.image",
        "messages.list.element.loss",
        "images.list.element.bytes",
        "images.list.element.path",
        "sha256.list.element",
        "meta",
    )
}


class ShardWriter:
    """Writes rows as Parquet files into an existing folder. The bytes do not depend on how the rows come in batches."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Path] = []
        self._writer: pq.ParquetWriter | None = None
        self._group: list[pa.RecordBatch] = []
        self._rows = self._row_bytes = self._file_bytes = 0

    def add(self, batch: pa.RecordBatch, sizes: Sequence[int]) -> None:
        """Rows in the columns of `SCHEMA`, and the size of each in bytes (`size_of`)."""
        first = 0
        for i, size in enumerate(sizes):
            if self._rows and (self._rows == ROWS or self._row_bytes + size > ROW_BYTES):
                self._group.append(batch.slice(first, i - first))
                self._end_group()
                first = i
            self._rows += 1
            self._row_bytes += size
        self._group.append(batch.slice(first))

    def close(self) -> list[Path]:
        """Finish the last file; the files get their names, which hold their number."""
        if self._rows or not self._files:
            self._end_group()
        self._end_file()
        names = [self._folder / f"train-{i:05d}-of-{len(self._files):05d}.parquet" for i in range(len(self._files))]
        return [file.rename(name) for file, name in zip(self._files, names, strict=True)]

    def abort(self) -> None:
        """Let go of the open file; what it holds is of no use."""
        if self._writer is not None:
            # on a full disk the end of the file cannot be written either; the first error is the one to tell
            with contextlib.suppress(OSError):
                self._writer.close()

    def _end_group(self) -> None:
        if self._writer is None:
            self._files.append(self._folder / f"{len(self._files)}.parquet")
            self._writer = pq.ParquetWriter(
                self._files[-1],
                SCHEMA,
                compression=_COMPRESSION,
                use_dictionary=False,
                write_statistics=["id"],
                write_page_index=True,
            )
        # pages end where chunks end: one chunk, or the bytes would tell how the rows came
        table = pa.Table.from_batches(self._group, schema=SCHEMA).combine_chunks()
        self._writer.write_table(table, row_group_size=ROWS)
        self._file_bytes += self._row_bytes
        self._group, self._rows, self._row_bytes = [], 0, 0
        if self._file_bytes >= FILE_BYTES:
            self._end_file()

    def _end_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._file_bytes = None, 0


def size_of(document: Document) -> int:
    """Bytes of its pictures and characters of its texts: what row groups are measured by."""
    return sum([len(part.text) if isinstance(part, Text) else len(part.data or b"") for part in document.parts])


def to_columns(documents: Sequence[Document]) -> list[pa.Array]:
    """The columns of `SCHEMA`, with a row for each document.

    Lists inside rows are built flat, and then cut: row by row takes several times as long.
    """
    turns = [turn for document in documents for turn in document.turns]
    parts = [part for turn in turns for part in turn.parts]
    pictures = [list(document.images) for document in documents]
    images = [image for each in pictures for image in each]
    numbers = iter([number for each in pictures for number in range(len(each))])
    content = _struct(
        _PART,
        ["text" if isinstance(part, Text) else "image" for part in parts],
        [part.text if isinstance(part, Text) else None for part in parts],
        [None if isinstance(part, Text) else next(numbers) for part in parts],
    )
    messages = _struct(
        _TURN,
        [turn.role for turn in turns],
        _lists([len(turn.parts) for turn in turns], content),
        [turn.loss for turn in turns],
    )
    sizes = [len(each) for each in pictures]
    return [
        pa.array([document.id for document in documents], pa.string()),
        _lists([len(document.turns) for document in documents], messages),
        _lists(sizes, _struct(_IMAGE, [image.data for image in images], [image.path for image in images])),
        _lists(sizes, pa.array([image.sha256 for image in images], pa.string())),
        pa.array([_meta_of(document) for document in documents], pa.string()),
    ]


def _struct(kind: pa.StructType, *columns: Any) -> pa.Array:
    fields = list(kind)
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, field.type)
        for field, column in zip(fields, columns, strict=True)
    ]
    return pa.StructArray.from_arrays(arrays, fields=fields)


def _lists(sizes: Iterable[int], values: pa.Array) -> pa.Array:
    offsets = pa.array([0, *itertools.accumulate(sizes)], pa.int32())
    return pa.ListArray.from_arrays(offsets, values)


def _meta_of(document: Document) -> str:
    return _META.encode(dict(document.meta)) if document.meta else "{}"


_META = json.JSONEncoder(ensure_ascii=False, sort_keys=True)


def from_row(row: Mapping[str, Any]) -> Document:
    """The document that `to_columns` made the row of."""
    images = [Image(image["bytes"], image["path"]) for image in row["images"]]
    turns = tuple(
        Turn(
            cast(Role, turn["role"]),
            tuple(_part_of(part, images) for part in turn["content"]),
            cast(bool, turn["loss"]),
        )
        for turn in row["messages"]
    )
    return Document(turns, row["id"], json.loads(row["meta"]))


def times_of(folder: Path) -> Path:
    """Where the seconds of all workers by step are: beside the dataset, for no two builds of it take as long."""
    folder = folder.resolve()
    return folder.parent / f".{folder.name}.times.json"


def fingerprint_of(hashes: Iterable[str]) -> str:
    """Names a dataset by its content: the hash of its data files' SHA-256, in order."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _part_of(part: Mapping[str, Any], images: list[Image]) -> Part:
    return Text(part["text"]) if part["type"] == "text" else images[part["image"]]
