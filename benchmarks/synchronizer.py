"""What a synchroniser is good for: small things in a picture.    python -m benchmarks.synchronizer [--quick]

The task: a page twice as wide and high as the pictures that the tiny generalist knows, with a small scene in its
middle; then a question for the colour of the thing in it. As codes, that thing is less than one patch, which the codec
never saw so small. MoSS must make do with these codes; a synchroniser looks at the page itself.

The frozen generalist is trained four ways, nothing, MoSS, synchroniser, both, with the same documents and steps, and
asked about pages that training did not show. An answer counts as right if every token of the colour's name is the
likeliest given those before it; chance is one in eight. Shares with 95 % intervals over all questions of all seeds, and
the seeds apart; the last line is JSON.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table

from weft.adapters import AdapterConfig
from weft.backbones import load_backbone
from weft.backbones.base import Backbone, encode_document
from weft.data.collate import collate
from weft.data.sources.picturebook import COLORS, KINDS, SETTINGS, SIDE, TIMES, Scene, Thing, draw
from weft.document import Document, Image, assistant, user
from weft.evaluation.interval import Share, share
from weft.images import encode_png
from weft.synchronizer import SynchronizerConfig
from weft.synchronizer.eye import EyeConfig
from weft.synchronizer.sight import see
from weft.training import TrainConfig, build, steps

SYNCHRONIZER = SynchronizerConfig(
    eye=EyeConfig(side=2 * SIDE, width=32, stem=16, scales=3), every=2, heads=4, offset_init=1.0
)
WAYS: dict[str, tuple[AdapterConfig | None, SynchronizerConfig | None]] = {
    "nothing": (None, None),
    "MoSS": (AdapterConfig(kind="moss", rank=8, kernel=2), None),
    "synchroniser": (None, SYNCHRONIZER),
    "both": (AdapterConfig(kind="moss", rank=8, kernel=2), SYNCHRONIZER),
}
GATES = [{"match": "gate$", "learning_rate": 3e-2}]
"""They start at zero, and until they open nothing behind them learns much."""


def page(rng: random.Random) -> tuple[PILImage.Image, Thing]:
    """A page of one grey, and in its middle a picture of half the usual width with one thing in it."""
    thing = Thing(rng.choice(KINDS), rng.choice(COLORS), "big")
    setting, when = rng.choice(SETTINGS), rng.choice(TIMES)
    picture = PILImage.new("RGB", (2 * SIDE, 2 * SIDE), (rng.randint(90, 200),) * 3)
    inner = draw(Scene(setting, when, (("middle", thing),)))
    inner = inner.resize((SIDE // 2, SIDE // 2), PILImage.Resampling.BOX)
    picture.paste(inner, (3 * SIDE // 4, 3 * SIDE // 4))
    return picture, thing


def question(rng: random.Random, name: str) -> tuple[Document, str]:
    """A document and the colour that its answer names."""
    shown, thing = page(rng)
    turns = (user(Image(encode_png(shown)), f"the {thing.kind} turns"), assistant(f"{thing.color}."))
    return Document(turns, name), thing.color


def write_questions(folder: Path, count: int, seed: int) -> Path:
    """JSONL with its pictures beside it."""
    rng, lines = random.Random(f"train {seed}"), []
    for number in range(count):
        document, _ = question(rng, f"q{number}")
        named = [Image(image.data, f"{number}_{k}.png") for k, image in enumerate(document.images)]
        for image in named:
            (folder / str(image.path)).write_bytes(image.data or b"")
        lines.append(json.dumps(document.with_images(named).to_json()))
    file = folder / "documents.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def train(file: Path, way: str, count: int, seed: int) -> Backbone:
    adapter, synchronizer = WAYS[way]
    if adapter is None and synchronizer is None:
        return load_backbone("tiny")
    config = TrainConfig.model_validate(
        {
            "data": {"path": file},
            "adapter": adapter,
            "synchronizer": synchronizer,
            "optim": {"learning_rate": 2e-3, "batch": 8, "groups": GATES if synchronizer else []},
            "schedule": {"steps": count, "warmup": 20},
            "seed": seed,
            "threads": torch.get_num_threads(),
        }
    )
    training = build(config)
    last = None
    for last in steps(training):
        if last.step % 50 == 0:
            print(f"    step {last.step}: {last.losses.text:.3f}", flush=True)
    training.set_learning(False)
    return training.backbone


@torch.no_grad()
def answers(backbone: Backbone, count: int, seed: int) -> list[bool]:
    """Whether each of some new questions is answered rightly."""
    rng, found = random.Random(f"test {seed}"), []
    for number in range(count):
        document, _ = question(rng, f"t{number}")
        batch = collate([encode_document(backbone, document)], backbone.tokens.pad)
        layout = batch.layout
        if backbone.synchronizer is not None and batch.pictures is not None:
            layout, _, _ = see(backbone.synchronizer, batch.pictures.seen, batch.ids, layout, backbone.tokens.begin)
        hidden = backbone.forward(backbone.embed(batch.ids, layout), layout)
        chosen = (batch.labels[0] >= 0).nonzero()[:-2, 0]  # the full stop and the end follow of themselves
        said = backbone.text_logits(hidden[0, chosen]).argmax(-1)
        found.append(bool((said == batch.labels[0, chosen]).all()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, fewer documents and steps")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    seeds, documents, count, asked = ((0,), 600, 80, 200) if given.quick else ((0, 1, 2), 1500, 250, 400)
    count = given.steps or count
    torch.set_num_threads(given.threads)
    hits: dict[str, list[list[bool]]] = {way: [] for way in given.ways}
    seconds: dict[str, float] = dict.fromkeys(given.ways, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            place = Path(folder) / str(seed)
            place.mkdir()
            file = write_questions(place, documents, seed)
            for way in given.ways:
                start = time.perf_counter()
                backbone = train(file, way, count, seed)
                seconds[way] += time.perf_counter() - start
                hits[way].append(answers(backbone, asked, seed))
                print(f"seed {seed}, {way}: {share(hits[way][-1]).value:.3f}, {seconds[way]:.0f} s so far", flush=True)
    report(hits, seconds, count, given.out)


def report(hits: dict[str, list[list[bool]]], seconds: dict[str, float], count: int, out: Path | None) -> None:
    table = Table(title=f"colour of a small thing on an earlier page, after {count} steps")
    for column in ("trained", "right", "95 %", "each seed", "seconds"):
        table.add_column(column)
    figures: dict[str, Any] = {"steps": count}
    for way, found in hits.items():
        whole: Share = share([hit for of_seed in found for hit in of_seed])
        low, high = whole.interval
        each = [share(of_seed).value for of_seed in found]
        each_said = " ".join(f"{value:.3f}" for value in each)
        table.add_row(way, f"{whole.value:.3f}", f"{low:.3f} to {high:.3f}", each_said, f"{seconds[way]:.0f}")
        figures[way] = {**whole.to_json(), "each_seed": each, "seconds": round(seconds[way], 1)}
    Console().print(table)
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps({way: round(figures[way]["each_seed"][0], 4) for way in hits} | {"steps": count}))


if __name__ == "__main__":
    main()
