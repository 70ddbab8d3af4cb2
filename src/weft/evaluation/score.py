"""Second step: every answer under every metric, into `records.jsonl`. Needs no model.

A record is kept as long as the prediction, the sample and the metric are what they were. A judge that fails costs
nothing that was done: its failures are never records, and the next scoring asks again for them alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from weft.atomic import write_json
from weft.config import Config
from weft.evaluation.generate import read_samples
from weft.evaluation.journal import EvaluationError, fingerprint
from weft.evaluation.judge import Judge, JudgeConfig
from weft.evaluation.metric import (
    Answered,
    Context,
    LacksWeights,
    Measured,
    Metric,
    WeightsConfig,
    describe_weights,
)
from weft.evaluation.records import Prediction, Record, predictions_fingerprint
from weft.evaluation.run import Run, versions
from weft.evaluation.summary import no_prediction
from weft.evaluation.task import Place, Task, choose, one_of

Say = Callable[[str, int, int], None]
"""Told which metric, and how many answers of how many it has measured."""


class ScoringConfig(Config):
    """What answers are scored by."""

    metrics: tuple[str, ...] | None = None
    """By name; None: the task's own."""
    judge: JudgeConfig | None = None
    weights: WeightsConfig = WeightsConfig()
    subset: bool = False
    """Samples without a prediction are left out instead of being an error."""
    batch: int = 16
    """Pictures that a network sees at once."""


def score(
    run: Run,
    tasks: Mapping[str, Task],
    metrics: Mapping[str, Metric],
    config: ScoringConfig,
    *,
    say: Say = lambda metric, done, of: None,
) -> dict[str, str]:
    """Complete the records; returns the metrics that were skipped, and what each lacks.

    Raises:
        EvaluationError: a sample has no prediction, the data are not those that were answered, or a judge gave nothing
            for some answers.
        UsageError: there is no such metric.
    """
    task, task_config, place = choose(run.task(), tasks)
    asked = [one_of(name, metrics, "metric") for name in config.metrics or task.metrics]
    beside = [one_of(other, metrics, "metric") for name in asked for other in metrics[name].beside]
    names = list(dict.fromkeys([*asked, *beside]))
    with run.locked():
        answers = _answered(run, task, task_config, place, config.subset)
        judge = None if config.judge is None else Judge.open(config.judge, run.folder / "judge.jsonl")
        context = Context(config.weights, run.folder, config.batch, judge, answers)
        scoring, now = run.scoring(), predictions_fingerprint([answer.prediction for answer in answers])
        # metrics that were asked for before stay, as long as they are of these answers
        made: dict[str, Any] = dict(scoring.get("metrics", {})) if scoring.get("predictions") == now else {}
        skipped: dict[str, str] = {}
        for name in names:
            lacks = _lacks(name, metrics[name], context)
            if lacks is not None:
                skipped[name] = lacks
                continue
            full = name if judge is None or not metrics[name].judged else f"{name}/{judge.name}"
            try:
                _score_one(run, full, metrics[name], answers, context, say)
            except LacksWeights as error:
                skipped[name] = str(error)
                continue
            made[full] = _made_with(metrics[name], context)
        records = run.read_records()
        order = [answer.id for answer in answers]
        run.records.settle(
            records[name][each].to_json() for name in made for each in order if each in records.get(name, {})
        )
        write_json(
            run.folder / "scoring.json",
            {
                "metrics": made,
                "skipped": skipped,
                "subset": config.subset,
                "predictions": now,
                "made_with": versions(),
            },
        )
    return skipped


def _answered(run: Run, task: Task, config: Any, place: Place, subset: bool) -> list[Answered]:
    facts, predictions = run.facts(), run.read_predictions()
    samples, now = read_samples(task, config, place)
    if now["data"] != facts["samples"]["data"]:
        raise EvaluationError(
            f"the data are not those that were answered: {now['data'][:12]}, not {facts['samples']['data'][:12]}",
            where=str(config.data or config.name),
            fix="give back the files, or run the evaluation in a new folder",
        )
    missing = [sample.id for sample in samples if sample.id not in predictions]
    if missing and not subset:
        raise no_prediction(missing, run)
    known = set(facts["samples"]["ids"])
    stray = next((each for each in predictions if each not in known), None)
    if stray is not None:
        raise EvaluationError(f"there is a prediction for {stray}, which is no sample", where=str(run.predictions.file))
    return [
        Answered(sample, predictions[sample.id], place, run.folder) for sample in samples if sample.id in predictions
    ]


def _lacks(name: str, metric: Metric, context: Context) -> str | None:
    if metric.judged and context.judge is None:
        return "no judge is given: set judge.port.kind and what it needs"
    missing = metric.lacks()
    if missing is not None:
        return missing
    try:
        for each in metric.needs:
            context.file(each)
    except LacksWeights as error:
        return str(error)
    return None


def _score_one(run: Run, name: str, metric: Metric, answers: Sequence[Answered], context: Context, say: Say) -> None:
    known = run.read_records().get(name, {})
    keys = {answer.id: _key(name, metric, answer, context) for answer in answers}
    if metric.whole:  # one answer more or less changes every value
        everything = fingerprint(keys.items())[:16]
        keys = {each: fingerprint([key, everything])[:16] for each, key in keys.items()}
    left = [answer for answer in answers if answer.id not in known or known[answer.id].key != keys[answer.id]]
    todo = list(answers) if metric.whole and left else left
    by_id = {answer.id: answer for answer in todo}
    done = len(answers) - len(todo)
    say(name, done, len(answers))

    def records() -> Iterator[dict[str, Any]]:
        nonlocal done
        for measured in metric.measure(todo, context):
            done += 1
            yield _record(name, by_id.pop(measured.id), measured, keys[measured.id]).to_json()
            say(name, done, len(answers))

    run.records.append(records())
    if by_id:
        raise EvaluationError(
            f"{name} gave nothing for {len(by_id)} answers, the first {next(iter(by_id))}",
            where=str(run.folder),
            fix="what was scored is kept; `weft eval score` asks again for the rest",
        )


def _key(name: str, metric: Metric, answer: Answered, context: Context) -> str:
    judge = context.judge.settings if metric.judged else None
    files = {each: str(context.file(each)) for each in _given(metric, context)}
    made_of = [name, metric.version, answer.prediction.to_json(), answer.sample.identity, judge, files]
    return fingerprint([*made_of, answer.sample.prompt_hash if metric.judged else None])[:16]


def _record(name: str, answer: Answered, measured: Measured, key: str) -> Record:
    prediction = answer.prediction
    return Record(
        metric=name,
        id=answer.id,
        values=measured.values,
        raw=_raw(prediction),
        normalised=measured.normalised,
        status=measured.status,
        empty=prediction.is_empty,
        facets=answer.sample.facets,
        unit=answer.sample.unit,
        extra=measured.extra,
        key=key,
    )


def _raw(prediction: Prediction) -> str:
    """The answer as one text; a picture by its path."""
    from weft.document import Text

    return "\n".join(part.text if isinstance(part, Text) else f"[{part.path}]" for part in prediction.parts)


def _made_with(metric: Metric, context: Context) -> dict[str, Any]:
    judge = {"judge": context.judge.settings} if metric.judged else {}
    files = {each: context.file(each) for each in _given(metric, context)}
    # a folder that more than one run fills is not what this one was made with
    weights = {
        name: describe_weights(path) if name in metric.needs or path.is_file() else {"name": path.name}
        for name, path in files.items()
    }
    return {"about": metric.about, "version": metric.version, **judge, **({"weights": weights} if weights else {})}


def _given(metric: Metric, context: Context) -> list[str]:
    """The fields of `WeightsConfig` that its values depend on."""
    return [*metric.needs, *(each for each in metric.uses if getattr(context.weights, each) is not None)]
