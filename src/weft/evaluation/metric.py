"""A metric: from one answer to values, from all records to a number. Arithmetic is in `metrics/`; this is its shape.

    measure(answers, context) -> Measured ...       may need weights or a judge
    aggregate(records) -> {name: number}            needs nothing but the records; `means` unless said otherwise

A name is family/variant, because the literature disagrees; there is no unnamed default.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from weft.atomic import sha256_of
from weft.config import Config
from weft.document import Image
from weft.errors import UsageError
from weft.evaluation.journal import fingerprint
from weft.evaluation.records import Prediction, Record, Status, with_pictures
from weft.evaluation.task import Place, Sample
from weft.images import decode_image

if TYPE_CHECKING:
    from PIL import Image as PILImage


class Answered:
    """A sample with its prediction; pictures are read when they are asked for."""

    def __init__(self, sample: Sample, prediction: Prediction, place: Place, root: Path) -> None:
        self.sample, self.prediction, self.place, self._root = sample, prediction, place, root

    @property
    def id(self) -> str:
        return self.sample.id

    @property
    def text(self) -> str:
        return self.prediction.text.strip()

    @cached_property
    def loaded(self) -> Prediction:
        """With the bytes of its pictures."""
        return with_pictures(self.prediction, self._root)

    def pictures(self) -> list["PILImage.Image"]:
        return [decode_image(each.data or b"", where=self.id) for each in self.loaded.images]

    def reference_picture(self, path: str) -> "PILImage.Image":
        return decode_image(self.place.picture(path), where=f"{self.id}: {path}")

    def prompt_images(self) -> list[Image]:
        return [self.place.loaded(each) for each in self.sample.prompt.images]  # type: ignore[misc]


@dataclass(frozen=True)
class Measured:
    """What a metric makes of one answer; see `Record`."""

    id: str
    values: Mapping[str, float | None]
    normalised: str = ""
    status: Mapping[str, Status] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


class WeightsConfig(Config):
    """Files that are never bundled. A metric without its own is skipped and says so."""

    clip_b32: Path | None = None
    """OpenAI CLIP ViT-B/32, a folder of transformers."""
    clip_l14: Path | None = None
    """OpenAI CLIP ViT-L/14, a folder of transformers."""
    dino: Path | None = None
    """DINO v1 ViT-S/16, a folder of transformers."""
    inception: Path | None = None
    """The Inception network of 2015-12-05, safetensors."""
    real_statistics: Path | None = None
    """FID: a folder that keeps what real pictures come to from run to run, or the file of one set of pictures, which
    stands for the task's own."""
    lpips: Path | None = None
    """AlexNet's features, safetensors."""
    lpips_linear: Path | None = None
    """LPIPS' linear layers for it, safetensors."""
    detections: Path | None = None
    """GenEval: a file of JSON lines {id, image, detections: {class: [{box, score, color}]}}."""
    labels: Path | None = None
    """ADE20K: a folder of PNG files <id>.png with the labels 0..149 of the generated pictures."""


@dataclass
class Context:
    """What metrics may use besides answers."""

    weights: WeightsConfig
    folder: Path
    """Of the run: for caches."""
    batch: PositiveInt = 16
    judge: Any = None
    """A `weft.evaluation.judge.Judge`, or None."""
    answers: "Sequence[Answered]" = ()
    """All that are scored, those that are measured already as well."""
    loaded: dict[str, Any] = field(default_factory=dict)
    """Networks that metrics share."""

    def network(self, name: str, load: Callable[[Path], Any]) -> Any:
        """What the weights called `name` hold, loaded once.

        Raises:
            LacksWeights: they were not given.
        """
        if name not in self.loaded:
            self.loaded[name] = load(self.file(name))
        return self.loaded[name]

    def file(self, name: str) -> Path:
        file: Path | None = getattr(self.weights, name)
        if file is None:
            about = WeightsConfig.model_fields[name].description
            raise LacksWeights(f"weights.{name} is not given: {about}")
        return file


def describe_weights(path: Path) -> dict[str, str]:
    """Name and hash; of a folder the hash of its files' names and hashes.

    Raises:
        UsageError: there is no such file or folder.
    """
    if path.is_file():
        return {"name": path.name, "sha256": sha256_of(path)}
    if not path.is_dir():
        raise UsageError("these weights are not there", where=str(path), fix="check the path under weights")
    files = sorted(each for each in path.rglob("*") if each.is_file())
    return {"name": path.name, "sha256": fingerprint([each.name, sha256_of(each)] for each in files)}


class LacksWeights(Exception):
    """A metric cannot be computed here; the message says which file it wants."""


Measure = Callable[[Sequence[Answered], Context], Iterable[Measured]]
Aggregate = Callable[[Sequence[Record]], Mapping[str, float]]


def means(records: Sequence[Record]) -> dict[str, float]:
    """The mean of every value over the records that have it."""
    names = dict.fromkeys(name for record in records for name in record.values)
    found = {}
    for name in names:
        values = [value for record in records if (value := record.values.get(name)) is not None]
        if values:
            found[name] = math.fsum(values) / len(values)
    return found


@dataclass(frozen=True)
class Sums:
    """An aggregate that is a formula of sums over records: BLEU, F1, shares by class."""

    columns: Callable[[Record], Sequence[float]]
    formula: Callable[[Sequence[float]], Mapping[str, float]]

    def __call__(self, records: Sequence[Record]) -> Mapping[str, float]:
        return self.formula([math.fsum(column) for column in zip(*map(self.columns, records), strict=True)])


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    about: str
    """One line: what is computed, of what."""
    measure: Measure
    aggregate: Aggregate = means
    version: int = 1
    """Goes up when a value can change."""
    whole: bool = False
    """A sample's value depends on the other samples, as with document frequencies."""
    intervals: bool = True
    """False where drawing samples again would be too dear, or mean nothing."""
    digits: int = 2
    scale: float = 1.0
    """Rounded values are multiplied by it, as tables print them."""
    lower_is_better: bool = False
    needs: tuple[str, ...] = ()
    """Fields of `WeightsConfig`."""
    uses: tuple[str, ...] = ()
    """More of them, that it can do without; with them its values are others."""
    judged: bool = False
    """A judge is asked; its name becomes part of the metric's."""
    lacks: Callable[[], str | None] = lambda: None
    """What else has to be installed and is not here."""
    beside: tuple[str, ...] = ()
    """Metrics without which this one misleads: they are scored with it, asked for or not."""


def each(function: Callable[[Answered, Context], Measured]) -> Measure:
    """A measure that looks at one answer at a time."""

    def measure(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
        for answer in answers:
            yield function(answer, context)

    return measure
