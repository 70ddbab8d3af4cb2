"""Reading a dataset: by number, one row group at a time; and a chat-form JSONL file as if it were one."""

import hashlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from weft.atomic import MANIFEST, sha256_of, verify_folder
from weft.data.shards import SCHEMA, fingerprint_of, from_row
from weft.data.sources.chat_jsonl import ChatJsonl, plan, read
from weft.document import Document
from weft.errors import CheckpointError, DocumentError, UsageError

_OPEN = 4
"""Row groups kept in memory: random reading hits few twice, sequential reading needs one."""


class Dataset(Protocol):
    """Documents by number, their pictures holding bytes."""

    fingerprint: str
    """Hash of the content: the same documents in the same order have the same."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


def open_dataset(path: Path | str) -> Dataset:
    """Open a dataset folder made by `weft data build`, or a JSONL file in the chat form.

    Raises:
        UsageError: `path` is neither.
        CheckpointError: a file of the dataset is missing or differs from the manifest.
        DocumentError: a line of the JSONL file is not a document; names file, line and reason.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".jsonl":
        return ChatDataset(path)
    if (path / MANIFEST).is_file():
        return ParquetDataset(path)
    raise UsageError(
        "neither a dataset folder nor a .jsonl file" if path.exists() else "there is no such dataset",
        where=str(path),
        fix=f"make one: weft data build {path} --out DATASET" if path.exists() else "check the path",
    )


class ParquetDataset:
    """A dataset folder, verified when it is opened. May be sent to other processes: they open the files themselves."""

    def __init__(self, folder: Path) -> None:
        verify_folder(folder)
        self._files = sorted(folder.glob("*.parquet"))
        if not self._files:
            raise CheckpointError(
                "folder holds no Parquet file", where=str(folder), fix="weft data build makes datasets"
            )
        self.fingerprint = fingerprint_of(map(sha256_of, self._files))
        self._groups: list[tuple[Path, int]] = []
        sizes = []
        for file in self._files:
            metadata = pq.read_metadata(file)
            if not metadata.schema.to_arrow_schema().equals(SCHEMA):
                raise CheckpointError("columns are not those of a dataset", where=str(file))
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group))
                sizes.append(metadata.row_group(group).num_rows)
        self._ends = list(accumulate(sizes))
        self._tables: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        (row,) = self._table(group).slice(index - start, 1).to_pylist()
        return from_row(row)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def _table(self, group: int) -> pa.Table:
        table = self._tables.pop(group, None)
        if table is None:
            file, number = self._groups[group]
            table = pq.ParquetFile(file).read_row_group(number)
        self._tables[group] = table  # the last one used goes to the end
        if len(self._tables) > _OPEN:
            del self._tables[next(iter(self._tables))]
        return table


class ChatDataset:
    """A JSONL file in the chat form, every line a document. Held in memory with its pictures: for small files."""

    def __init__(self, file: Path) -> None:
        config = ChatJsonl(path=file)
        digest = hashlib.sha256(file.read_bytes())
        self._documents: list[Document] = []
        for unit in plan(config).units:
            for record in read(config, unit):
                if record.document is None:
                    loss = record.losses[0]
                    raise DocumentError(
                        loss.message,
                        where=f"{file}, line {record.line}" + (f", field {loss.field}" if loss.field else ""),
                        fix=f"mend the line, or drop such lines: weft data build {file} --out DATASET",
                    )
                self._documents.append(record.document)
                digest.update("".join(image.sha256 for image in record.document.images).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._documents[index]
