"""ADE20K: a map of segments and a caption, answered by the photo.

{phase}.json                                   [{image_id, caption}]; captions come from elsewhere
<images>/annotations_with_color/{phase}/{id}.png    the map in colours
<images>/images/{phase}/{id}.jpg                    the photo
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Literal

from weft.data.sources.base import FileSource
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import name, of_type, present
from weft.data.sources.files import ARRAYS, Place, file_source
from weft.data.sources.rules.pairs import caption_of
from weft.data.stage import Record
from weft.document import assistant, user


class Ade20k(FileSource):
    """training.json, validation.json, or both."""

    kind: Literal["ade20k"] = "ade20k"


def _documents(config: Ade20k, value: Any, place: Place) -> Iterator[Record]:
    record = of_type(value, dict, "record")
    image, phase = name(record, "image_id"), PurePosixPath(place.file).stem
    caption = caption_of(present(record, "caption"), "caption")
    draft = Draft(config, place)
    segments = draft.image(f"annotations_with_color/{phase}/{image}.png", "image_id")
    asked = user(*segments, *draft.text(caption, "caption"))
    photo = assistant(*draft.image(f"images/{phase}/{image}.jpg", "image_id"))
    yield draft.record(identity("ade20k", f"{phase}/{image}", None), [asked, photo], {"split": phase})


SOURCE = file_source("ade20k", _documents, ARRAYS)
