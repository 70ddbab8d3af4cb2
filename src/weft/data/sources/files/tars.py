"""Samples of a tar archive in the webdataset form: neighbouring files with one name up to its first dot.

Names group members and tell what they hold; they are never used as paths. Nothing is unpacked to disk.
"""

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from weft.data.sources.base import MAX_RECORD, Unit
from weft.data.sources.files.lines import unpacked_limit
from weft.data.stage import RecordError
from weft.images import MAX_BYTES

MAX_MEMBERS = 64
"""Of one sample."""


@dataclass
class Sample:
    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    """By what follows the first dot of the name, in lower case: jpg, txt, json, 0.jpg."""
    error: RecordError | None = None


def units(root: Path, file: str, form: str) -> Iterator[Unit]:
    """The archive is one unit: where its members begin is known when they are read."""
    yield Unit(form, file, number=0)


def items(root: Path, unit: Unit) -> Iterator[tuple[int, Sample | RecordError]]:
    """Number and files of every sample; after damage, one more item for what cannot be reached any more."""
    number = 0
    try:
        with tarfile.open(root / unit.file, "r:*") as archive:
            for number, sample in enumerate(_samples(archive, unpacked_limit(root / unit.file)), start=1):
                yield number, sample.error or sample
            _check_end(archive)
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        yield number + 1, RecordError("damaged_file", f"archive is damaged, the rest is lost: {error}")


def _samples(archive: tarfile.TarFile, most: int) -> Iterator[Sample]:
    sample: Sample | None = None
    while (member := archive.next()) is not None:
        # all members seen so far are otherwise kept
        archive.members.clear()  # type: ignore[attr-defined]  # documented, not annotated
        if member.isdir():
            continue
        folder, slash, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        key = folder + slash + stem
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key)
        if archive.offset > most:  # behind what this member claims to hold
            raise tarfile.ReadError("it holds far more than its size")
        sample.error = sample.error or _add(sample, archive, member, kind.lower())
    if sample is not None:
        yield sample


def _add(sample: Sample, archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str) -> RecordError | None:
    if not member.isreg():
        return RecordError("archive_link", f"member {member.name!r} is a link or a device")
    if kind in sample.files:
        return RecordError("duplicate_key", f"sample holds two files .{kind}", field=kind)
    if len(sample.files) == MAX_MEMBERS:
        return RecordError("too_large", f"sample holds more than {MAX_MEMBERS} files")
    if member.size > max(MAX_BYTES, MAX_RECORD):
        return RecordError("too_large", f"member {member.name!r} has {member.size:,} bytes", field=kind)
    handle = archive.extractfile(member)
    assert handle is not None
    sample.files[kind] = handle.read()
    return None


def _check_end(archive: tarfile.TarFile) -> None:
    """A header that is none ends the reading of an archive as its proper end does: tell them apart."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("a header is not one")
