"""Questions about pictures with short answers: VQAv2, OK-VQA, TextVQA, VizWiz and GQA, with MM-Interleaved's prompts.

VQAv2     v2_OpenEnded_mscoco_{split}2014_questions.json, v2_mscoco_{split}2014_annotations.json
OK-VQA    OpenEnded_mscoco_{split}2014_questions.json, mscoco_{split}2014_annotations.json
TextVQA   textvqa_{split}_questions.json, textvqa_{split}_annotations.json; questions name their picture
VizWiz    {split}.json   [{image, question, answers: [{answer}], answer_type, answerable}]
GQA       {split}_balanced_questions.json   {id: {imageId, question, answer}}
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from weft.document import Document, Image, user
from weft.evaluation.task import Place, Sample, Task, required

BEFORE = "Based on the image, please answer the question."
AFTER = "Please provide an accurate answer within one word. The answer is:"
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'."
_BEAMS = {"beams": 3, "max_tokens": 10, "min_tokens": 0, "length_penalty": 0.0}


def _sample(
    name: str, path: str, question: str, reference: Mapping[str, Any], facets: Mapping[str, str], after: str = AFTER
) -> Sample:
    prompt = Document((user(BEFORE, Image(path=path), f"{question} {after}"),), id=name)
    return Sample(name, prompt, {**reference, "question": question}, facets=facets, unit=path)


def _paired(questions: str, annotations: str, picture: Callable[[Mapping[str, Any], str], str]) -> Any:
    def read(place: Place) -> Iterator[Sample]:
        asked = place.json(questions.format(split=place.split))["questions"]
        known = {row["question_id"]: row for row in place.json(annotations.format(split=place.split))["annotations"]}
        for row in asked:
            name = str(row["question_id"])
            answer = required(known, row["question_id"], annotations.format(split=place.split))
            reference = {"answers": answer["answers"]}
            yield _sample(
                name,
                picture(row, place.split),
                row["question"],
                reference,
                {"answer type": str(answer.get("answer_type", "other"))},
            )

    return read


def _coco_picture(row: Mapping[str, Any], split: str) -> str:
    return f"{split}2014/COCO_{split}2014_{int(row['image_id']):012d}.jpg"


def _named_picture(row: Mapping[str, Any], split: str) -> str:
    return str(row["image"] if "image" in row else f"train_images/{row['image_id']}.jpg")


def read_vizwiz(place: Place) -> Iterator[Sample]:
    file = f"{place.split}.json"
    for number, row in enumerate(place.json(file, f"Annotations/{file}"), 1):
        where = f"{file}, {number}"
        image = required(row, "image", where)
        found = re.search(r"(\d+)\.\w+$", image)
        answers = [each["answer"] for each in required(row, "answers", where)]
        kind = {"answer type": str(row.get("answer_type", "other"))}
        yield _sample(
            str(int(found[1])) if found else image,
            f"{place.split}/{image}",
            required(row, "question", where),
            {"answers": answers},
            kind,
            f"{UNSURE} {AFTER}",
        )


def read_gqa(place: Place) -> Iterator[Sample]:
    for name, row in place.json(f"{place.split}_balanced_questions.json").items():
        kind = {"type": str(row.get("types", {}).get("structural", "other"))}
        yield _sample(name, f"images/{row['imageId']}.jpg", row["question"], {"answer": row["answer"]}, kind)


def _task(name: str, layout: str, read: Any, metrics: Sequence[str], splits: Sequence[str]) -> Task:
    return Task(f"short answers, {name}", layout, read, tuple(metrics), tuple(splits), beams=_BEAMS)


_V2 = ("vqa/v2", "vqa/v2-mm-interleaved")
TASKS = {
    "vqav2": _task(
        "VQAv2",
        "v2_OpenEnded_mscoco_<split>2014_questions.json, v2_mscoco_<split>2014_annotations.json, <split>2014/",
        _paired(
            "v2_OpenEnded_mscoco_{split}2014_questions.json", "v2_mscoco_{split}2014_annotations.json", _coco_picture
        ),
        _V2,
        ("val",),
    ),
    "okvqa": _task(
        "OK-VQA",
        "OpenEnded_mscoco_<split>2014_questions.json, mscoco_<split>2014_annotations.json, <split>2014/",
        _paired("OpenEnded_mscoco_{split}2014_questions.json", "mscoco_{split}2014_annotations.json", _coco_picture),
        _V2,
        ("val",),
    ),
    "textvqa": _task(
        "TextVQA",
        "textvqa_<split>_questions.json, textvqa_<split>_annotations.json and the pictures they name",
        _paired("textvqa_{split}_questions.json", "textvqa_{split}_annotations.json", _named_picture),
        _V2,
        ("val",),
    ),
    "vizwiz": _task(
        "VizWiz",
        "<split>.json and <split>/",
        read_vizwiz,
        ("vqa/vizwiz", "vqa/vizwiz-mm-interleaved"),
        ("val",),
    ),
    "gqa": _task("GQA", "<split>_balanced_questions.json and images/", read_gqa, ("vqa/gqa",), ("testdev", "val")),
}
