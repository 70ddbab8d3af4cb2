"""Documents in the chat form with their pictures in the same file: rows of Parquet, samples of a webdataset archive.

*.parquet   messages, images: list of {bytes, path}, id?, meta?; a part {type: image} holds its place in `images`, or
            takes the next one; the contents of messages may be texts with `<image>` marks instead
*.tar       <key>.json in the chat form, and the files that it names: <key>.0.jpg, <key>.1.png, ...

A dataset of `weft data build` is of this form. Ids are taken as they are. A sample with a pickle in it is refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from weft.data.sources.base import FileSource, load_picture, parse_json, settle
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import Object, objects, of_type, optional, present, required
from weft.data.sources.files import ROWS, TARS, Place, file_source
from weft.data.sources.files.tars import Sample
from weft.data.sources.rules.conversations import messages_of, meta_of, pictures_of, turns
from weft.data.stage import Loss, Record, RecordError, count
from weft.document import Document, Image, Part, Text, Turn, from_json
from weft.errors import DocumentError, PathError
from weft.images import inside

_PICKLES = (".pickle", ".pkl", ".pyd", ".pth", ".pt", ".ten", ".npy", ".npz")
"""Members that a reader of archives might run code for, or hand to something that does."""


class Embedded(FileSource):
    """Parquet files or archives; a row whose picture is only a path has it relative to `images`."""

    kind: Literal["embedded"] = "embedded"


def _documents(config: Embedded, value: Any, place: Place) -> Iterator[Record]:
    if isinstance(value, Sample):
        yield _sample(config, value, place)
        return
    row = of_type(value, dict, "record")
    messages = objects(required(row, "messages", list), "messages")
    if messages and all(isinstance(message.get("content"), str) for message in messages):
        draft = Draft(config, place)
        said = turns(draft, messages_of(row, ("messages",)), pictures_of(row))
        yield draft.record(identity("embedded", optional(row, "id", str), row, own=True), said, meta_of(row))
        return
    pictures = optional(row, "images", list) or []
    numbers = iter(range(len(pictures)))
    numbered = [{**message, "content": _numbered(message, numbers)} for message in messages]
    record = {"messages": numbered, "meta": meta_of(row)} | ({"id": row["id"]} if row.get("id") is not None else {})
    shown = {str(i): picture for i, picture in enumerate(pictures)}
    yield _with_pictures(config, _document(record, place), shown, place)


def _numbered(message: Object, numbers: Iterator[int]) -> list[Object]:
    """The parts of a message, those that are pictures named by their number; what columns leave null is left out."""
    made = []
    for part in objects(required(message, "content", list, "messages."), "messages.content"):
        if part.get("type") == "image":
            number = part.get("image")
            made.append({"type": "image", "image": str(next(numbers, "none left") if number is None else number)})
        else:
            made.append({key: found for key, found in part.items() if found is not None})
    return made


def _sample(config: Embedded, sample: Sample, place: Place) -> Record:
    pickled = next((kind for kind in sample.files if f".{kind}".endswith(_PICKLES)), None)
    if pickled is not None:
        raise RecordError("pickled", f"file .{pickled} of the sample can run code when it is loaded", field=pickled)
    if "json" not in sample.files:
        raise RecordError("missing_key", "sample holds no .json in the chat form", field="json")
    record = of_type(parse_json(sample.files["json"]), dict, "json")
    present(record, "messages")
    name = sample.key.rpartition("/")[2]
    files = {f"{name}.{kind}": {"bytes": data, "path": f"{name}.{kind}"} for kind, data in sample.files.items()}
    return _with_pictures(config, _document(record, place), files, place)


def _document(record: Object, place: Place) -> Document:
    try:
        document = from_json(record)
    except DocumentError as error:
        raise RecordError("bad_record", error.what) from error
    return Document(document.turns, document.id or f"{place.file}:{place.number}", document.meta)


def _with_pictures(config: Embedded, document: Document, pictures: Object, place: Place) -> Record:
    losses: list[Loss] = []

    def load(part: Part, field: str) -> list[Part]:
        if isinstance(part, Text):
            return [part]
        found = _picture(config, pictures, str(part.path), field, place)
        if isinstance(found, Loss):
            losses.append(found)
            return []
        return [found]

    said = tuple(
        Turn(
            turn.role,
            tuple(new for j, part in enumerate(turn.parts) for new in load(part, f"messages[{i}].content[{j}]")),
            turn.loss,
        )
        for i, turn in enumerate(document.turns)
    )
    left, lost = settle(Document(said, document.id, document.meta), losses, config.on_bad_image)
    return Record(place.file, place.number, left, count(document), lost)


def _picture(config: Embedded, pictures: Object, name: str, field: str, place: Place) -> Image | Loss:
    found = pictures.get(name)
    data, path = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (found, None)
    if isinstance(data, bytes):
        # with its bytes here the name is no path to follow, and must not become one that leads out
        return Image(data, path if isinstance(path, str) and _stays(place.folder, path) else None)
    if not isinstance(path, str):
        return Loss("image", "image_missing", f"picture {name} is not in the record", field, name)
    loaded = load_picture(config.images or place.folder, path, field)
    return loaded if isinstance(loaded, Loss) else Image(loaded, path)


def _stays(folder: Path, path: str) -> bool:
    try:
        inside(folder, path)
    except PathError:
        return False
    return bool(path)


SOURCE = file_source("embedded", _documents, (*ROWS, *TARS))
