"""Pictures made from a text or a map: COCO-30K, LN-COCO, GenEval and ADE20K.

COCO      annotations/captions_val2014.json   {annotations: [{image_id, caption}]}; val2014/COCO_val2014_{id:012d}.jpg
LN-COCO   coco_val_captions.jsonl             {image_id, caption}; val2017/{id:012d}.jpg
GenEval   evaluation_metadata.jsonl           {tag, include, exclude, prompt}
ADE20K    {split}.json                        [{image_id, caption}]
          annotations_with_color/{split}/{id}.png, annotations/{split}/{id}.png, images/{split}/{id}.jpg
"""

from collections.abc import Iterator

from weft.document import Document, Image, user
from weft.evaluation.task import Place, Sample, Task, required

COCO_N = 30_000
"""The first so many pictures in the order of the file, each with its first caption, as MM-Interleaved has it."""
GENEVAL_IMAGES = 4
ONE = {"first": "image", "max_images": 1, "max_text_tokens": 0}


def read_coco(place: Place) -> Iterator[Sample]:
    """Captions are in lower case, as MM-Interleaved's code writes them."""
    known: set[int] = set()
    for row in place.json("annotations/captions_val2014.json", "captions_val2014.json")["annotations"]:
        image = int(row["image_id"])
        if image in known:
            continue
        known.add(image)
        caption = row["caption"].strip()
        prompt = Document((user(caption.lower()),), id=str(image))
        path = f"val2014/COCO_val2014_{image:012d}.jpg"
        yield Sample(str(image), prompt, {"images": [path], "caption": caption, "outputs": ["image"]})
        if len(known) == COCO_N:
            return


def read_ln_coco(place: Place) -> Iterator[Sample]:
    for number, row in enumerate(place.lines("coco_val_captions.jsonl"), 1):
        image, caption = int(row["image_id"]), row["caption"]
        name = f"{number:06d}-{image}"
        reference = {"images": [f"val2017/{image:012d}.jpg"], "caption": caption, "outputs": ["image"]}
        yield Sample(name, Document((user(caption),), id=name), reference)


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
TASKS = {
    "coco-30k": Task(
        "pictures of 30,000 captions against the real ones",
        "annotations/captions_val2014.json and val2014/",
        read_coco,
        (*_FID, "clip-score/b32"),
        ("val2014",),
        sampling=ONE,
    ),
    "ln-coco": Task(
        "pictures of long narratives against the real ones",
        "coco_val_captions.jsonl and val2017/",
        read_ln_coco,
        _FID,
        ("val2017",),
        sampling=ONE,
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
