"""What was answered, and how each answer was scored: one line for each.

    predictions.jsonl   {"id", "prompt", "parts": [text | picture], "reason"}    pictures beside it, in `pictures/`
    records.jsonl       {"metric", "id", "raw", "normalised", "values": {name: number | null}, "status", ...}

A prediction is an ordered list of parts, the form that every other tool's prediction files can be made of.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from weft.document import Image, Part, Text
from weft.evaluation.journal import EvaluationError, fingerprint
from weft.images import read_image

Status = Literal["by_rule", "unparsed", "not_applicable", "default"]
"""Given without asking the judge; no value could be read; the task has no such value; scored by a fallback (a random
choice, say). A value without a status was scored."""


@dataclass(frozen=True)
class Prediction:
    """One answer."""

    id: str
    parts: tuple[Part, ...]
    """Pictures by their path below the run's folder, with or without bytes."""
    prompt: str = ""
    """Hash of what was asked."""
    reason: str = "stop"
    scores: tuple[float, ...] | None = None
    """Of the sample's options, where it has some."""

    @property
    def text(self) -> str:
        """The text parts, one per line."""
        return "\n".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def is_empty(self) -> bool:
        return not self.text.strip() and not self.images and self.scores is None

    def to_json(self) -> dict[str, Any]:
        """Pictures hold their bytes or were read back (`from_json`); their hash is part of the line."""
        parts = [_part_json(part) for part in self.parts]
        line: dict[str, Any] = {"id": self.id, "prompt": self.prompt, "parts": parts, "reason": self.reason}
        return line if self.scores is None else {**line, "scores": list(self.scores)}


@dataclass(frozen=True)
class Stored(Image):
    """A picture on the disk: its path, and the hash of its bytes."""

    digest: str = ""

    @property
    def sha256(self) -> str:
        return self.digest or super().sha256


def from_json(line: Mapping[str, Any], where: str) -> Prediction:
    """
    Raises:
        EvaluationError: it is no prediction.
    """
    try:
        parts = tuple(
            Text(part["text"])
            if part["type"] == "text"
            else Stored(path=str(part["image"]), digest=part.get("sha256", ""))
            for part in line["parts"]
        )
        scores = tuple(map(float, line["scores"])) if line.get("scores") is not None else None
        return Prediction(str(line["id"]), parts, line.get("prompt", ""), line.get("reason", "stop"), scores)
    except (KeyError, TypeError, ValueError) as error:
        fix = 'a line is {"id": ..., "parts": [{"type": "text", "text": ...}, {"type": "image", "image": path}]}'
        raise EvaluationError(f"a line is no prediction: {error!r}", where=where, fix=fix) from error


def with_pictures(prediction: Prediction, root: Path) -> Prediction:
    """The same, its pictures with their bytes.

    Raises:
        EvaluationError: the bytes are not those that were predicted.
        ImageError: a picture is not there.
    """
    parts: list[Part] = []
    for part in prediction.parts:
        if isinstance(part, Image) and part.data is None:
            data = read_image(root, str(part.path), where=f"prediction {prediction.id}")
            if isinstance(part, Stored) and part.digest not in ("", hashlib.sha256(data).hexdigest()):
                raise EvaluationError(
                    f"a picture of prediction {prediction.id} is not the one that was written",
                    where=str(root / str(part.path)),
                    fix="delete its line in predictions.jsonl and generate it again",
                )
            part = Image(data, part.path)
        parts.append(part)
    return Prediction(prediction.id, tuple(parts), prediction.prompt, prediction.reason, prediction.scores)


def picture_path(sample: str, number: int) -> str:
    """Where picture `number`, from 1, of a sample's answer goes."""
    name = sample if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", sample) else ""
    # names that differ only in what a file system does not keep must not meet
    tag = hashlib.sha256(sample.encode()).hexdigest()[:8]
    return f"pictures/{name and name + '-'}{tag}_{number}.png"


def predictions_fingerprint(predictions: Sequence[Prediction]) -> str:
    return fingerprint(each.to_json() for each in predictions)


@dataclass(frozen=True)
class Record:
    """One answer under one metric."""

    metric: str
    id: str
    values: Mapping[str, float | None]
    """None where `status` says why there is none."""
    raw: str = ""
    normalised: str = ""
    status: Mapping[str, Status] = field(default_factory=dict)
    empty: bool = False
    facets: Mapping[str, str] = field(default_factory=dict)
    unit: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else an aggregate is made of, or a person wants to see: a judge's replies, features, what was parsed."""
    key: str = ""
    """Of the prediction, the sample and the metric as they were."""

    def to_json(self) -> dict[str, Any]:
        line = {
            "metric": self.metric,
            "id": self.id,
            "values": dict(self.values),
            "raw": self.raw,
            "normalised": self.normalised,
        }
        optional = {
            "status": dict(self.status),
            "empty": self.empty,
            "facets": dict(self.facets),
            "unit": self.unit,
            "extra": dict(self.extra),
            "key": self.key,
        }
        return {**line, **{name: value for name, value in optional.items() if value}}

    @classmethod
    def from_json(cls, line: Mapping[str, Any], where: str) -> "Record":
        """
        Raises:
            EvaluationError: it is no record.
        """
        try:
            record = cls(**line)
        except TypeError as error:
            raise EvaluationError(f"a line is no record: {error}", where=where, fix="score again") from error
        if not isinstance(record.values, dict):
            raise EvaluationError("a record has no values", where=where, fix="score again")
        return record


def _part_json(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    known = part.data is not None or (isinstance(part, Stored) and part.digest)
    return {"type": "image", "image": part.path, **({"sha256": part.sha256} if known else {})}
