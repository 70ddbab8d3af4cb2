"""OpenING (Zhou et al. 2025): 5,400 instructions of 56 kinds, answered by texts and pictures in turn.

OpenING-benchmark/test_data.jsonl     {total_uid, meta_task_name, subtask_name, conversations: [{input}, {output}]}
OpenING-benchmark/images/...          named by those
"""

from collections.abc import Iterator, Mapping
from typing import Any

from weft.document import Document, Image, Part, Text, user
from weft.evaluation.journal import EvaluationError
from weft.evaluation.task import Place, Sample, Task, required

FOLDERS = ("", "OpenING-benchmark/")


def read(place: Place) -> Iterator[Sample]:
    file = place.file(*(f"{folder}{place.split}_data.jsonl" for folder in FOLDERS))
    folder = "" if file.parent == place.root else f"{file.parent.name}/"
    for number, record in enumerate(place.lines(str(file.relative_to(place.root))), 1):
        where = f"{file}, record {number}"
        name = str(required(record, "total_uid", where))
        sides: dict[str, Any] = {}
        for each in required(record, "conversations", where):
            sides |= each
        if "input" not in sides:
            raise EvaluationError("a record has no input", where=where)
        asked = [part for step in sides["input"] for part in _parts(step, folder)]
        answer = [part for step in sides.get("output", ()) for part in _parts(step, folder)]
        reference = {
            "text": "\n".join(part.text for part in answer if isinstance(part, Text)),
            "images": [part.path for part in answer if isinstance(part, Image)],
            "record": {key: record.get(key) for key in KEYS} | {"input": sides["input"]},
        }
        yield Sample(
            name,
            Document((user(*asked),), id=name),
            reference,
            facets={"meta task": str(record.get("meta_task_name")), "task": str(record.get("subtask_name"))},
        )


KEYS = ("meta_task_id", "meta_task_name", "subtask_id", "subtask_name", "data_id")
"""Of a record, which prediction files repeat."""


def _parts(step: Mapping[str, Any], folder: str) -> Iterator[Part]:
    """Text first: where it says `<image>`, at its end, the picture stands."""
    text = str(step.get("text") or "").replace("<BEGIN>", "").replace("<image>", "").strip()
    if text:
        yield Text(text)
    if step.get("image"):
        yield Image(path=folder + str(step["image"]).removeprefix("./"))


TASKS = {
    "opening": Task(
        "instructions of 56 kinds, answered by texts and pictures in turn, judged by seven criteria",
        "OpenING-benchmark/test_data.jsonl and its images",
        read,
        ("opening/v1", "prose/length"),
        ("test", "dev"),
    )
}
