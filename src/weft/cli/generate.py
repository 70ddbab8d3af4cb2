"""`weft generate`: a prompt of text and pictures in, text and pictures out, in order."""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from weft.cli.loading import Loading
from weft.document import Document, Image, Text, from_json, user
from weft.errors import DocumentError, UsageError
from weft.images import read_image

if TYPE_CHECKING:
    from weft.generation import Answer, BeamConfig, Event


@Parameter(name="*")
@dataclass(frozen=True)
class Sampling:
    """How the answer is drawn; what is not given is as `weft.generation.SamplingConfig` has it."""

    seed: int | None = None
    """The same seed gives the same answer."""
    temperature: float | None = None
    """Of text and pictures; 0 always takes the likeliest."""
    guidance: float | None = None
    """Classifier-free guidance of pictures, away from the prompt's text; 1 is off. Default: the model's own."""
    image_guidance: float | None = None
    """The same away from the prompt's pictures."""
    size: Annotated[tuple[int, int] | None, Parameter(negative=())] = None
    """Width and height of its pictures in pixels, for a model that makes several sizes."""
    steps: int | None = None
    """Of the diffusion model that makes the pixels, for a model that has one."""
    scheduler: str | None = None
    """Of such a model that paints from the text itself, by its name in diffusers, such as DDPMScheduler."""
    max_images: int | None = None
    """At most so many pictures."""
    min_images: int | None = None
    """At least so many pictures."""
    max_text_tokens: int | None = None
    """Text beyond them is cut off."""
    beams: int | None = None
    """Search so many texts at once for the likeliest, which ends where a picture would begin; nothing is drawn."""

    def beam_search(self) -> "BeamConfig | None":
        if self.beams is None:
            return None
        from weft.config import load_config
        from weft.generation import BeamConfig

        for name, value in asdict(self).items():
            if value is not None and name not in ("beams", "max_text_tokens"):
                raise UsageError(
                    f"--{name.replace('_', '-')} says how to draw, and with --beams nothing is drawn",
                    where="weft generate",
                    fix="give one of them",
                )
        limit = {} if self.max_text_tokens is None else {"max_tokens": self.max_text_tokens}
        return load_config(BeamConfig, overrides={"beams": self.beams, **limit})

    def overrides(self) -> dict[str, Any]:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        given.pop("beams", None)
        if "temperature" in given:
            given["text.temperature"] = given["image.temperature"] = given.pop("temperature")
        for name in ("steps", "scheduler"):
            if name in given:
                given[f"diffusion.{name}"] = given.pop(name)
        return given


def generate(
    model: str,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    image: Annotated[tuple[Path, ...], Parameter(negative=())] = (),
    adapter: Path | None = None,
    out: Path | None = None,
    html: Path | None = None,
    slots: int | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    sampling: Sampling = Sampling(),
    loading: Loading = Loading(),
) -> None:
    """Answer a prompt of text and pictures with text and pictures.

    Text and the names of pictures go to standard output as they are made; then a folder with `answer.md`, the pictures
    and `answer.json`, or one HTML page, is written, whole or not at all.

    Parameters
    ----------
    model: str
        A name such as `tiny`, the folder of a model, or owner/name of a repository on the hub.
    prompt: str
        The text; `-` reads it from standard input; `@FILE` reads a conversation in the chat form (JSON).
    image: tuple[Path, ...]
        A picture that goes before the text; may be given several times.
    adapter: Path | None
        The folder of a trained adapter.
    out: Path | None
        The folder to make; by default a new one in runs/generate.
    html: Path | None
        Write this one page instead of a folder.
    slots: int | None
        Rows of every step, by default as many as the answer needs. With the number that a server has, the same seed
        gives the server's very answer; another number may change its last bits.
    json_output: bool
        Print one JSON object for programs instead.
    """
    from weft.backbones import load_model
    from weft.config import load_config
    from weft.generation import Engine, SamplingConfig, collect, slots_for
    from weft.generation.beams import best_text
    from weft.generation.render import write_answer, write_page

    place = _place(out, html)
    config, beams = load_config(SamplingConfig, overrides=sampling.overrides()), sampling.beam_search()
    document = _read_prompt(prompt, image)
    backbone = load_model(model, adapter, loading.config())
    if beams is None:
        engine = Engine(backbone, slots=slots_for(backbone, config) if slots is None else slots)
        engine.submit(document, config)
        events = engine.run()
    else:
        if slots is not None:
            raise UsageError("--slots and --beams do not go together", where="weft generate", fix="give one of them")
        events = iter(best_text(backbone, document, beams))
    answer = collect(events if json_output else _shown(events))
    if html is not None:
        write_page(place, document, answer, title=f"weft generate {model}")
    else:
        made_by = {
            "model": model,
            "revision": backbone.revision,
            "adapter": adapter and str(adapter),
            "sampling": (config if beams is None else beams).model_dump(mode="json"),
        }
        write_answer(place, document, answer, made_by=made_by)
    if json_output:
        print(json.dumps(_summary(answer, place), ensure_ascii=False))
    else:
        print(f"written to {place if html else place / 'answer.md'}", file=sys.stderr)


def _place(out: Path | None, html: Path | None) -> Path:
    """Where the answer goes; refuses, before any work is done, to replace a folder."""
    if out is not None and html is not None:
        raise UsageError("--out and --html both say where to write", where="weft generate", fix="give one of them")
    place = html or out or Path("runs/generate") / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    if html is None and place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UsageError("--out exists and is not an empty folder", where=str(place), fix="name a new folder")
    if html is not None and place.is_dir():
        raise UsageError("--html names a folder", where=str(place), fix=f"name a file, such as {place / 'answer.html'}")
    return place


def _read_prompt(prompt: str, pictures: tuple[Path, ...]) -> Document:
    images = [Image(read_image(file.parent, file.name, where=str(file)), path=str(file)) for file in pictures]
    if prompt.startswith("@"):
        if images:
            raise UsageError(
                "--image and @FILE do not go together", where="weft generate", fix=f"add it to {prompt[1:]}"
            )
        return _read_conversation(Path(prompt[1:]))
    text = sys.stdin.read().strip() if prompt == "-" else prompt
    if not text and not images:
        raise UsageError("the prompt is empty", where="PROMPT", fix="say what to write, or give an --image")
    return Document((user(*images, *([Text(text)] if text else [])),))


def _read_conversation(file: Path) -> Document:
    try:
        record = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f"the prompt cannot be read: {error.strerror}", where=str(file)) from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"the prompt is not JSON: {error}", where=str(file)) from error
    document = from_json(record, where=str(file))
    if document.turns[-1].role == "assistant":
        raise DocumentError(
            "the last turn is the assistant's: nothing is asked", where=str(file), fix="end with a user turn"
        )
    return document.with_images(
        [Image(read_image(file.parent, str(image.path), where=str(file)), image.path) for image in document.images]
    )


def _shown(events: "Iterator[Event]") -> "Iterator[Event]":
    """The same events, printed as they pass."""
    from weft.generation import Finished, ImageReady, TextDelta
    from weft.generation.render import printable

    for event in events:
        match event:
            case TextDelta(text=text):
                print(printable(text), end="", flush=True)
            case ImageReady(index=index):
                print(f"\n[picture_{index + 1}.png]", flush=True)
            case Finished(reason=reason):
                print(f"\n(ended early: {reason})" if reason != "stop" else "", flush=True)
        yield event


def _summary(answer: "Answer", place: Path) -> dict[str, Any]:
    number, parts = 0, []
    for part in answer.parts:
        if isinstance(part, Text):
            parts.append({"type": "text", "text": part.text})
        else:
            number += 1
            parts.append({"type": "image", "image": f"picture_{number}.png"})
    return {"parts": parts, "reason": answer.reason, "usage": asdict(answer.usage), "written_to": str(place)}
