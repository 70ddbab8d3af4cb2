"""The one way to write a file or a folder: whole, or not at all.

A file is written beside its final place and renamed over it. A folder gets a manifest with the size and SHA-256 of each
of its files, written last, before it is renamed; `verify_folder` believes nothing without one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.errors import CheckpointError

MANIFEST = "manifest.json"
_CONTENT = "content"
"""The name that a folder has inside the one to which it was moved aside."""


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _written(path: Path, data: bytes) -> Iterator[str]:
    """The name of a file beside `path` that holds the data, until it is moved away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    _sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; a reader sees the old file or the new one."""
    path = Path(path)
    with _written(path, data) as name:
        os.replace(name, path)


def write_bytes_once(path: Path, data: bytes) -> None:
    """As `write_bytes`, but what is there stays: of several that write at once, the first one's file.

    A file that is never replaced can be linked at any moment.
    """
    path = Path(path)
    with _written(path, data) as name, contextlib.suppress(FileExistsError):
        os.link(name, path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it appears at `path` with a manifest, on an error nothing does.

    An existing folder at `path` is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield staging
        entries = {}
        for file in sorted(p for p in staging.rglob("*") if p.is_file()):
            entries[file.relative_to(staging).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            _sync(file)
        write_json(staging / MANIFEST, {"files": entries})
        os.chmod(staging, 0o755)
        if path.exists():
            # rename cannot replace a folder that holds files: move the old one aside first
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.replace(path, old / _CONTENT)
            try:
                os.replace(staging, path)
            except OSError:
                os.replace(old / _CONTENT, path)
                raise
            finally:
                shutil.rmtree(old)
        else:
            os.replace(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _sync(path.parent)


def clean_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in `folder`: hidden `.part` and `.old` entries, of `name` or of all.

    A folder whose writer was killed after it had moved the old one aside, and before the new one took its place, is put
    back.
    """
    for leftover in sorted(folder.glob(".*")):
        of, _, kind = leftover.name.rpartition(".")
        of = of.rpartition(".")[0].removeprefix(".")
        if kind not in ("part", "old") or name not in (None, of):
            continue
        if kind == "old" and (leftover / _CONTENT).is_dir() and not (folder / of).exists():
            os.replace(leftover / _CONTENT, folder / of)
        remove(leftover)


def remove(path: Path) -> None:
    """A file, or a folder with all in it."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_folder(path: Path) -> None:
    """Raise `CheckpointError`, naming the file, unless `path` holds exactly what its manifest says."""
    try:
        entries = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "folder has no readable manifest: it was not written to its end", where=str(path)
        ) from error
    for name, entry in entries.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError("file named in the manifest is missing", where=str(file))
        if file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
            raise CheckpointError("file differs from what the manifest recorded", where=str(file))
