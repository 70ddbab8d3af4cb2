"""Answers as other tools read them. All forms are made of the same ordered parts.

parts        predictions.json            [{id, parts: [{type: text | image, ...}]}]
opening      <id>.json and <id>-o-<k>.jpg   as OpenING's gen_outputs/<model>_output
lmms-eval    samples_<task>.jsonl        {doc_id, doc, target, resps, filtered_resps}: what --log_samples writes
vlmevalkit   <model>_<task>.tsv          index, question, answer, prediction
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.atomic import write_folder
from weft.document import Part, Text
from weft.errors import UsageError
from weft.evaluation.journal import to_line
from weft.evaluation.records import Prediction, with_pictures
from weft.evaluation.run import Run
from weft.evaluation.summary import no_prediction
from weft.evaluation.task import Sample, choose
from weft.evaluation.tasks import TASKS
from weft.images import decode_image

Pair = tuple[Sample, Prediction]


def export_predictions(folder: Path, to: str, out: Path) -> Path:
    """Make the folder `out`.

    Raises:
        EvaluationError: a sample has no prediction.
        UsageError: these answers have no place in that form.
    """
    run = Run(folder)
    facts, predictions = run.facts(), run.read_predictions()
    task, config, place = choose(run.task(), TASKS)
    missing = [each for each in facts["samples"]["ids"] if each not in predictions]
    if missing:
        raise no_prediction(missing, run)
    wanted = set(facts["samples"]["ids"])
    pairs = [(sample, predictions[sample.id]) for sample in task.read(place) if sample.id in wanted]
    model = Path(facts["model"]["name"]).name
    if out.exists() and any(out.iterdir()):
        raise UsageError("the folder is not empty", where=str(out), fix="name a new folder with --out")
    with write_folder(out) as staging:
        WRITERS[to](pairs, run, staging, f"{model}", config.name)
    return out


def _parts(pairs: Sequence[Pair], run: Run, out: Path, model: str, task: str) -> None:
    for _, prediction in pairs:
        for image in with_pictures(prediction, run.folder).images:
            file = out / str(image.path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image.data or b"")
    told = [{key: line[key] for key in ("id", "parts")} for line in (p.to_json() for _, p in pairs)]
    _write(out / "predictions.json", json.dumps(told, ensure_ascii=False, indent=1))


def _opening(pairs: Sequence[Pair], run: Run, out: Path, model: str, task: str) -> None:
    """A step of the output is a text, a picture, or a text with the picture after it."""
    for sample, prediction in pairs:
        steps: list[dict[str, Any]] = []
        number = 0
        for part in with_pictures(prediction, run.folder).parts:
            if isinstance(part, Text):
                steps.append({"text": part.text, "image": None})
                continue
            name = f"{sample.id}-o-{number}.jpg"
            number += 1
            decode_image(part.data or b"").save(out / name, "JPEG", quality=95)
            if steps and steps[-1]["image"] is None:
                steps[-1]["image"] = name
            else:
                steps.append({"text": "", "image": name})
        record: Mapping[str, Any] = sample.reference.get("record") or {"data_id": sample.id, "input": _asked(sample)}
        known = {key: value for key, value in record.items() if key != "input"}
        conversations = [{"input": record["input"]}, {"output": steps}]
        _write(
            out / f"{sample.id}.json",
            json.dumps({**known, "conversations": conversations}, ensure_ascii=False, indent=4),
        )


def _asked(sample: Sample) -> list[dict[str, Any]]:
    def step(part: Part) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"text": part.text, "image": None}
        return {"text": "<image>", "image": part.path}

    return [step(part) for part in sample.prompt.parts]


def _lmms_eval(pairs: Sequence[Pair], run: Run, out: Path, model: str, task: str) -> None:
    lines = []
    for number, (sample, prediction) in enumerate(pairs):
        text = _only_text(prediction)
        lines.append(
            {
                "doc_id": number,
                "doc": {"id": sample.id, **sample.reference},
                "target": _target(sample),
                "arguments": [[_question(sample), {}]],
                "resps": [[text]],
                "filtered_resps": [text],
            }
        )
    _write(out / f"samples_{task}.jsonl", "".join(map(to_line, lines)))


def _vlmevalkit(pairs: Sequence[Pair], run: Run, out: Path, model: str, task: str) -> None:
    options = list(dict.fromkeys(key for sample, _ in pairs for key in sample.reference.get("options", ())))
    buffer = io.StringIO()
    table = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    table.writerow(["index", "question", *options, "answer", "prediction"])
    for sample, prediction in pairs:
        own = sample.reference.get("options", {})
        cells = [own.get(key, "") for key in options]
        index = sample.reference.get("index", sample.id)
        table.writerow([index, _question(sample), *cells, _target(sample), _only_text(prediction)])
    _write(out / f"{model}_{task}.tsv", buffer.getvalue())


def _only_text(prediction: Prediction) -> str:
    if prediction.images:
        raise UsageError(
            f"the answer to {prediction.id} holds pictures, which this form has no place for",
            where="weft eval export",
            fix="export to opening or parts",
        )
    return prediction.text


def _question(sample: Sample) -> str:
    told: object = sample.reference.get("question")
    return str(told) if told else "\n".join(p.text if isinstance(p, Text) else "<image>" for p in sample.prompt.parts)


def _target(sample: Sample) -> str:
    for key in ("answer", "label", "caption"):
        if isinstance(sample.reference.get(key), str):
            return str(sample.reference[key])
    for key in ("answers", "captions"):
        if sample.reference.get(key):
            first = sample.reference[key][0]
            return str(first["answer"] if isinstance(first, dict) else first)
    return ""


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


WRITERS: Mapping[str, Callable[[Sequence[Pair], Run, Path, str, str], None]] = {
    "parts": _parts,
    "opening": _opening,
    "lmms-eval": _lmms_eval,
    "vlmevalkit": _vlmevalkit,
}
