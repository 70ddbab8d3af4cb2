"""Pictures made from a text or a map: COCO-30K, LN-COCO, GenEval and ADE20K.

COCO      annotations/captions_val2014.json   {annotations: [{id, image_id, caption}]}
          val2014/COCO_val2014_{id:012d}.jpg; coco_30k_ids.json   [ids of captions], for the variant `listed`
LN-COCO   coco_val_captions.jsonl             {image_id, caption}; val2017/{id:012d}.jpg
GenEval   evaluation_metadata.jsonl           {tag, include, exclude, prompt}
ADE20K    {split}.json                        [{image_id, caption}]
          annotations_with_color/{split}/{id}.png, annotations/{split}/{id}.png, images/{split}/{id}.jpg
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from weft.document import Document, Image, user
from weft.evaluation.journal import EvaluationError
from weft.evaluation.task import Place, Protocol, Sample, Task, required

COCO_N = 30_000
COCO_SEED = 2014
"""Of the captions that are drawn."""
GENEVAL_IMAGES = 4
ONE = {"first": "image", "max_images": 1, "max_text_tokens": 0}


def read_coco(place: Place) -> Iterator[Sample]:
    """30,000 captions, in lower case, as MM-Interleaved's code writes them; which, the variant says.

    first    the first pictures in the order of the file, each with its first caption
    drawn    pictures in an order that depends on a seed alone, each with one of its captions; ids are the captions'
    listed   a list of captions' ids, such as another run has; two may be of one picture
    """
    rows = place.json("annotations/captions_val2014.json", "captions_val2014.json")["annotations"]
    chosen = {"drawn": _drawn, "listed": lambda rows: _listed(rows, place)}.get(place.variant, _first)(rows)
    by_image = place.variant not in ("drawn", "listed")
    for row in chosen:
        image, caption = int(row["image_id"]), row["caption"].strip()
        name = str(image if by_image else row["id"])
        path = f"val2014/COCO_val2014_{image:012d}.jpg"
        reference = {"images": [path], "caption": caption, "outputs": ["image"]}
        yield Sample(name, Document((user(caption.lower()),), id=name), reference)


Rows = Iterable[Mapping[str, Any]]


def _first(rows: Rows) -> Iterator[Mapping[str, Any]]:
    known: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        known.setdefault(int(row["image_id"]), row)
    yield from list(known.values())[:COCO_N]


def _drawn(rows: Rows) -> Iterator[Mapping[str, Any]]:
    """By hashes, which no library's generator can change."""
    lowest: dict[int, tuple[str, Mapping[str, Any]]] = {}
    for row in rows:
        image, place = int(row["image_id"]), _drawn_place("caption", required(row, "id", "captions_val2014.json"))
        if image not in lowest or place < lowest[image][0]:
            lowest[image] = place, row
    for image in sorted(lowest, key=lambda each: _drawn_place("image", each))[:COCO_N]:
        yield lowest[image][1]


def _drawn_place(what: str, number: int) -> str:
    return hashlib.sha256(f"{COCO_SEED} {what} {number}".encode()).hexdigest()


def _listed(rows: Rows, place: Place) -> Iterator[Mapping[str, Any]]:
    by_id = {int(required(row, "id", "captions_val2014.json")): row for row in rows}
    for each in place.json("coco_30k_ids.json"):
        if int(each) not in by_id:
            raise EvaluationError(f"there is no caption {each}", where=str(place.file("coco_30k_ids.json")))
        yield by_id[int(each)]


def read_ln_coco(place: Place) -> Iterator[Sample]:
    """Every caption once; as MM-Interleaved evaluates, 30,000 times one, those that come again from other seeds."""
    rows = list(place.lines("coco_val_captions.jsonl"))
    chosen = list(range(len(rows)))
    if place.variant == "mm-interleaved":
        captions = Counter(row["image_id"] for row in rows)
        weights = [1 / captions[row["image_id"]] for row in rows]
        chosen += random.Random(COCO_SEED).choices(chosen, weights, k=max(0, COCO_N - len(rows)))
    times: Counter[int] = Counter()
    for number in chosen:
        image, caption = int(rows[number]["image_id"]), rows[number]["caption"]
        again, times[number] = times[number], times[number] + 1
        name = f"{number + 1:06d}-{image}" + (f"-{again + 1}" if again else "")
        reference = {"images": [f"val2017/{image:012d}.jpg"], "caption": caption, "outputs": ["image"]}
        sampling = {"seed": again} if again else {}
        yield Sample(name, Document((user(caption),), id=name), reference, sampling=sampling)


def read_geneval(place: Place) -> Iterator[Sample]:
    """Four pictures of each prompt, from four seeds."""
    for number, row in enumerate(place.lines("evaluation_metadata.jsonl")):
        where = f"evaluation_metadata.jsonl, line {number + 1}"
        text = required(row, "prompt", where)
        for seed in range(GENEVAL_IMAGES):
            name = f"{number:05d}-{seed}"
            yield Sample(
                name,
                Document((user(text),), id=name),
                {"wanted": row, "caption": text, "outputs": ["image"]},
                facets={"tag": required(row, "tag", where)},
                unit=f"{number:05d}",
                sampling={"seed": seed},
            )


def read_ade20k(place: Place) -> Iterator[Sample]:
    file = f"{place.split}.json"
    for number, row in enumerate(place.json(file), 1):
        name, caption = str(required(row, "image_id", f"{file}, {number}")), required(row, "caption", file)
        prompt = user(Image(path=f"annotations_with_color/{place.split}/{name}.png"), f"{caption}.")
        reference = {
            "images": [f"images/{place.split}/{name}.jpg"],
            "labels": f"annotations/{place.split}/{name}.png",
            "outputs": ["image"],
        }
        yield Sample(name, Document((prompt,), id=name), reference)


_FID = ("fid/pytorch-fid", "fid/clean", "fid/64")
_PAINTED = {"diffusion.guidance": 3.5, "diffusion.steps": 250}
_SAME = "the pictures whose captions are taken, at their own size"
_COCO = {
    "first": Protocol(facts={"captions": "first of each picture, in the file's order", "real": _SAME}),
    "drawn": Protocol(facts={"captions": "drawn", "seed": COCO_SEED, "real": _SAME}),
    "listed": Protocol(facts={"captions": "coco_30k_ids.json", "real": _SAME}),
    "mm-interleaved": Protocol(
        # a model that writes codes would make the likeliest picture eight times
        sampling={**_PAINTED, "image.temperature": 1.0},
        best_of=8,
        facts={"captions": "first of each picture, in the file's order", "real": _SAME},
    ),
}
"""MoSS follows Emu2: one picture for each caption; which captions it does not say."""
TASKS = {
    "coco-30k": Task(
        "pictures of 30,000 captions against the real ones",
        "annotations/captions_val2014.json and val2014/; coco_30k_ids.json for the variant listed",
        read_coco,
        (*_FID, "clip-score/b32"),
        ("val2014",),
        tuple(_COCO),
        sampling=ONE,
        protocols=_COCO,
    ),
    "ln-coco": Task(
        "pictures of long narratives against the real ones",
        "coco_val_captions.jsonl and val2017/",
        read_ln_coco,
        _FID,
        ("val2017",),
        ("default", "mm-interleaved"),
        sampling=ONE,
        protocols={
            "mm-interleaved": Protocol(
                sampling={**_PAINTED, "image.temperature": 1.0},
                facts={"captions": "all, and drawn ones up to 30,000", "seed": COCO_SEED, "real": _SAME},
            )
        },
    ),
    "geneval": Task(
        "objects, counts, colours and places that a prompt names, found by a detector; four pictures of each prompt",
        "evaluation_metadata.jsonl",
        read_geneval,
        ("geneval/mask2former",),
        # the likeliest picture would be the same four times
        sampling={**ONE, "image.temperature": 1.0},
    ),
    "ade20k": Task(
        "photos made from maps of segments",
        "<split>.json, annotations_with_color/, annotations/ and images/",
        read_ade20k,
        ("miou/ade20k", "fid/pytorch-fid"),
        ("validation",),
        sampling=ONE,
    ),
}
