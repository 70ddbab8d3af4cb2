"""The folder of one evaluation: what was asked of which model, and everything that came of it.

run.json            task, model, settings, ids, fingerprints, versions       made by `open_run`
predictions.jsonl   and pictures/                                            made by generating
records.jsonl       scoring.json                                             made by scoring
judge.jsonl         raw replies of a judge, by what was asked                made by scoring
summary.json                                                                 made by aggregating
"""

import contextlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from weft.atomic import clean_leftovers, write_json
from weft.errors import UsageError
from weft.evaluation.journal import EvaluationError, Journal, fingerprint
from weft.evaluation.records import Prediction, Record, from_json
from weft.evaluation.task import Sample, TaskConfig, read_json

VERSION = 1
WRITTEN = ("run.json", "predictions.jsonl", "records.jsonl", "scoring.json", "summary.json")
LIBRARIES = ("weft", "numpy", "torch", "transformers", "tokenizers", "diffusers", "pillow", "pycocoevalcap")


@dataclass(frozen=True)
class Run:
    folder: Path

    @property
    def predictions(self) -> Journal:
        return Journal(self.folder / "predictions.jsonl")

    @property
    def records(self) -> Journal:
        return Journal(self.folder / "records.jsonl")

    @property
    def summary_file(self) -> Path:
        return self.folder / "summary.json"

    def facts(self) -> dict[str, Any]:
        """
        Raises:
            UsageError: this is not the folder of an evaluation.
        """
        file = self.folder / "run.json"
        if not file.is_file():
            raise UsageError(
                "this is not the folder of an evaluation: it has no run.json",
                where=str(self.folder),
                fix="name the folder that `weft eval run` made, or give --task to score predictions from elsewhere",
            )
        facts: dict[str, Any] = read_json(file)
        if facts.get("version") != VERSION:
            raise EvaluationError(
                f"written in version {facts.get('version')} of this form, not {VERSION}",
                where=str(file),
                fix="run the evaluation again in a new folder",
            )
        return facts

    def task(self) -> TaskConfig:
        return TaskConfig.model_validate(self.facts()["task"])

    def scoring(self) -> dict[str, Any]:
        """What each metric was computed with, by its name."""
        file = self.folder / "scoring.json"
        return read_json(file) if file.is_file() else {}

    def read_predictions(self) -> dict[str, Prediction]:
        """
        Raises:
            EvaluationError: there are two of one sample, or a line is damaged.
        """
        found: dict[str, Prediction] = {}
        for number, line in enumerate(self.predictions.read(), 1):
            where = f"{self.predictions.file}, line {number}"
            prediction = from_json(line, where)
            if prediction.id in found:
                raise EvaluationError(f"sample {prediction.id} is predicted twice", where=where, fix="keep one of them")
            found[prediction.id] = prediction
        return found

    def read_records(self) -> dict[str, dict[str, Record]]:
        """By metric and sample; of records written twice the later one."""
        found: dict[str, dict[str, Record]] = {}
        for number, line in enumerate(self.records.read(), 1):
            record = Record.from_json(line, f"{self.records.file}, line {number}")
            found.setdefault(record.metric, {})[record.id] = record
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone in this folder; what a killed process left half written is removed.

        Raises:
            UsageError: another process works in this folder.
        """
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                for name in WRITTEN:
                    clean_leftovers(self.folder, name)
                if (self.folder / "run.json").is_file():
                    clean_leftovers(self.folder / "pictures")
                yield
        except Timeout as error:
            raise UsageError(
                "another process works in this folder", where=str(self.folder), fix="wait for it, or name another"
            ) from error


def open_run(folder: Path, facts: Mapping[str, Any]) -> Run:
    """The run of these facts: a new folder, or one in which the same was begun.

    Raises:
        UsageError: the folder holds another evaluation; the first difference is named.
    """
    run, wanted = Run(folder), {"version": VERSION, **facts}
    with run.locked():
        if (folder / "run.json").is_file():
            difference = next(differences(run.facts(), wanted, skip=("made_with",)), None)
            if difference is not None:
                raise UsageError(
                    f"the folder holds another evaluation: {difference}",
                    where=str(folder),
                    fix="name another folder with --out",
                )
        else:
            if {each.name for each in folder.iterdir()} - {".lock", "predictions.jsonl", "pictures"}:
                raise UsageError("the folder is not empty", where=str(folder), fix="name a new folder with --out")
            write_json(folder / "run.json", wanted)
    return run


def sample_facts(samples: Sequence[Sample], of: int, data: str) -> dict[str, Any]:
    """What run.json says of the samples."""
    return {
        "n": len(samples),
        "of": of,
        "data": data,
        "prompts": fingerprint(sample.prompt_hash for sample in samples),
        "ids": [sample.id for sample in samples],
    }


def versions() -> dict[str, str]:
    """Of Python and of the libraries that change numbers."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def differences(a: Any, b: Any, path: str = "", skip: Sequence[str] = ()) -> Iterator[str]:
    """Where two JSON values differ, as `path: a, not b`; keys of the first level in `skip` are not compared."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            if path or key not in skip:
                yield from differences(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))
    elif a != b:
        if isinstance(a, list) and isinstance(b, list):
            yield f"{path} differs ({len(a)} and {len(b)} entries)"
        else:
            yield f"{path} is {a!r}, not {b!r}"
