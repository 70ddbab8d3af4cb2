"""The three steps by name, each able to run alone: generate -> records -> summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from weft.config import Config
from weft.errors import UsageError
from weft.evaluation.bootstrap import RESAMPLES
from weft.evaluation.compare import Difference, compare
from weft.evaluation.generate import GenerationConfig, predict, read_samples
from weft.evaluation.judge import JudgeConfig
from weft.evaluation.judge.pairwise import duel
from weft.evaluation.measures import METRICS
from weft.evaluation.metric import WeightsConfig
from weft.evaluation.run import Run, open_run
from weft.evaluation.score import Say, ScoringConfig, score
from weft.evaluation.summary import aggregate, verify
from weft.evaluation.task import TaskConfig, choose, one_of
from weft.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from weft.backbones.loading import LoadConfig


class EvaluationConfig(Config):
    """What a file for `--config` may hold; `--metrics`, `--judge.port.model` and the like lie over it."""

    metrics: tuple[str, ...] | None = None
    """By name; None: the task's own."""
    judge: JudgeConfig | None = None
    weights: WeightsConfig = WeightsConfig()
    subset: bool = False
    """Samples without a prediction are left out instead of being an error."""
    batch: int = 16
    """Pictures that a network sees at once."""
    resamples: int = RESAMPLES
    """Draws of the bootstrap."""
    sampling: Mapping[str, Any] = Field(default_factory=dict)
    """Of `weft.generation.SamplingConfig`, by dotted paths; over the task's own."""
    beams: Mapping[str, Any] | None = None
    """Of `weft.generation.BeamConfig`: search for a text instead of drawing."""
    slots: int = 8
    """Answers written at once."""
    context: int | None = None
    """Positions of a sequence; None: the model's."""
    best_of: PositiveInt | None = None
    """Answers to each prompt, of which CLIP ViT-L/14 keeps the one most like the caption; None: as the task has it."""

    @property
    def scoring(self) -> ScoringConfig:
        names = ("metrics", "judge", "weights", "subset", "batch")
        return ScoringConfig(**{name: getattr(self, name) for name in names})

    @property
    def generation(self) -> GenerationConfig:
        names = ("sampling", "beams", "slots", "context", "best_of")
        return GenerationConfig(clip_l14=self.weights.clip_l14, **{name: getattr(self, name) for name in names})


def evaluate(
    model: str,
    task: TaskConfig,
    folder: Path,
    config: EvaluationConfig,
    *,
    adapter: Path | None = None,
    load: "LoadConfig | None" = None,
    say: Say = lambda step, done, of: None,
) -> dict[str, Any]:
    """All three steps; returns the summary. The same call in the same folder goes on where it was stopped."""
    row, whole, place = choose(task, TASKS)
    if row.layout:
        _ = place.root  # a wrong folder is said before a model is loaded
    from weft.backbones import load_model
    from weft.backbones.loading import LoadConfig
    from weft.evaluation.generate import describe_model

    loading = load or LoadConfig()
    backbone = load_model(model, adapter, loading)
    described = describe_model(model, adapter, backbone, loading.model_dump(mode="json"))
    run = predict(
        folder,
        row,
        whole,
        place,
        backbone,
        config.generation,
        described,
        say=lambda done, of: say("answers", done, of),
    )
    return rescore(run, config, say=say)


def rescore(run: Run, config: EvaluationConfig, *, say: Say = lambda step, done, of: None) -> dict[str, Any]:
    """The last two steps."""
    score(run, TASKS, METRICS, config.scoring, say=say)
    return aggregate(run, METRICS, resamples=config.resamples)


def adopt(folder: Path, task: TaskConfig, model: str) -> Run:
    """Make a folder with somebody else's `predictions.jsonl` one that can be scored.

    Raises:
        UsageError: there are no predictions.
    """
    if not (folder / "predictions.jsonl").is_file():
        raise UsageError("there is no predictions.jsonl", where=str(folder), fix="put it there, pictures beside it")
    row, whole, place = choose(task, TASKS)
    _, facts = read_samples(row, whole, place)
    described: dict[str, Any] = {"name": model, "revision": None, "adapter": None, "load": {}, "fingerprint": None}
    wanted = {"task": whole.model_dump(mode="json"), "model": described, "generation": None, "samples": facts}
    return open_run(folder, {**wanted, "made_with": None})


def keep_real(pictures: Path, variant: str, inception: Path, out: Path) -> Path:
    """The file, in the folder `out`, of all pictures below a folder, as `weights.real_statistics` takes it.

    Raises:
        UsageError: there are no pictures, or there is no such variant of FID.
    """
    from weft.evaluation.measures.pictures import FID_VARIANTS
    from weft.evaluation.measures.real import keep_statistics
    from weft.evaluation.metrics.inception import load_inception
    from weft.images import read_image

    one_of(variant, FID_VARIANTS, "variant of FID")
    found = sorted(each for each in pictures.rglob("*") if each.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if len(found) < 2:
        raise UsageError(f"there are {len(found)} pictures", where=str(pictures), fix="name a folder of two at least")
    if not inception.is_file():
        raise UsageError(
            "these weights are not there", where=str(inception), fix="name the file of Inception's weights"
        )
    return keep_statistics(
        out,
        lambda: (read_image(pictures, each.relative_to(pictures).as_posix()) for each in found),
        variant=variant,
        weights=inception,
        network=load_inception(inception),
    )


def reaggregate(folder: Path, *, resamples: int = RESAMPLES) -> dict[str, Any]:
    return aggregate(Run(folder), METRICS, resamples=resamples)


def verify_run(folder: Path) -> list[str]:
    return verify(Run(folder), METRICS)


def compare_runs(first: Path, second: Path, *, resamples: int = RESAMPLES) -> list[Difference]:
    return compare(Run(first), Run(second), METRICS, resamples=resamples)


def duel_runs(first: Path, second: Path, judge: JudgeConfig, out: Path) -> dict[str, Any]:
    return duel(Run(first), Run(second), TASKS, judge, out)


def catalogue() -> Mapping[str, Sequence[tuple[str, ...]]]:
    """Tasks and metrics, a line each."""
    tasks = [
        (name, ", ".join(row.splits), ", ".join(row.variants), ", ".join(row.metrics), row.layout or "-", row.about)
        for name, row in TASKS.items()
    ]
    metrics = [
        (
            name,
            ", ".join((*(f"weights.{each}" for each in row.needs), *(["judge"] if row.judged else []))),
            row.lacks() or "-",
            ", ".join(row.beside),
            row.about,
        )
        for name, row in METRICS.items()
    ]
    return {"tasks": tasks, "metrics": metrics}
