"""The files of an export while they grow: how far they are can be marked, and what came after a mark is cut off."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO


class Files:
    """Files that grow at their ends, and small ones that are put there whole, in one folder.

    Args:
        sizes: of the files that grow, as marked; None: there is nothing to go on with, and the folder is emptied.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int] | None) -> None:
        self.folder = folder
        self._sizes: dict[str, int] = {}
        self._handles: dict[str, IO[bytes]] = {}
        self._unsynced: set[str] = set()
        self.written = 0
        """Bytes since the last mark."""
        if sizes is None or not all(_reaches(folder / name, size) for name, size in sizes.items()):
            sizes = None
        self.is_fresh = sizes is None
        if sizes is None:
            shutil.rmtree(folder, ignore_errors=True)
            sizes = {}
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            # folders hold what is put whole: it is put again, or found to be there
            if file.is_file() and file.name not in sizes:
                file.unlink()
        for name, size in sizes.items():
            os.truncate(folder / name, size)
            self._sizes[name] = size

    @property
    def names(self) -> list[str]:
        return sorted(self._sizes)

    def size(self, name: str) -> int:
        return self._sizes.get(name, 0)

    def append(self, name: str, data: bytes) -> None:
        if name not in self._handles:
            self._handles[name] = open(self.folder / name, "ab")  # noqa: SIM115 - closed by `mark` and `close`
        self._handles[name].write(data)
        self._sizes[name] = self.size(name) + len(data)
        self._unsynced.add(name)
        self.written += len(data)

    def put(self, name: str, data: bytes) -> None:
        """A file whose name says what it holds: one that is there stays."""
        file = self.folder / name
        if file.is_file():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        unfinished.write_bytes(data)
        os.replace(unfinished, file)
        self._unsynced.add(name)
        self.written += len(data)

    def mark(self) -> dict[str, int]:
        """The sizes of now, which are on the disk."""
        self.close()
        for name in self._unsynced:
            handle = os.open(self.folder / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self._unsynced.clear()
        self.written = 0
        return dict(self._sizes)

    def close(self) -> None:
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()


def _reaches(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size >= size
