"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg, files of JSON lines as MM-Interleaved reads them.

    {set}_{split}.jsonl   {image, sent, bbox: [x1, y1, x2, y2] in pixels, width, height}

Boxes are asked for on a grid of 0 to 999. The prompt of the released code is the default; the paper prints another.
"""

from collections.abc import Iterator
from functools import partial

from weft.document import Document, Image, Text, user
from weft.evaluation.metrics.grounding import GRID
from weft.evaluation.task import Place, Sample, Task, required

PROMPTS = {
    "code": "Provide the bounding box coordinate of the region this sentence describes. {sent}<box>",
    "paper": "Question: Provide the bounding box coordinate of the region this sentence describes: {sent}, Answer:",
}


def read(name: str, place: Place) -> Iterator[Sample]:
    file = f"{name}_{place.split}.jsonl"
    for number, row in enumerate(place.lines(file), 1):
        where = f"{file}, line {number}"
        path, sent, box = (required(row, key, where) for key in ("image", "sent", "bbox"))
        width, height = _size(place, path) if "width" not in row else (row["width"], row["height"])
        # the reference evaluator compares with the box as it is written: whole numbers of the grid
        scale = (width, height, width, height)
        grid = [float(int(edge / side * GRID)) for edge, side in zip(box, scale, strict=True)]
        asked = user(Image(path=path), Text(PROMPTS[place.variant].format(sent=sent)))
        identity = f"{number:06d}"
        reference = {"box": grid, "pixels": [float(edge) for edge in box], "size": [width, height]}
        yield Sample(identity, Document((asked,), id=identity), reference, unit=path)


def _size(place: Place, path: str) -> tuple[int, int]:
    from weft.images import decode_image

    size: tuple[int, int] = decode_image(place.picture(path), where=path).size
    return size


def _task(name: str, splits: tuple[str, ...]) -> Task:
    return Task(
        "the box of what a sentence describes",
        f"{name}_<split>.jsonl and the pictures it names",
        partial(read, name),
        ("grounding/mm-interleaved",),
        splits,
        tuple(PROMPTS),
        beams={"beams": 5, "max_tokens": 30, "min_tokens": 8, "length_penalty": 1.0},
    )


TASKS = {
    "refcoco": _task("refcoco", ("val", "testA", "testB")),
    "refcoco+": _task("refcoco+", ("val", "testA", "testB")),
    "refcocog": _task("refcocog", ("val", "test")),
}
