"""Pictures of stories: VIST, PororoSV and FlintstonesSV, as MM-Interleaved evaluates on them.

Of VIST the fifth picture is made from everything before it; of the cartoons frames 2 to 5, one after another, each from
the frames that were made before it. The cartoons' releases keep strips of frames, and tables as pickles; what is read
here are single frames and JSON, the same files that `weft data build` reads, and the ids of the split.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weft.data.sources.flintstones import NAMES as FLINTSTONES
from weft.data.sources.pororo import NAMES as PORORO
from weft.data.sources.rules.frames import told
from weft.document import Document, Image, Part, Text, user
from weft.evaluation.journal import EvaluationError
from weft.evaluation.task import Place, Sample, Task, required

STEPS = 5
ONE = {"first": "image", "max_images": 1, "max_text_tokens": 0}


def read_vist(place: Place) -> Iterator[Sample]:
    file = place.file(*(f"{folder}{place.split}_formatted_filtered.json" for folder in ("annotations/", "")))
    table = place.json(str(file.relative_to(place.root)))
    for story, rows in table.get("annotations", table).items():
        where = f"{file}, story {story}"
        steps = sorted(rows, key=lambda row: required(row, "sequence_index", where))
        if len(steps) != STEPS:
            raise EvaluationError(f"a story has {STEPS} steps, this one has {len(steps)}", where=where)
        names = [str(required(step, "image_id", where)) for step in steps]
        captions = [str(required(step, "caption", where)) for step in steps]
        paths = [f"images/{place.split}_images/{name}.png" for name in names]
        prompt = Document((user(*_in_turn(captions, paths[:-1])),), id=str(story))
        yield Sample(str(story), prompt, {"images": paths[-1:], "caption": captions[-1], "outputs": ["image"]})


def _in_turn(captions: Sequence[str], paths: Sequence[str]) -> Iterator[Part]:
    """Each caption with its picture; what captions have more stands at the end."""
    for i, caption in enumerate(captions):
        yield Text(caption)
        if i < len(paths):
            yield Image(path=paths[i])


def _cartoons(
    place: Place, ids: Sequence[str], captions: Mapping[str, Any], names: str, folder: str
) -> Iterator[Sample]:
    following: Mapping[str, Sequence[str]] = place.json("following_cache4.json")
    for first in ids:
        if first not in following:
            raise EvaluationError(f"frame {first} has no followers", where="following_cache4.json")
        frames = [first, *following[first]]
        if len(frames) != STEPS:
            continue
        lines = [told(required(captions, frame, "captions"), names) for frame in frames]
        paths = [f"{folder}{frame}.png" for frame in frames]
        prompt = Document((user(Text(lines[0]), Image(path=paths[0]), Text(lines[1])),), id=first)
        later: tuple[tuple[Part, ...], ...] = tuple((Text(line),) for line in lines[2:])
        reference = {"images": paths[1:], "caption": lines[1], "frames": frames, "outputs": ["image"]}
        yield Sample(first, prompt, reference, later)


def read_pororo(place: Place) -> Iterator[Sample]:
    ids = place.json(f"{place.split}_ids.json")
    return _cartoons(place, ids, place.json("descriptions.json"), PORORO, "")


def read_flintstones(place: Place) -> Iterator[Sample]:
    table = place.json("flintstones_annotations_v1-0.json")
    captions = {row["globalID"]: row["description"] for row in table}
    following = place.json("following_cache4.json")
    ids = [each for each in place.json("train-val-test_split.json")[place.split] if each in following]
    return _cartoons(place, ids, captions, FLINTSTONES, "video_frames_sampled_png/")


_FID = ("fid/pytorch-fid", "fid/64", "kid/pytorch-fid")
TASKS = {
    "vist": Task(
        "the fifth picture of a story, from four captions with pictures and the fifth caption",
        "annotations/<split>_formatted_filtered.json and images/<split>_images/",
        read_vist,
        ("clip-i/l14", *_FID),
        ("val", "test"),
        sampling=ONE,
    ),
    "pororo": Task(
        "frames 2 to 5 of a cartoon, from the first frame and the captions",
        "following_cache4.json, descriptions.json, <split>_ids.json and <frame>.png",
        read_pororo,
        _FID,
        ("test", "val"),
        sampling=ONE,
    ),
    "flintstones": Task(
        "frames 2 to 5 of a cartoon, from the first frame and the captions",
        "following_cache4.json, flintstones_annotations_v1-0.json, train-val-test_split.json, "
        "video_frames_sampled_png/<frame>.png",
        read_flintstones,
        _FID,
        ("test", "val"),
        sampling=ONE,
    ),
}
