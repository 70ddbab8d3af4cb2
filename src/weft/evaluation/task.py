"""A task: samples made of a benchmark's released files, with the papers' prompts, and what answers are scored by.

    Task.read(Place) -> Sample, Sample, ...      the same order and ids on every machine

Pictures of prompts and references are named by path where they are files, and read when they are needed; a release that
packs its pictures into its table gives their bytes.
"""

import difflib
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from weft.config import Config
from weft.document import Document, Image, Part, Text
from weft.errors import ImageError, UsageError
from weft.evaluation.journal import EvaluationError
from weft.images import read_image


@dataclass(frozen=True)
class Sample:
    """One thing to answer."""

    id: str
    prompt: Document
    reference: Mapping[str, Any] = field(default_factory=dict)
    """What metrics compare with, as JSON; pictures by their path."""
    then: tuple[tuple[Part, ...], ...] = ()
    """What is said after each answer but the last; the model reads its own earlier answers."""
    facets: Mapping[str, str] = field(default_factory=dict)
    """Name -> value: results are broken down by them."""
    unit: str | None = None
    """Samples of one unit are drawn together when intervals are made; None: it stands by itself."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Of `SamplingConfig`, for this sample alone, by dotted paths."""
    options: tuple[str, ...] = ()
    """Not to be answered but ranked: each gets the model's log-probability of it."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the data's fingerprint is made of."""
        return (self.id, dict(self.reference))

    @property
    def prompt_hash(self) -> str:
        """Of everything the model is given."""
        said = [[turn.role, *map(_plain, turn.parts)] for turn in self.prompt.turns]
        later = [list(map(_plain, parts)) for parts in self.then]
        text = json.dumps([said, later, list(self.options)], ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


class Place:
    """The released files of a task: a folder, whose archives (zip) are looked into as well."""

    def __init__(self, root: Path | None, split: str, variant: str) -> None:
        self._root, self.split, self.variant = root, split, variant

    @property
    def root(self) -> Path:
        """
        Raises:
            UsageError: no folder was given, or there is none.
        """
        if self._root is None:
            raise UsageError(
                "this task reads released files", where="--data", fix="give their folder; `weft eval list` says which"
            )
        if not self._root.is_dir():
            raise UsageError("there is no such folder", where=str(self._root), fix="check --data")
        return self._root

    def file(self, *names: str) -> Path:
        """The first of these that there is.

        Raises:
            UsageError: none is.
        """
        for name in names:
            if (self.root / name).is_file():
                return self.root / name
        raise UsageError(
            f"the released file {' or '.join(names)} is not there", where=str(self.root), fix="check --data and --split"
        )

    def json(self, *names: str) -> Any:
        return read_json(self.file(*names))

    def lines(self, *names: str) -> Iterator[Any]:
        """The objects of a file of JSON lines."""
        file = self.file(*names)
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, f"{file}, line {number}")

    def picture(self, path: str) -> bytes:
        """
        Raises:
            ImageError, PathError: it is not there, or not below the folder.
        """
        try:
            return read_image(self.root, path)
        except ImageError:
            archive = self._archived.get(path)
            if archive is None:
                raise
        with zipfile.ZipFile(archive[0]) as opened:
            return opened.read(archive[1])

    def loaded(self, part: Part) -> Part:
        """The same, a picture with its bytes."""
        if isinstance(part, Text) or part.data is not None or part.path is None:
            return part
        return Image(self.picture(part.path), part.path)

    @cached_property
    def _archived(self) -> dict[str, tuple[Path, zipfile.ZipInfo]]:
        """Members of archives, by their path in the archive and with the archive's name before it."""
        found: dict[str, tuple[Path, zipfile.ZipInfo]] = {}
        for archive in sorted(self.root.rglob("*.zip")):
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    for name in (member.filename, f"{archive.stem}/{member.filename}"):
                        found.setdefault(name, (archive, member))
        return found


def read_json(file: Path) -> Any:
    return _parse(file.read_text(encoding="utf-8-sig"), str(file))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"not JSON: {error}", where=where, fix="download the file again") from error


def _plain(part: Part) -> list[str]:
    if isinstance(part, Text):
        return ["text", part.text]
    return ["image", part.path if part.data is None else part.sha256]  # type: ignore[list-item]


@dataclass(frozen=True)
class Protocol:
    """What a variant changes in how answers are made, and what else its numbers depend on."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Over the task's."""
    best_of: int = 1
    """Answers of which the one is kept whose picture is most like its caption, by CLIP ViT-L/14."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the summary, as JSON."""


@dataclass(frozen=True)
class Task:
    """One row of the table."""

    about: str
    """One line."""
    layout: str
    """Which released files it reads, from the folder that `--data` names; empty: none."""
    read: Callable[[Place], Iterable[Sample]]
    metrics: tuple[str, ...]
    """What scores it unless others are asked for."""
    splits: tuple[str, ...] = ("test",)
    """The first is the default."""
    variants: tuple[str, ...] = ("default",)
    """Of prompts or protocol, where the literature has several; the first is the default."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Of `SamplingConfig`, by dotted paths: as the papers decode."""
    beams: Mapping[str, Any] | None = None
    """Of `BeamConfig`, where the papers search for a text."""
    protocols: Mapping[str, Protocol] = field(default_factory=dict)
    """Of the variants that differ in more than what `read` gives."""


class TaskConfig(Config):
    """Which task, and of which files."""

    name: str
    data: Path | None = None
    """The folder of the released files."""
    split: str | None = None
    variant: str | None = None
    limit: PositiveInt | None = None
    """Only so many samples, from the first on: a subset, which the summary says."""


def choose(config: TaskConfig, tasks: Mapping[str, Task]) -> tuple[Task, TaskConfig, Place]:
    """The task, its settings without gaps, and its files.

    Raises:
        UsageError: there is no such task, split or variant.
    """
    task = tasks[one_of(config.name, tasks, "task")]
    split = one_of(config.split or task.splits[0], task.splits, f"split of {config.name}")
    variant = one_of(config.variant or task.variants[0], task.variants, f"variant of {config.name}")
    whole = config.model_copy(update={"split": split, "variant": variant})
    return task, whole, Place(config.data, split, variant)


def one_of(name: str, known: Iterable[str], what: str) -> str:
    names = sorted(known)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}"
    raise UsageError(f"there is no {what} {name!r}", where="weft eval", fix=fix)


def required(record: Mapping[str, Any], key: str, where: str) -> Any:
    """A field of a released record.

    Raises:
        EvaluationError: it has none.
    """
    if key not in record:
        raise EvaluationError(f"a record has no field {key!r}", where=where, fix="these are not the released files")
    return record[key]
