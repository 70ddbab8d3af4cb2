"""MagicBrush (Zhang et al. 2023), test: photos that are edited, often several times in a row.

    edit_sessions.json                               {img_id: [{input, mask, output, instruction}, ...]}
    local_descriptions.json or local_captions.json   {img_id: {output: caption}}
    images/<img_id>/<name>

`all-turns`: every edit is made from the true picture before it. `final-turn`: a session's edits are made from the
model's own pictures, and the last one is scored. The paper reports both; which one MoSS's table has it does not say.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from weft.document import Document, Image, Text, user
from weft.evaluation.task import Place, Sample, Task, required

_CAPTIONS = ("local_descriptions.json", "local_captions.json")
_ONE = {"first": "image", "max_images": 1, "max_text_tokens": 0}


def read(place: Place) -> Iterator[Sample]:
    captions = place.json(*_CAPTIONS)
    sessions: Mapping[str, Any] = place.json("edit_sessions.json")
    for image, turns in sessions.items():
        where = f"edit_sessions.json, {image}"
        edits = [
            (
                str(required(t, "input", where)),
                str(required(t, "instruction", where)),
                str(required(t, "output", where)),
            )
            for t in turns
        ]
        told: Mapping[str, str] = captions.get(image, {})
        if place.variant == "final-turn":
            first, later = edits[0], edits[1:]
            prompt = Document((user(Image(path=_path(image, first[0])), first[1]),), id=image)
            reference = _reference(image, edits[-1][2], told) | {"take": "last"}
            yield Sample(image, prompt, reference, tuple((Text(each[1]),) for each in later), _turns(len(edits)))
            continue
        for i, (before, instruction, after) in enumerate(edits, 1):
            name = f"{image}_{i}" if i == 1 else f"{image}_inde_{i}"
            prompt = Document((user(Image(path=_path(image, before)), instruction),), id=name)
            yield Sample(name, prompt, _reference(image, after, told), facets={"turn": str(i)}, unit=image)


def _path(image: str, file: str) -> str:
    return f"images/{image}/{file}"


def _turns(n: int) -> dict[str, str]:
    return {"turns": str(n)}


def _reference(image: str, after: str, captions: Mapping[str, str]) -> dict[str, Any]:
    return {"images": [_path(image, after)], "caption": captions.get(after), "outputs": ["image"]}


TASKS = {
    "magicbrush": Task(
        "edits of photos against the true edited photo",
        "edit_sessions.json, local_descriptions.json and images/ of the test split",
        read,
        ("clip-i/b32", "dino/s16", "clip-t/b32", "edits/l1l2"),
        ("test", "dev"),
        ("all-turns", "final-turn"),
        sampling=_ONE,
    )
}
