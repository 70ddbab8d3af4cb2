"""One piece of work of the miniature, from nothing to a JSON file; what was begun is gone on with.

    out/alphabets/codec/ alphabets/<alphabet>/    the models of alphabets, their stories as elements, alphabet.json
    out/arms/<arm>/seed<k>/                       one run of an arm: checkpoints, curve.jsonl, result.json

A job may be started twice, by an earlier start that outlived its parent: the second waits and finds it done.
"""

import functools
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.atomic import write_json
from weft.data.sources.picturebook import Reader, Scene, Story, draw, held_out_scene, random_story
from weft.document import Document, Image, Text, assistant, user
from weft.evaluation.miniature.arms import ARMS, Alphabet, Arm, Budget
from weft.evaluation.miniature.tuning import Say
from weft.images import data_uri, decode_image, encode_png

SHOWN = 3
"""Answers of each run that are kept for the gallery."""
TRAINING_SEED = 7
TEXT_TOKENS, IMAGES = 96, 4
"""An answer's most."""


@dataclass(frozen=True)
class Job:
    name: str
    """`codec`, `alphabet/<alphabet>` or `arm/<arm>/<seed>`."""
    needs: tuple[str, ...] = ()

    def folder(self, out: Path) -> Path:
        kind, *rest = self.name.split("/")
        if kind == "arm":
            return out / "arms" / rest[0] / f"seed{rest[1]}"
        return out / "alphabets" / (rest[0] if rest else kind)

    def result(self, out: Path) -> Path:
        return self.folder(out) / "result.json"


def jobs_of(budget: Budget) -> list[Job]:
    """Everything a budget pays for, what others wait for first."""
    arms = [ARMS[name] for name in budget.arms]
    alphabets = list(dict.fromkeys(arm.alphabet for arm in arms))
    # the generalist's own is there at once, so that the arms on it fill the time while others are learnt
    found = [Job("alphabet/patch")] if "patch" in alphabets else []
    if {"field", "vector"} & set(alphabets):
        found.append(Job("codec"))
    for alphabet in alphabets:
        if alphabet != "patch":
            found.append(Job(f"alphabet/{alphabet}", ("codec",) if alphabet in ("field", "vector") else ()))
    for seed in range(budget.seeds):
        for arm in arms:
            if arm.adapter is not None or seed == 0:
                found.append(Job(f"arm/{arm.name}/{seed}", (f"alphabet/{arm.alphabet}",)))
    return found


def do(job: Job, out: Path, budget: Budget, say: Say) -> None:
    """Do a job that is not done yet."""
    from filelock import FileLock

    folder = job.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if job.result(out).is_file():
            return
        kind, *rest = job.name.split("/")
        if kind == "arm":
            found = _run(ARMS[rest[0]], int(rest[1]), out, budget, folder, say)
        elif kind == "alphabet":
            found = _prepare(rest[0], out, budget, folder, say)  # type: ignore[arg-type]
        else:
            found = _codec(budget, folder, say)
        write_json(job.result(out), found)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def story_document(story: Story) -> Document:
    """A story with its true answer."""
    pictures = [Image(encode_png(draw(scene))) for scene in story.scenes]
    parts = [part for step in zip(story.sentences(), pictures, strict=True) for part in step]
    return Document((user(story.instruction()), assistant(*parts)), story.instruction())


def _codec(budget: Budget, folder: Path, say: Say) -> dict[str, Any]:
    from weft.evaluation.miniature.alphabets import FieldCodec, train_codec

    codec = FieldCodec(_generalist(budget).config.codec)
    train_codec(codec, budget, folder, say)
    return {"steps": budget.codec, "parameters": sum(p.numel() for p in codec.parameters())}


def _prepare(alphabet: Alphabet, out: Path, budget: Budget, folder: Path, say: Say) -> dict[str, Any]:
    """An alphabet's model, what it is like in the order that it knows, and its training stories as elements."""
    from weft.evaluation.miniature.alphabets import OWN, describe
    from weft.generation import SamplingConfig, generate
    from weft.generation.sampling import DiffusionConfig

    model = _model(alphabet, out, budget, say)
    rng, reader = random.Random("miniature"), _reader()
    scenes: list[Scene] = [held_out_scene(rng) for _ in range(budget.checked)]
    asked = [Document((user(scene.caption()),)) for scene in scenes]
    sampling = SamplingConfig(first="image", max_images=1, max_text_tokens=0, diffusion=DiffusionConfig(guidance=1))
    answers = generate(model, asked, sampling, slots=min(60, len(asked)), context=_room(model, asked))
    drawn = [
        [reader.read(decode_image(part.data)) for part in answer.parts if isinstance(part, Image) and part.data][:1]
        for answer in answers
    ]
    right = sum(found == [scene] for found, scene in zip(drawn, scenes, strict=True))
    facts = describe(model, scenes)
    model.write_anew()
    _training(model, out, budget)
    return {
        "kind": model.kind,
        "base_steps": 0 if alphabet in OWN else budget.base,
        "captions_drawn_right": round(right / len(scenes), 4),
        "captions": len(scenes),
        **facts,
    }


def _run(arm: Arm, seed: int, out: Path, budget: Budget, folder: Path, say: Say) -> dict[str, Any]:
    """Tune an arm once, let it answer the held-out stories, and score them."""
    from weft.adapters import AdapterConfig, adapter_parameters, attach
    from weft.backbones.base import encode_document
    from weft.evaluation.miniature.aspects import score
    from weft.evaluation.miniature.tuning import Pace, descend, document_loss, losses_of
    from weft.evaluation.task import read_json
    from weft.evaluation.tasks.picturebook import held_out_stories, prompt
    from weft.generation import SamplingConfig, generate
    from weft.generation.sampling import DiffusionConfig

    model = _model(arm.alphabet, out, budget, say)
    model.write_anew()
    ceiling = read_json(Job(f"alphabet/{arm.alphabet}").result(out))["reconstruction_db"]
    curve: list[dict[str, Any]] = []
    parameters = 0
    if arm.adapter is not None:
        attach(model, AdapterConfig.model_validate(dict(arm.adapter)), seed=seed)
        trained = adapter_parameters(model)
        parameters = sum(p.numel() for p in trained.values())
        loss = document_loss(model, _training(model, out, budget), budget.batch, seed)
        pace = Pace(budget.steps, budget.rates.get(arm.name, arm.rate), budget.save_every)
        curve = descend(trained, loss, pace, folder, say)
    stories = held_out_stories(budget.stories)
    values: dict[str, list[float]] = {}
    for story in stories:
        text, image = losses_of(model, encode_document(model, story_document(story)))
        for name, value in (
            ("text_loss", text),
            ("image_loss", image),
            ("log_image_loss", math.log(max(image, 1e-12))),
        ):
            values.setdefault(name, []).append(value)
    say(f"writing {len(stories)} stories")
    asked = [prompt(story) for story in stories]
    sampling = SamplingConfig(max_images=IMAGES, max_text_tokens=TEXT_TOKENS, diffusion=DiffusionConfig(guidance=1))
    answers = generate(model, asked, sampling, slots=min(60, len(asked)), context=_room(model, asked))
    reader = _reader()
    for story, answer in zip(stories, answers, strict=True):
        for name, value in score(story, answer.parts, answer.reason == "stop", reader, ceiling).items():
            values.setdefault(name, []).append(value)
    return {
        "arm": arm.name,
        "seed": seed,
        "trained_parameters": parameters,
        "skipped_steps": sum(bool(row.get("skipped")) for row in curve),
        "curve": _thinned(curve),
        "values": values,
        "answers": [
            [{"text": p.text} if isinstance(p, Text) else {"picture": data_uri(p.data or b"")} for p in answer.parts]
            for answer in answers[:SHOWN]
        ],
    }


def _thinned(curve: Sequence[dict[str, Any]], points: int = 50) -> list[dict[str, Any]]:
    """Means of so many stretches of steps."""
    size = max(1, math.ceil(len(curve) / points))
    stretches = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [
        {
            "step": part[-1]["step"],
            **{k: round(sum(r[k] for r in part) / len(part), 6) for k in ("text_loss", "image_loss")},
        }
        for part in stretches
    ]


@functools.cache
def _reader() -> Reader:
    return Reader()


@functools.cache
def _generalist_named(name: str) -> Any:
    from weft.backbones.tiny import load

    return load(name)


def _generalist(budget: Budget) -> Any:
    return _generalist_named(budget.generalist)


def _model(alphabet: Alphabet, out: Path, budget: Budget, say: Say) -> Any:
    from weft.evaluation.miniature.alphabets import make

    folders = out / "alphabets"
    return make(alphabet, _generalist(budget), budget, folders / alphabet, folders / "codec", say)


def _training(model: Any, out: Path, budget: Budget) -> list[Any]:
    """The stories to learn from, encoded once for all arms of an alphabet."""
    from weft.backbones.base import encode_document
    from weft.data.token_cache import TokenCache

    cache = TokenCache(
        out / "alphabets" / model.alphabet / "stories", data=f"seed {TRAINING_SEED}", weights=model.fingerprint
    )
    found = []
    for number in range(budget.training):
        sequence = cache.get(number)
        if sequence is None:
            # seeded by number, so that more of them begin with the same ones
            story = random_story(random.Random(f"miniature:{TRAINING_SEED}:{number}"), held_out=False)
            sequence = encode_document(model, story_document(story))
            cache.put(number, sequence)
        found.append(sequence)
    cache.flush()
    return found


def _room(model: Any, asked: Sequence[Document]) -> int:
    """Positions of the longest prompt and the longest answer."""
    from weft.backbones.base import encode_document

    longest = max(len(encode_document(model, document, answer=True)) for document in asked)
    return min(model.context_length, longest + TEXT_TOKENS + IMAGES * model.form.length + 8)
