"""VIST: five photos, five sentences, in order. The original files, and MM-Interleaved's, which hold whole stories.

    {split}.story-in-sequence.json    {images: [...], albums: [...], annotations: [[{story_id, photo_flickr_id, ...}]]}
    {split}_formatted_filtered.json   {annotations: {story_id: [{caption, image_id, sequence_index}]}}, or only that

An original file is scanned once for where the sentences of each story are; then it is read story by story.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from weft.data.sources.base import FileSource, Plan, Source, Unit, parse_json, root_of
from weft.data.sources.draft import Draft, identity, probed
from weft.data.sources.fields import Object, name, objects, of_type, only, optional, plain, required
from weft.data.sources.files import ARRAYS, Place, arrays, chosen, units, values
from weft.data.sources.rules.steps import Step, steps
from weft.data.stage import Record, RecordError, rejected
from weft.document import assistant

STEPS = 5
_SPLIT = re.compile(r"train|val|test")


class Vist(FileSource):
    """Files of VIST; photos are `<split>/<id>`, `images/<split>_images/<id>` or `<id>` in `images`, any suffix."""

    kind: Literal["vist"] = "vist"


def plan(config: Vist) -> Plan:
    """Raises `UsageError` where nothing can be read."""
    root = root_of(config.path)
    files, others = chosen(config.path, "vist", ARRAYS)
    found: list[Unit] = []
    for file in files:
        form = _form(root / file)
        found += [Unit("vist", file, number=0)] if form is None else units(root, file, "vist", form)
    return Plan(tuple(found), tuple(others))


def read(config: Vist, unit: Unit) -> Iterator[Record]:
    root = root_of(config.path)
    form = _form(root / unit.file)
    for number, value in _stories(root / unit.file) if form is None else values(root, unit, form):
        try:
            if isinstance(value, RecordError):
                raise value
            yield _document(config, value, Place(root, unit.file, number))
        except RecordError as error:
            yield rejected(unit.file, number, error)


def _form(file: Path) -> str | None:
    """Where whole stories are; None: the file is an original, which holds sentences."""
    first = next(arrays.spans(file, "annotations"), None)
    if first is None:
        return ""
    with open(file, "rb") as handle:
        handle.seek(first[0])
        return None if handle.read(256).lstrip().startswith((b"[", b"{")) else "annotations"


def _stories(file: Path) -> Iterator[tuple[int, Any]]:
    """Every story of an original file, and what is wrong with a sentence that belongs to none."""
    with open(file, "rb") as handle:
        photos = {_id(handle, span, "id"): span for span in arrays.spans(file, "images")}
        found: dict[str, list[arrays.Span]] = {}
        number = 0
        for span in arrays.spans(file, "annotations"):
            story = _id(handle, span, "story_id")
            if isinstance(story, RecordError):
                number += 1
                yield number, story
            else:
                found.setdefault(story, []).append(span)
        for story, spans in found.items():
            number += 1
            yield number, {story: [_sentence(handle, span, photos) for span in spans]}


def _id(handle: BinaryIO, span: arrays.Span, key: str) -> Any:
    try:
        return name(_member(handle, span), key)
    except RecordError as error:
        return error


def _member(handle: BinaryIO, span: arrays.Span) -> Object:
    data = arrays.read_member(handle, span)
    if isinstance(data, RecordError):
        raise data
    value = parse_json(data)
    if isinstance(value, list):
        if len(value) != 1:
            raise RecordError("count_mismatch", f"an annotation must be a list of one, got {len(value)}")
        (value,) = value
    return of_type(value, dict, "annotation")


def _sentence(handle: BinaryIO, span: arrays.Span, photos: dict[Any, arrays.Span]) -> Object:
    sentence = _member(handle, span)
    photo = photos.get(str(sentence.get("photo_flickr_id")))
    known = plain(_member(handle, photo), "url_o", "url_m", "license") if photo is not None else {}
    return {
        # the other text is in lower case, with names replaced
        "caption": sentence.get("original_text", sentence.get("text")),
        "image_id": sentence.get("photo_flickr_id"),
        "sequence_index": sentence.get("worker_arranged_photo_order"),
        "about": known,
    }


def _document(config: Vist, value: Any, place: Place) -> Record:
    story, sentences = only(value, "story")
    draft = Draft(config, place)
    rows = objects(of_type(sentences, list, story), story)
    order = [required(row, "sequence_index", int, f"{story}[{i}].") for i, row in enumerate(rows)]
    if sorted(order) != list(range(STEPS)):
        raise RecordError("story_incomplete", f"a story has the steps 0 to {STEPS - 1}, this one has {sorted(order)}")
    told = sorted(range(STEPS), key=order.__getitem__)
    split = found[0] if (found := _SPLIT.search(PurePosixPath(place.file).name)) else None
    parts = steps(draft, (_step(draft, rows[i], f"{story}[{i}]", split) for i in told))
    meta = {"story_id": story, **({"split": split} if split else {})}
    return draft.record(identity("vist", story, value), [assistant(*parts)], meta)


def _step(draft: Draft, row: Object, at: str, split: str | None) -> Step:
    photo = name(row, "image_id", f"{at}.")
    places = (f"{split}/{photo}", f"images/{split}_images/{photo}", f"{split}_images/{photo}")
    path = next((path for place in places if (path := probed(draft.folder, place))), photo)
    return Step(required(row, "caption", str, f"{at}."), path, at, optional(row, "about", dict) or {})


SOURCE = Source(plan, read)
