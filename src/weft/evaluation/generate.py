"""First step: a model answers a task's samples into `predictions.jsonl` and `pictures/`.

A sample is done when its line is whole; its pictures are written before it. What was stopped goes on with the samples
that have no line, and comes to the same: a request's answer depends on its prompt, its settings and the engine's slots.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field, PositiveInt

from weft.atomic import write_bytes
from weft.config import Config, load_config
from weft.document import Document, Image, Part, Turn
from weft.errors import UsageError
from weft.evaluation.journal import EvaluationError, fingerprint
from weft.evaluation.metric import describe_weights
from weft.evaluation.records import Prediction, picture_path
from weft.evaluation.run import Run, open_run, sample_facts, versions
from weft.evaluation.task import Place, Protocol, Sample, Task, TaskConfig
from weft.images import decode_image

if TYPE_CHECKING:
    from weft.backbones.base import Backbone
    from weft.generation import Answer, Event

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
    best_of: PositiveInt | None = None
    """Answers to each prompt, from as many seeds; kept is the one whose picture is most like the caption, by CLIP
    ViT-L/14. None: as many as the task's variant has it."""
    clip_l14: Path | None = None
    """That CLIP, a folder of transformers."""


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
    wanted = _resolved(task, config.variant or task.variants[0], generation)
    chooser = _Chooser.of(samples, generation.clip_l14, wanted)
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
            run.predictions.append(
                _told(_answers(left, place, backbone, wanted, run, chooser), say, len(samples), len(left))
            )
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


def _resolved(task: Task, variant: str, generation: GenerationConfig) -> dict[str, Any]:
    """Every setting spelled out; flags lie over the variant's, and these over the task's own."""
    from weft.generation import BeamConfig, SamplingConfig

    protocol = task.protocols.get(variant, Protocol())
    sampling = load_config(SamplingConfig, overrides={**task.sampling, **protocol.sampling, **generation.sampling})
    beams = task.beams if generation.beams is None and not generation.sampling else generation.beams
    found = None if beams is None else load_config(BeamConfig, overrides=beams).model_dump(mode="json")
    best_of = generation.best_of or protocol.best_of
    return {
        "sampling": sampling.model_dump(mode="json"),
        "beams": found,
        "slots": generation.slots,
        "context": generation.context,
        **(_best(best_of, generation.clip_l14) if best_of > 1 else {}),
        **({"protocol": dict(protocol.facts)} if protocol.facts else {}),
    }


def _best(of: int, clip: Path | None) -> dict[str, Any]:
    if clip is None:
        raise UsageError(
            f"of {of} answers the one most like its caption is kept, by CLIP ViT-L/14, which is not given",
            where="weights.clip_l14",
            fix="give its folder, or make one answer to each prompt: --best_of 1",
        )
    return {"best_of": of, "chosen_by": describe_weights(clip)}


class _Chooser:
    """Of several answers to one caption the one whose first picture is most like it."""

    def __init__(self, clip: Path) -> None:
        from weft.scorers import CLIP

        self._clip = CLIP(clip)

    @classmethod
    def of(cls, samples: Sequence[Sample], clip: Path | None, settings: Mapping[str, Any]) -> "_Chooser | None":
        """None where there is one answer to each prompt.

        Raises:
            UsageError: an answer cannot be compared with anything.
        """
        if clip is None or "best_of" not in settings:
            return None
        for sample in samples:
            if not sample.reference.get("caption") or sample.options or settings["beams"] is not None:
                raise UsageError(
                    f"sample {sample.id} does not ask for a picture of a caption",
                    where="best_of",
                    fix="choose among answers of tasks that make pictures of texts",
                )
        return cls(clip)

    def best(self, sample: Sample, candidates: Sequence["list[Answer]"]) -> "list[Answer]":
        """The first of the best ones; one without a picture is the worst."""
        pictures = [next((p for a in rounds for p in a.parts if isinstance(p, Image)), None) for rounds in candidates]
        seen = [i for i, picture in enumerate(pictures) if picture is not None]
        if not seen:
            return candidates[0]
        decoded = [decode_image(picture.data or b"") for picture in pictures if picture is not None]
        likeness = self._clip.cosines(decoded, [sample.reference["caption"]])[:, 0].tolist()
        return candidates[max(zip(likeness, seen, strict=True), key=lambda pair: pair[0])[1]]


def _told(predictions: Iterator[Prediction], say: Say, total: int, left: int) -> Iterator[dict[str, Any]]:
    for prediction in predictions:
        left -= 1
        yield prediction.to_json()
        say(total - left, total)


def _answers(
    samples: Sequence[Sample],
    place: Place,
    backbone: "Backbone",
    settings: Mapping[str, Any],
    run: Run,
    chooser: "_Chooser | None",
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
    yield from _drawn(free, place, backbone, settings, run, chooser)


@dataclass
class _Open:
    """One answer on its way."""

    sample: Sample
    candidate: int
    document: Document
    before: "list[Answer]"
    """Of earlier rounds."""
    events: "list[Event]" = field(default_factory=list)


def _drawn(
    samples: Sequence[Sample],
    place: Place,
    backbone: "Backbone",
    settings: Mapping[str, Any],
    run: Run,
    chooser: "_Chooser | None",
) -> Iterator[Prediction]:
    """Answers of an engine that is given the next prompt whenever it has room."""
    from weft.generation import Engine, Finished, SamplingConfig, collect

    engine = Engine(backbone, slots=settings["slots"], context=settings["context"])
    base, best_of = SamplingConfig.model_validate(settings["sampling"]), settings.get("best_of", 1)
    waiting = ((sample, candidate) for sample in samples for candidate in range(best_of))
    open_: dict[int, _Open] = {}
    candidates: dict[str, dict[int, list[Answer]]] = {}

    def ask(each: _Open) -> None:
        # a round draws from another seed than the one before, and a candidate than the others
        own = {**({"seed": base.seed + len(each.before)} if each.before else {}), **each.sample.sampling}
        if best_of > 1:
            own["seed"] = own.get("seed", base.seed) * best_of + each.candidate
        if "seed" in own:
            own["seed"] %= 2**63
        config = base if not own else load_config(SamplingConfig, overrides={**_flat(base.model_dump()), **own})
        open_[engine.submit(each.document, config)] = each

    def fill() -> None:
        while engine.waiting + engine.running < settings["slots"]:
            following = next(waiting, None)
            if following is None:
                return
            ask(_Open(*following, _loaded(following[0].prompt, place), []))

    fill()
    while open_:
        for event in engine.run():
            each = open_[event.request]
            each.events.append(event)
            if not isinstance(event, Finished):
                continue
            del open_[event.request]
            sample, answers = each.sample, [*each.before, collect(each.events)]
            if len(answers) <= len(sample.then):
                following = tuple(place.loaded(part) for part in sample.then[len(each.before)])
                said = (Turn("assistant", answers[-1].parts), Turn("user", following))
                document = Document((*each.document.turns, *said), each.document.id)
                ask(_Open(sample, each.candidate, document, answers))
            elif chooser is None:
                yield _written(sample, answers, run)
            else:
                made = candidates.setdefault(sample.id, {})
                made[each.candidate] = answers
                if len(made) == best_of:
                    best = chooser.best(sample, [made[i] for i in range(best_of)])
                    del candidates[sample.id]
                    yield _written(sample, best, run)
            fill()


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
