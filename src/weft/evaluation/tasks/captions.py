"""Captions of pictures: COCO (Karpathy's split), Flickr30k, NoCaps and Image2Paragraph, with MM-Interleaved's prompts.

COCO              annotations/coco_karpathy_{split}.json   [{image, caption: text or texts}]
Flickr30k         test1k.token.coco_format   {images: [{id, file_name}], annotations: [{image_id, caption}]}
NoCaps            nocaps_{split}_4500_captions.json   the same
Image2Paragraph   annotations/paragraphs_coco.json   {annotations: [{image_id, caption, url}]}
                  {split}_split.json   [ids]
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weft.document import Document, Image, user
from weft.evaluation.task import Place, Sample, Task, required

SHORT = {"zero-shot": "a photo of", "tuned": "Provide a one-sentence caption for the provided image."}
LONG = {
    "zero-shot": "Please describe the image in detail. The image depicts",
    "tuned": "Please describe the image in detail.",
}
METRICS = ("cider-d/ptb", "bleu/ptb", "rouge-l/ptb")
_BEAMS = {"beams": 5, "max_tokens": 20, "min_tokens": 8, "length_penalty": 1.0}


def _sample(name: str, path: str, captions: Sequence[str], prompt: str) -> Sample:
    return Sample(
        name, Document((user(Image(path=path), prompt),), id=name), {"captions": list(captions), "image": path}
    )


def read_coco(place: Place) -> Iterator[Sample]:
    """Ids are the numbers in the names of files; a picture that comes twice is taken once."""
    file = f"coco_karpathy_{place.split}.json"
    known: set[str] = set()
    for number, row in enumerate(place.json(f"annotations/{file}", file), 1):
        path, captions = required(row, "image", f"{file}, {number}"), required(row, "caption", f"{file}, {number}")
        found = re.search(r"(\d+)\.\w+$", path)
        name = str(int(found[1])) if found else path
        if name not in known:
            known.add(name)
            yield _sample(name, path, [captions] if isinstance(captions, str) else captions, SHORT[place.variant])


def _coco_format(table: Mapping[str, Any], prompt: str, where: str) -> Iterator[Sample]:
    captions: dict[str, list[str]] = {}
    for row in required(table, "annotations", where):
        captions.setdefault(str(row["image_id"]), []).append(row["caption"])
    for image in required(table, "images", where):
        name = str(image["id"])
        yield _sample(name, image["file_name"], required(captions, name, where), prompt)


def read_flickr(place: Place) -> Iterator[Sample]:
    names = ("test1k.token.coco_format", "test1k.token.coco_format.json")
    return _coco_format(place.json(*names), SHORT[place.variant], names[0])


def read_nocaps(place: Place) -> Iterator[Sample]:
    names = (f"nocaps_{place.split}_4500_captions.json", f"nocaps_{place.split}.json")
    return _coco_format(place.json(*names), SHORT[place.variant], names[0])


def read_paragraphs(place: Place) -> Iterator[Sample]:
    """A picture is the last two names of its address."""
    wanted = set(map(str, place.json(f"{place.split}_split.json", f"annotations/{place.split}_split.json")))
    table = place.json("annotations/paragraphs_coco.json", "paragraphs_coco.json")
    for row in table["annotations"]:
        if str(row["image_id"]) in wanted:
            path = "/".join(str(row["url"]).split("/")[-2:])
            yield _sample(str(row["image_id"]), path, [row["caption"]], LONG[place.variant])


def _task(about: str, layout: str, read: Any, split: str, beams: Mapping[str, Any], extra: Sequence[str] = ()) -> Task:
    return Task(about, layout, read, (*extra, *METRICS), (split,), tuple(SHORT), beams=beams)


TASKS = {
    "coco-captions": _task(
        "one-sentence captions, 5 references",
        "annotations/coco_karpathy_test.json and its pictures",
        read_coco,
        "test",
        _BEAMS,
        ("cider-d/ptb-first-sentence",),
    ),
    "flickr30k": _task(
        "one-sentence captions, 5 references", "test1k.token.coco_format and its pictures", read_flickr, "test", _BEAMS
    ),
    "nocaps": _task(
        "one-sentence captions of novel objects, 10 references",
        "nocaps_val_4500_captions.json and its pictures",
        read_nocaps,
        "val",
        _BEAMS,
    ),
    "image2paragraph": _task(
        "a paragraph about a picture",
        "annotations/paragraphs_coco.json, test_split.json and the pictures",
        read_paragraphs,
        "test",
        {"beams": 5, "max_tokens": 90, "min_tokens": 90, "length_penalty": 1.0, "repetition_penalty": 1.2},
    ),
}
