"""Webdataset: tar archives of <key>.json in the chat form and <key>.<i>.jpg, and an index of each archive.

The key is the document's number, with leading zeros. `train-000000.tsv` has a line `member, offset, size` for each
member of `train-000000.tar`, so that one can be read without the others. Archives are written here byte by byte: the
same documents give the same ones. They are read by `sources/embedded.py`: no pipes, no pickles, no links, nothing is
unpacked.
"""

import tarfile
from pathlib import Path

from weft.data.exchange.files import Files
from weft.data.exchange.form import (
    DATA,
    WITHIN_RECORD,
    Fitted,
    Form,
    Lack,
    named,
    record_bytes,
    suffix_of,
    within_record,
)
from weft.data.sources.files.tars import MAX_MEMBERS
from weft.document import Document, Image
from weft.errors import UsageError

SHARD_BYTES = 256 * 2**20
"""An archive holds at most so many, unless one document alone has more."""
_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK
_DIGITS = 9


class _Shards:
    def __init__(self, files: Files) -> None:
        self._files = files
        whole = [name for name in files.names if name.endswith(".tar")]
        self._shard = max(len(whole) - 1, 0)
        self._number = sum(1 for name in whole for member in index_of(files.folder / name) if member.endswith(".json"))
        files.append(self._archive, b"")
        files.append(self._index, b"")

    @property
    def _archive(self) -> str:
        return f"{DATA}-{self._shard:06d}.tar"

    @property
    def _index(self) -> str:
        return f"{DATA}-{self._shard:06d}.tsv"

    def add(self, document: Document) -> None:
        key = f"{self._number:0{_DIGITS}d}"
        self._number += 1
        document = named(document, lambda i, image: f"{key}.{i}.{suffix_of(image.data or b'')}")
        members = [(f"{key}.json", record_bytes(document.to_json()))]
        members += [(str(image.path), image.data or b"") for image in document.images]
        blocks = [_member(name, data) for name, data in members]
        size = self._files.size(self._archive)
        if size and size + sum(map(len, blocks)) + _END > SHARD_BYTES:
            self.close()
            self._shard += 1
        for (name, data), block in zip(members, blocks, strict=True):
            offset = self._files.size(self._archive) + _BLOCK
            self._files.append(self._archive, block)
            self._files.append(self._index, f"{name}\t{offset}\t{len(data)}\n".encode())

    def close(self) -> None:
        self._files.append(self._archive, b"\0" * _END)


def index_of(archive: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of every member of an archive.

    Raises:
        UsageError: it has no index.
    """
    index = archive.with_suffix(".tsv")
    try:
        lines = index.read_text().splitlines()
    except OSError as error:
        raise UsageError("the archive has no index", where=str(index), fix="export the dataset again") from error
    found = {}
    for line in lines:
        name, offset, size = line.split("\t")
        found[name] = int(offset), int(size)
    return found


def read_member(archive: Path, offset: int, size: int) -> bytes:
    """One member, by what its index says."""
    with open(archive, "rb") as handle:
        handle.seek(offset)
        return handle.read(size)


def _member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(data), 0o644, 0
    return header.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % _BLOCK)


def _fit(document: Document) -> Fitted:
    pictures = sum(isinstance(part, Image) for part in document.parts)
    if pictures >= MAX_MEMBERS:
        return None, (Lack("too_many_pictures", f"{pictures} pictures"),)
    return within_record(document)


FORM = Form(
    lacks={"too_many_pictures": f"more than {MAX_MEMBERS - 1} pictures in one document", **WITHIN_RECORD},
    fit=_fit,
    write=_Shards,
    sources=lambda path: [{"kind": "embedded", "path": str(path)}],
    data=f"{DATA}-*.tar",
    usage="`webdataset.WebDataset(urls)` with the archives as `urls`; a sample's `json` names its pictures.",
)
