"""Examples for the page: what the bundled generalist can do, and what adapters of the demo add to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.images import encode_png


@dataclass(frozen=True)
class Example:
    label: str
    text: str
    model: str
    picture: Path | None = None


_BASE = "tiny"
_DRAW = (
    ("Draw", "a big red cat on the left and a small blue house on the right, in the meadow by day."),
    ("Draw a night", "a big yellow tree in the middle, in the snow at night."),
)
_STORIES = (
    ("A story", "tell a story: a small yellow car on the left and a big pink house on the right, in the desert by day, "
     "then the car grows, then night falls."),
    ("Another story", "tell a story: a big blue tree on the left and a small pink boat on the right, on the beach at "
     "night, then the tree leaves, then day breaks."),
)  # fmt: skip
_SEEN = "a big orange ball on the left and a small purple cat on the right, on the beach by day."
_CHANGED = ("a small pink house on the left and a big green tree on the right, in the meadow by day.", "night falls.")


def examples_for(models: Sequence[str], folder: Path) -> list[Example]:
    """What to try with these models, the base first; its pictures are written into the folder."""
    if models[0] != _BASE:
        return []
    # the drawn world needs NumPy and the drawing of Pillow
    from weft.data.sources.picturebook import draw, parse_caption

    folder.mkdir(exist_ok=True)

    def drawn(name: str, caption: str) -> Path:
        scene = parse_caption(caption)
        assert scene is not None
        (folder / name).write_bytes(encode_png(draw(scene)))
        return folder / name

    stories = [Example(label, text, models[-1]) for label, text in _STORIES] if len(models) > 1 else []
    return [
        *stories,
        *(Example(label, text, _BASE) for label, text in _DRAW),
        Example("Say what this shows", "", _BASE, drawn("seen.png", _SEEN)),
        Example("Change this picture", _CHANGED[1], _BASE, drawn("changed.png", _CHANGED[0])),
    ]
