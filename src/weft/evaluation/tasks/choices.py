"""Questions with options: MMBench, in all rotations, and MMMU.

    MMBench   mmbench_{split}_en.tsv   index, question, hint, A-D, answer, category, image (base64)
    MMMU      {subject}/{split}-*.parquet   id, question, options, answer, question_type, image_1 to image_7

MMBench's rotations are made here: in rotation k an option's text moves k letters up, and the row's index grows by
k millions.
"""

import ast
import base64
import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weft.document import Document, Image, Part, Text, user
from weft.evaluation.journal import EvaluationError
from weft.evaluation.metrics.choices import ROTATIONS
from weft.evaluation.task import Place, Sample, Task, required

LETTERS = "ABCDEFGHIJ"
ASK = "Answer with the option's letter from the given choices directly."
ASK_OPEN = "Answer the question using a single word or phrase."
_MARK = re.compile(r"<image (\d)>")


def read_mmbench(place: Place) -> Iterator[Sample]:
    file = place.file(f"mmbench_{place.split}_en.tsv", f"MMBench_{place.split.upper()}_EN.tsv")
    csv.field_size_limit(sys.maxsize)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    encoded = {row["index"]: row["image"] for row in rows}
    for row in rows:
        texts = [row[letter] for letter in LETTERS[:4] if row.get(letter)]
        # a picture that was shown before is named by the row that holds it
        image = encoded.get(row["image"], row["image"])
        turns = len(texts) if place.variant == "circular" else 1
        if required(row, "answer", str(file)) not in LETTERS[: len(texts)] or not row["answer"]:
            raise EvaluationError(
                f"question {row['index']} has the answer {row['answer']!r}, of {len(texts)} options",
                where=str(file),
                fix="score a split whose answers are released",
            )
        for turn in range(turns):
            yield _rotation(row, texts, turn, turns, Image(base64.b64decode(image)))


def _rotation(row: Mapping[str, str], texts: Sequence[str], turn: int, turns: int, image: Image) -> Sample:
    options = {LETTERS[i]: texts[(i + turn) % len(texts)] for i in range(len(texts))}
    answer = LETTERS[(LETTERS.index(row["answer"]) - turn) % len(texts)]
    lines = [row.get("hint") or "", row["question"], *(f"{key}. {text}" for key, text in options.items()), ASK]
    index = int(row["index"]) + turn * ROTATIONS
    prompt = Document((user(image, "\n".join(line for line in lines if line)),), id=str(index))
    reference = {"index": index, "options": options, "answer": answer, "rotations": turns}
    return Sample(str(index), prompt, reference, facets={"category": row.get("category", "")}, unit=row["index"])


def read_mmmu(place: Place) -> Iterator[Sample]:
    import pyarrow.parquet

    files = sorted(place.root.rglob(f"{place.split}-*.parquet"))
    if not files:
        raise EvaluationError(f"there is no {place.split}-*.parquet", where=str(place.root), fix="check --data")
    for file in files:
        for row in pyarrow.parquet.read_table(file).to_pylist():
            yield _mmmu(row, str(file))


def _mmmu(row: Mapping[str, Any], where: str) -> Sample:
    name = required(row, "id", where)
    options = row["options"]
    texts = ast.literal_eval(options) if isinstance(options, str) else list(options or ())
    is_open = row["question_type"] == "open"
    letters = {} if is_open else {LETTERS[i]: str(text) for i, text in enumerate(texts)}
    lines = [row["question"], *(f"({key}) {text}" for key, text in letters.items()), "", ASK_OPEN if is_open else ASK]
    answer = row["answer"]
    if is_open and answer.startswith("["):
        answer = ast.literal_eval(answer)
    answers = list(answer) if isinstance(answer, list) else [answer]
    subject = re.sub(r"^\w+?_(.*)_\d+$", r"\1", name)
    prompt = Document((user(*_with_images("\n".join(lines), row)),), id=name)
    return Sample(name, prompt, {"options": letters, "answers": answers}, facets={"subject": subject})


def _with_images(text: str, row: Mapping[str, Any]) -> Iterator[Part]:
    pieces = _MARK.split(text)
    for i, piece in enumerate(pieces):
        if i % 2 and row.get(f"image_{piece}"):
            yield Image(row[f"image_{piece}"]["bytes"])
        elif not i % 2 and piece.strip():
            yield Text(piece.strip())


_SHORT = {"max_images": 0, "max_text_tokens": 128}
TASKS = {
    "mmbench": Task(
        "multiple choice, right only if right in every rotation of the options",
        "mmbench_<split>_en.tsv",
        read_mmbench,
        ("mcq/circular",),
        ("dev", "test"),
        ("circular", "once"),
        sampling=_SHORT,
    ),
    "mmmu": Task(
        "college questions of 30 subjects, multiple choice and open",
        "<subject>/<split>-*.parquet",
        read_mmmu,
        ("mcq/mmmu",),
        ("validation", "dev"),
        sampling=_SHORT,
    ),
}
