"""First step: a model answers a task's samples into `predictions.jsonl` and `pictures/`.

A sample is done when its line is whole; its pictures are written before it. What was stopped goes on with the samples
that have no line, and comes to the same: a request's answer depends on its prompt, its settings and the engine's slots.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from weft.atomic import write_bytes
from weft.config import Config, load_config
from weft.document import Document, Image, Part, Turn
from weft.evaluation.journal import EvaluationError, fingerprint
from weft.evaluation.records import Prediction, picture_path
from weft.evaluation.run import Run, open_run, sample_facts, versions
from weft.evaluation.task import Place, Sample, Task, TaskConfig

if TYPE_CHECKING:
    from weft.backbones.base import Backbone
    from weft.generation import Answer, Engine

Say = Callable[[int, int], None]
"""Told how many samples of how many are done."""


class GenerationConfig(Config):
    """How answers are made; what is not given is the task's, then the library's."""

    sampling: Mapping[str, Any] = Field(default_factory=dict)
    """Of `weft.generation.SamplingConfig`, by dotted paths."""
    beams: Mapping[str, Any] | None = None
    """Of `weft.generation.BeamConfig`: search for the likeliest text instead of drawing; `{}` is with its defaults."""
    slots: int = 8
    """Answers written at once. Part of what a result was made with."""
    context: int | None = None
    """Positions of a sequence; None: the model's."""


def predict(
    folder: Path,
    task: Task,
    config: TaskConfig,
    place: Place,
    backbone: "Backbone",
    generation: GenerationConfig,
    model: Mapping[str, Any],
    *,
    say: Say = lambda done, of: None,
) -> Run:
    """
    Args:
        task, config, place: as `choose` gives them.
        model: what run.json says of it; see `describe_model`.

    Raises:
        UsageError: the folder holds another evaluation.
        EvaluationError: two samples have one id, or there is none.
    """
    samples, facts = read_samples(task, config, place)
    wanted = _resolved(task, generation)
    run = open_run(
        folder,
        {
            "task": config.model_dump(mode="json"),
            "model": dict(model),
            "generation": wanted,
            "samples": facts,
            "made_with": versions(),
        },
    )
    with run.locked():
        done = run.read_predictions()
        left = [sample for sample in samples if sample.id not in done or done[sample.id].prompt != sample.prompt_hash]
        say(len(samples) - len(left), len(samples))
        if left:
            run.predictions.append(_told(_answers(left, place, backbone, wanted, run), say, len(samples), len(left)))
            done = run.read_predictions()
        run.predictions.settle(done[sample.id].to_json() for sample in samples)
    return run


def read_samples(task: Task, config: TaskConfig, place: Place) -> tuple[list[Sample], dict[str, Any]]:
    """The samples asked for, and what run.json says of them; the data's fingerprint is always of all of them."""
    samples: list[Sample] = []
    identities: list[str] = []
    known: set[str] = set()
    for sample in task.read(place):
        if sample.id in known:
            raise EvaluationError(f"two samples have the id {sample.id}", where=str(config.data or config.name))
        known.add(sample.id)
        identities.append(fingerprint([sample.identity]))
        if config.limit is None or len(samples) < config.limit:
            samples.append(sample)
    if not samples:
        raise EvaluationError(
            f"split {config.split} has no samples",
            where=str(config.data or config.name),
            fix="check --data and --split",
        )
    return samples, sample_facts(samples, len(identities), fingerprint([config.name, config.split, *identities]))


def describe_model(name: str, adapter: Path | None, backbone: "Backbone", load: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies a model: its names, and a fingerprint of some numbers of every tensor."""
    found = hashlib.sha256()
    for key, tensor in sorted(cast(Any, backbone).state_dict().items()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu() if flat.is_floating_point() else flat[:64].cpu()
        found.update(f"{key} {tuple(tensor.shape)} {tensor.dtype} {some.tolist()}\n".encode())
    return {
        "name": name,
        "revision": backbone.revision,
        "adapter": None if adapter is None else str(adapter),
        "load": dict(load),
        "fingerprint": found.hexdigest(),
    }


def _resolved(task: Task, generation: GenerationConfig) -> dict[str, Any]:
    """Every setting spelled out; flags lie over the task's own."""
    from weft.generation import BeamConfig, SamplingConfig

    sampling = load_config(SamplingConfig, overrides={**task.sampling, **generation.sampling})
    beams = task.beams if generation.beams is None and not generation.sampling else generation.beams
    found = None if beams is None else load_config(BeamConfig, overrides=beams).model_dump(mode="json")
    return {
        "sampling": sampling.model_dump(mode="json"),
        "beams": found,
        "slots": generation.slots,
        "context": generation.context,
    }


def _told(predictions: Iterator[Prediction], say: Say, total: int, left: int) -> Iterator[dict[str, Any]]:
    for prediction in predictions:
        left -= 1
        yield prediction.to_json()
        say(total - left, total)


def _answers(
    samples: Sequence[Sample], place: Place, backbone: "Backbone", settings: Mapping[str, Any], run: Run
) -> Iterator[Prediction]:
    """Predictions as they are finished; pictures are on the disk by then."""
    from weft.generation import BeamConfig, collect
    from weft.generation.beams import best_text

    ranked = [sample for sample in samples if sample.options]
    free = [sample for sample in samples if not sample.options]
    if ranked:
        from weft.evaluation.likelihood import log_likelihoods

        for sample in ranked:
            scores = log_likelihoods(backbone, _loaded(sample.prompt, place), sample.options)
            yield Prediction(sample.id, (), sample.prompt_hash, "stop", tuple(scores))
    if settings["beams"] is not None:
        config = BeamConfig.model_validate(settings["beams"])
        for sample in free:
            answer = collect(best_text(backbone, _loaded(sample.prompt, place), config))
            yield _written(sample, [answer], run)
        return
    yield from _drawn(free, place, backbone, settings, run)


def _drawn(
    samples: Sequence[Sample], place: Place, backbone: "Backbone", settings: Mapping[str, Any], run: Run
) -> Iterator[Prediction]:
    """Answers of an engine that is given the next prompt whenever it has room."""
    from weft.generation import Engine, Event, Finished, SamplingConfig, collect

    engine = Engine(backbone, slots=settings["slots"], context=settings["context"])
    base = SamplingConfig.model_validate(settings["sampling"])
    waiting = iter(samples)
    open_: dict[int, tuple[Sample, Document, list[Answer], list[Event]]] = {}

    def ask(sample: Sample, document: Document, before: "list[Answer]") -> None:
        # a round draws from another seed than the one before
        own = {"seed": (base.seed + len(before)) % 2**63, **sample.sampling} if before else dict(sample.sampling)
        config = base if not own else load_config(SamplingConfig, overrides={**_flat(base.model_dump()), **own})
        open_[engine.submit(document, config)] = (sample, document, before, [])

    def fill(engine: "Engine") -> None:
        while engine.waiting + engine.running < settings["slots"]:
            sample = next(waiting, None)
            if sample is None:
                return
            ask(sample, _loaded(sample.prompt, place), [])

    fill(engine)
    while open_:
        for event in engine.run():
            sample, document, before, events = open_[event.request]
            events.append(event)
            if not isinstance(event, Finished):
                continue
            del open_[event.request]
            answers = [*before, collect(events)]
            if len(answers) <= len(sample.then):
                following = tuple(place.loaded(part) for part in sample.then[len(before)])
                said = (Turn("assistant", answers[-1].parts), Turn("user", following))
                ask(sample, Document((*document.turns, *said), document.id), answers)
            else:
                yield _written(sample, answers, run)
            fill(engine)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings by dotted paths."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def _loaded(document: Document, place: Place) -> Document:
    turns = (replace(turn, parts=tuple(place.loaded(part) for part in turn.parts)) for turn in document.turns)
    return Document(tuple(turns), document.id, document.meta)


def _written(sample: Sample, answers: "Sequence[Answer]", run: Run) -> Prediction:
    """The prediction of a sample's rounds, its pictures written."""
    parts: list[Part] = []
    number = 0
    for part in (part for answer in answers for part in answer.parts):
        if isinstance(part, Image):
            number += 1
            part = Image(part.data, picture_path(sample.id, number))
            write_bytes(run.folder / str(part.path), part.data or b"")
        parts.append(part)
    ends = [answer.reason for answer in answers if answer.reason != "stop"]
    return Prediction(sample.id, tuple(parts), sample.prompt_hash, ends[0] if ends else "stop")
