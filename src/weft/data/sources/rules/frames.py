"""Stories of cartoon frames: a first frame, the four that follow it, and a caption to each frame.

The releases keep these tables as pickles, which can run code when they are loaded and are refused. Converted once, in
a place where that is no danger, they are JSON:   captions {frame: caption or [captions]}, following {frame: [frames]}.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from weft.data.sources.base import FileSource, Plan, parse_json, root_of, skipped, walk
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import of_type, only
from weft.data.sources.files import Place, arrays, units
from weft.data.stage import Loss, Record, RecordError
from weft.document import Part, assistant
from weft.errors import UsageError

FOLLOWING = "following_cache4.json"
FRAMES = 5
PICKLED = (".npy", ".npz", ".pkl", ".pickle")


def plan_frames(config: FileSource, kind: str, tables: Sequence[str]) -> Plan:
    """The stories of a folder that holds these tables.

    Raises:
        UsageError: one of them is missing.
    """
    root = root_of(config.path)
    missing = [table for table in tables if not (root / table).is_file()]
    pickled = [file for file, why in walk(root) if why is None and file.lower().endswith(PICKLED)]
    if missing:
        held = f"; {', '.join(pickled[:4])} are pickles, which are never loaded" if pickled else ""
        raise UsageError(
            f"source {kind} needs {', '.join(missing)}{held}",
            where=str(root),
            fix="write the table as JSON once, in a container without network: json.dump({frame: [followers]}, file)",
        )
    others = tuple(skipped(file, "pickled") for file in pickled)
    return Plan(tuple(units(root, FOLLOWING, kind, "")), others)


def story(config: FileSource, value: Any, place: Place, kind: str, captions: dict[str, str], names: str) -> Record:
    """The document of one frame and its followers; a frame is `<images>/<frame>.png`.

    Args:
        names: of the main characters, which keep their capital.
    """
    first, following = only(value, "story")
    frames = [first, *(of_type(frame, str, f"{first}[{i}]") for i, frame in enumerate(of_type(following, list, first)))]
    if len(frames) != FRAMES:
        raise RecordError("story_incomplete", f"a story has {FRAMES} frames, this one has {len(frames)}", field=first)
    draft = Draft(config, place)
    parts: list[Part] = []
    for frame in frames:
        if frame not in captions:
            raise RecordError("missing_key", f"frame {frame} has no caption", field=frame)
        parts += draft.text(told(captions[frame], names), frame)
        parts += _frame(draft, frame)
    return draft.record(identity(kind, first, None), [assistant(*parts)], {})


@functools.lru_cache(maxsize=2)
def table(file: Path, inside: str = "") -> dict[str, Any]:
    """A table of captions, by frame; members that cannot be read are not in it."""
    return dict(_entries(file, inside))


def _entries(file: Path, inside: str) -> Iterator[tuple[str, Any]]:
    for data in arrays.read_all(file, inside):
        try:
            value = parse_json(data) if isinstance(data, bytes) else None
        except RecordError:
            continue
        if isinstance(value, dict) and "globalID" in value:
            yield str(value["globalID"]), value.get("description")
        elif isinstance(value, dict) and len(value) == 1:
            yield from value.items()


def told(caption: Any, names: str) -> str:
    """In lower case but for the names, on one line; of several captions the first."""
    if isinstance(caption, list):
        caption = caption[0] if caption else None
    text = " ".join(of_type(caption, str, "caption").split()).lower()
    return re.sub(rf"\b({names})\b", lambda found: found[0].capitalize(), text, flags=re.IGNORECASE)


def _frame(draft: Draft, frame: str) -> list[Part]:
    path = f"{frame}.png"

    def strip(data: bytes) -> Loss | None:
        frames = _frames_in(data)
        why = f"a strip of {frames} frames; cut it into frames first"
        return Loss("image", "image_strip", why, frame, path) if frames > 1 else None

    return draft.image(path, frame, check=strip)


def _frames_in(data: bytes) -> int:
    """Square frames one below the other, from the header of a PNG file alone."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        return 1
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    return height // width if width and height % width == 0 else 1
