"""Answers written while training, as pages that hold everything they show."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader

from weft.atomic import write_text
from weft.document import Document, Text, Turn
from weft.images import data_uri

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


class _Shown(NamedTuple):
    text: str
    source: str | None = None


def write_samples(run: Path, step: int, prompts: Sequence[Document], answers: Sequence[Turn]) -> None:
    """Write `samples/step_000060.html` and bring `samples.html`, which shows them all, up to date."""
    pairs = [
        ([_shown(turn) for turn in prompt.turns], _shown(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    page = _TEMPLATES.get_template("samples.html").render(step=step, pairs=pairs)
    write_text(run / "samples" / f"step_{step:06d}.html", page)
    names = sorted(file.name for file in (run / "samples").glob("step_*.html"))
    pages = [(int(Path(name).stem.removeprefix("step_")), f"samples/{name}") for name in names]
    write_text(run / "samples.html", _TEMPLATES.get_template("index.html").render(pages=pages))


def _shown(turn: Turn) -> list[_Shown]:
    return list(_parts(turn))


def _parts(turn: Turn) -> Iterator[_Shown]:
    number = 0
    for part in turn.parts:
        if isinstance(part, Text):
            yield _Shown(part.text)
        else:
            number += 1
            yield _Shown(f"picture {number}", data_uri(part.data or b""))
