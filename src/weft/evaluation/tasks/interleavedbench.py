"""InterleavedBench (Liu et al. 2024): 815 instructions to be answered by texts and pictures in turn.

    interleaved_bench.json   [{id, task_name, image: [paths], conversations: [{from, value}]}]
    *.zip, or folders        the pictures
    task_names.json          optional: {task_name: use case}, for names that are not in `NAMES`

The two splits and the ten use cases are the paper's; of the names in the file not all are known, so they are data.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weft.document import Document, Image, Part, Text, user
from weft.evaluation.journal import EvaluationError
from weft.evaluation.task import Place, Sample, Task, required


@dataclass(frozen=True)
class UseCase:
    split: str
    outputs: tuple[str, ...] = ("text", "image")
    """What an answer has to hold. Without text there is no text quality and no text-image coherence."""


_PICTURES = ("image",)
USE_CASES = {
    "multimodal script generation": UseCase("context-based"),
    "document completion": UseCase("context-based"),
    "visual story completion": UseCase("context-based"),
    "activity generation": UseCase("context-based"),
    "sequential image editing": UseCase("context-based", _PICTURES),
    "multi-concept image composition": UseCase("context-based", _PICTURES),
    "marketing material generation": UseCase("context-free"),
    "report generation": UseCase("context-free"),
    "education content generation": UseCase("context-free"),
    "fairytale generation": UseCase("context-free"),
}
COMPOSITION = "multi-concept image composition"
NAMES = {
    "wikihow_next_step": "multimodal script generation",
    "report_generation": "report generation",
    "education_generation": "education content generation",
    "marketing_generation": "marketing material generation",
    "storytelling_generation": "fairytale generation",
} | {name: name for name in USE_CASES}
_MARK = re.compile(r"<image>\.?")


def read(place: Place) -> Iterator[Sample]:
    names = dict(NAMES)
    if (place.root / "task_names.json").is_file():
        names |= place.json("task_names.json")
    file = place.file("interleaved_bench.json")
    for number, record in enumerate(place.json(file.name), 1):
        where = f"{file}, record {number}"
        use_case = _use_case(str(required(record, "task_name", where)), names, where)
        if place.split in ("full", USE_CASES[use_case].split):
            yield _sample(record, use_case, place.variant, where)


def _use_case(name: str, names: Mapping[str, str], where: str) -> str:
    use_case = names.get(name)
    if use_case not in USE_CASES:
        raise EvaluationError(
            f"task_name {name!r} is not known; known are {', '.join(names)}",
            where=where,
            fix=f"say in task_names.json which use case it is: {', '.join(USE_CASES)}",
        )
    return str(use_case)


def _sample(record: Mapping[str, Any], use_case: str, variant: str, where: str) -> Sample:
    name, paths = str(required(record, "id", where)), list(required(record, "image", where))
    turns = required(record, "conversations", where)
    if not turns or turns[0].get("from") != "human":
        raise EvaluationError("a record does not begin with a human turn", where=where)
    parts = woven(turns[0]["value"].replace("<BEGIN>", ""), paths)
    given = sum(isinstance(part, Image) for part in parts)
    outputs = USE_CASES[use_case].outputs
    if use_case == COMPOSITION and variant == "benchmark":
        outputs = ("text", "image")
    reference = {
        "text": "\n".join(_MARK.sub("", turn["value"]).strip() for turn in turns[1:2]),
        "images": paths[given:],
        "outputs": list(outputs),
    }
    return Sample(name, Document((user(*parts),), id=name), reference, facets={"use case": use_case})


def woven(text: str, paths: list[str]) -> list[Part]:
    """Text with the next picture wherever `<image>` stands; a full stop right after it is part of the mark.

    Raises:
        EvaluationError: there are more marks than pictures.
    """
    parts: list[Part] = []
    texts = _MARK.split(text)
    if len(texts) - 1 > len(paths):
        raise EvaluationError(f"{len(texts) - 1} pictures are marked, {len(paths)} are named", where=text[:60])
    for i, piece in enumerate(texts):
        if piece.strip():
            parts.append(Text(piece.strip()))
        if i < len(texts) - 1:
            parts.append(Image(path=paths[i]))
    return parts


TASKS = {
    "interleavedbench": Task(
        "instructions answered by texts and pictures in turn, judged in five aspects",
        "interleaved_bench.json and the archives of its pictures",
        read,
        ("interleavedeval/v1", "prose/length"),
        ("context-based", "context-free", "full"),
        # MoSS prints no text scores for composition, the benchmark's own paper does
        ("moss", "benchmark"),
    )
}
