"""From records to numbers. Needs neither the model nor a judge nor their libraries: the records are enough.

A value is the mean over samples, or what the metric's own formula makes of all records; never a mean of means of
batches. Beside it stand its 95 % bootstrap interval, n, and how many samples were unparsed, given by rule, by default,
or did not apply.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from weft.atomic import write_json
from weft.evaluation.bootstrap import LEVEL, RESAMPLES, intervals
from weft.evaluation.interval import Share
from weft.evaluation.journal import EvaluationError, fingerprint
from weft.evaluation.metric import Metric
from weft.evaluation.records import Record, predictions_fingerprint
from weft.evaluation.run import Run, differences, versions
from weft.evaluation.task import read_json

SEED = 20_260_704
NO_NUMBER = "no number follows from its records: too few pictures for a distance, or it applies to none of the answers"
UNPARSED_LIMIT = 0.01
"""With a larger share of answers that could not be read, a number is not valid."""


def aggregate(
    run: Run, metrics: Mapping[str, Metric], *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Any]:
    """Write `summary.json` and return it."""
    with run.locked():
        summary = summarise(run, metrics, resamples=resamples, seed=seed)
        write_json(run.summary_file, summary)
    return summary


def summarise(run: Run, metrics: Mapping[str, Metric], *, resamples: int, seed: int) -> dict[str, Any]:
    """
    Args:
        metrics: the rows by name; a judged metric is recorded as name/judge and found by its first two parts.

    Raises:
        EvaluationError: nothing was scored, a sample has no prediction or no record, or there is a record too many.
    """
    facts, scoring = run.facts(), run.scoring()
    predictions, records = run.read_predictions(), run.read_records()
    ids = facts["samples"]["ids"]
    missing = [each for each in ids if each not in predictions]
    if missing and not scoring.get("subset"):
        raise no_prediction(missing, run)
    scored = [each for each in ids if each in predictions]
    if not scoring.get("metrics"):
        raise EvaluationError("nothing was scored", where=str(run.folder), fix="weft eval score")
    answered = predictions_fingerprint([predictions[each] for each in scored])
    if scoring["predictions"] != answered:
        raise EvaluationError(
            "the predictions are not those that were scored", where=str(run.predictions.file), fix="weft eval score"
        )
    found, without = {}, {}
    for name, made in scoring["metrics"].items():
        of_metric = _complete(name, scored, records.get(name, {}), run)
        found[name] = _metric_summary(of_metric, row_of(name, metrics), made, resamples=resamples, seed=seed)
        if not found[name]["values"]:
            without[name] = NO_NUMBER
    return {
        "task": facts["task"],
        "model": facts["model"],
        "n": len(scored),
        "of": facts["samples"]["of"],
        "subset": len(scored) < facts["samples"]["of"],
        "empty": sum(predictions[each].is_empty for each in scored),
        "metrics": found,
        "skipped": {**scoring.get("skipped", {}), **without},
        "fingerprints": {
            "data": facts["samples"]["data"],
            "prompts": facts["samples"]["prompts"],
            "predictions": answered,
            "records": fingerprint(records[name][each].to_json() for name in found for each in scored),
        },
        "generation": facts["generation"],
        "bootstrap": {"seed": seed, "resamples": resamples, "level": LEVEL},
        "made_with": {
            "generating": facts.get("made_with"),
            "scoring": scoring.get("made_with"),
            "aggregating": _light(versions()),
        },
    }


def verify(run: Run, metrics: Mapping[str, Metric]) -> list[str]:
    """What of the summary does not follow from the records: `path is a, not b`."""
    if not run.summary_file.is_file():
        raise EvaluationError("there is no summary to verify", where=str(run.folder), fix="weft eval aggregate")
    stored = read_json(run.summary_file)
    bootstrap = stored.get("bootstrap", {})
    again = summarise(
        run, metrics, resamples=int(bootstrap.get("resamples", RESAMPLES)), seed=int(bootstrap.get("seed", SEED))
    )
    return list(differences(stored, again, skip=("made_with",)))


def no_prediction(missing: Sequence[str], run: Run) -> EvaluationError:
    more = f" and {len(missing) - 1} more samples" if len(missing) > 1 else ""
    return EvaluationError(
        f"there is no prediction for sample {missing[0]}{more}",
        where=str(run.predictions.file),
        fix="run `weft eval run` again, which makes only what is missing, or ask for a --subset",
    )


def row_of(name: str, metrics: Mapping[str, Metric]) -> Metric:
    """The row of a metric by the name that records carry."""
    row = metrics.get(name) or metrics.get("/".join(name.split("/")[:2]))
    if row is None:
        raise EvaluationError(f"there is no metric {name!r}", where="records.jsonl", fix="`weft eval list` names them")
    return row


def _complete(name: str, ids: Sequence[str], records: Mapping[str, Record], run: Run) -> list[Record]:
    for each in ids:
        if each not in records:
            raise EvaluationError(
                f"sample {each} has no record of {name}", where=str(run.records.file), fix="weft eval score"
            )
    known = set(ids)
    extra = next((each for each in records if each not in known), None)
    if extra is not None:
        raise EvaluationError(
            f"there is a record of {name} for {extra}, which is not predicted", where=str(run.records.file)
        )
    return [records[each] for each in ids]


def _metric_summary(
    records: Sequence[Record], metric: Metric, made: Mapping[str, Any], *, resamples: int, seed: int
) -> dict[str, Any]:
    values = dict(metric.aggregate(records))
    known = intervals(records, metric.aggregate, seed=seed, resamples=resamples) if metric.intervals else {}
    cells = {}
    for name, value in values.items():
        own = [record for record in records if name in record.values]
        # a number that no single record has is made of all that were read
        n = sum(record.values[name] is not None for record in own) if own else sum(map(_was_read, records))
        cell: dict[str, Any] = {"value": number(value), "rounded": rounded(value, metric), "n": n}
        if name in known:
            cell |= {"low": known[name].low, "high": known[name].high}
        if own and all(record.unit is None and record.values[name] in (0.0, 1.0, None) for record in own):
            # drawing again n hits of n can only give n hits
            cell["wilson"] = list(Share(sum(record.values[name] == 1.0 for record in own), n).interval)
        cell |= _counts(own or records, name if own else None)
        cells[name] = cell
    counts = _counts(records, None)
    unread = counts.get("unparsed", 0)
    return {
        **made,
        "n": len(records),
        "empty": sum(record.empty for record in records),
        **counts,
        "valid": unread <= UNPARSED_LIMIT * len(records),
        "values": cells,
        "by": _breakdown(records, metric),
    }


def _breakdown(records: Sequence[Record], metric: Metric) -> dict[str, Any]:
    """Facet -> value -> numbers; and of numbers that several values of a facet have, the mean of those means."""
    found: dict[str, Any] = {}
    facets = dict.fromkeys(name for record in records for name in record.facets)
    for facet in facets:
        groups: dict[str, list[Record]] = {}
        for record in records:
            if facet in record.facets:
                groups.setdefault(record.facets[facet], []).append(record)
        parts = {value: dict(metric.aggregate(of_one)) for value, of_one in sorted(groups.items())}
        names = dict.fromkeys(name for each in parts.values() for name in each)
        found[facet] = {
            "values": {
                value: {"n": len(groups[value]), **{name: number(each) for name, each in of_one.items()}}
                for value, of_one in parts.items()
            },
            "mean": {
                name: number(math.fsum(known) / len(known))
                for name in names
                if (known := [each[name] for each in parts.values() if name in each])
            },
        }
    return found


def _counts(records: Sequence[Record], name: str | None) -> dict[str, int]:
    """How many records have each status, of one value or of any."""
    found: dict[str, int] = {}
    for record in records:
        status = record.status.values() if name is None else [record.status[name]] if name in record.status else []
        for each in dict.fromkeys(status):
            found[each] = found.get(each, 0) + 1
    return dict(sorted(found.items()))


def _was_read(record: Record) -> bool:
    return "unparsed" not in record.status.values()


def number(value: float) -> float | None:
    """As JSON has it: no NaN, no infinity."""
    return float(value) if math.isfinite(value) else None


def rounded(value: float, metric: Metric) -> float | None:
    """As tables print it."""
    # rounding leaves -0.0 of a distance between two sets that are the same
    return round(value * metric.scale, metric.digits) + 0.0 if math.isfinite(value) else None


def _light(found: Mapping[str, str]) -> dict[str, str]:
    return {name: found[name] for name in ("python", "weft", "numpy") if name in found}
