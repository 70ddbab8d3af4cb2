"""The demonstration: one base, two adapters tuned on the same stories for the same steps, three models compared."""

import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from weft.atomic import write_json, write_text
from weft.data.sources.picturebook import Reader
from weft.errors import UsageError
from weft.evaluation.report import COLUMNS, Arm, cells, render
from weft.evaluation.tasks.picturebook import held_out_stories, prompt, score_story, summarise

ARMS: tuple[Literal["base", "lora", "moss"], ...] = ("base", "lora", "moss")
TRAINING_STORIES = 1600
RANK = 8
SLOTS = 60
CONTEXT = 448


def run_demo(out: Path, *, steps: int, stories: int, threads: int, say: Callable[..., None]) -> dict[str, Any]:
    """Run everything into `out` and return what `report.json` holds.

    Args:
        say: told what is going on, a line at a time; `done=True` for what stays on the screen.
    """
    import torch

    from weft.adapters import adapter_parameters, detach, load_adapter
    from weft.backbones import load_backbone
    from weft.generation import SamplingConfig, generate

    for name, value in (("steps", steps), ("stories", stories), ("threads", threads)):
        if value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}", where="weft demo", fix=f"--{name} 1 or more")
    start = time.monotonic()
    reused = [name for name in ARMS if (out / name / "adapter").is_dir()]
    torch.set_num_threads(threads)
    held_out = held_out_stories(stories)
    data = out / "data"
    say(f"building {TRAINING_STORIES:,} stories")
    build_stories(data)
    say(f"built {TRAINING_STORIES:,} stories in {time.monotonic() - start:.0f} s", done=True)

    backbone, reader = load_backbone("tiny"), Reader()
    sampling = SamplingConfig(max_images=4, max_text_tokens=96)
    arms = []
    for name in ARMS:
        began, parameters, metrics = time.monotonic(), 0, []
        if name != "base":
            metrics = tune(name, data, out / name, steps=steps, threads=threads, say=say)
            load_adapter(backbone, out / name / "adapter")
            parameters = sum(p.numel() for p in adapter_parameters(backbone).values())
        say(f"{name}: writing {stories} held-out stories")
        answers = generate(backbone, [prompt(story) for story in held_out], sampling, slots=SLOTS, context=CONTEXT)
        scores = [score_story(s, a.parts, a.reason == "stop", reader) for s, a in zip(held_out, answers, strict=True)]
        arms.append(Arm(name, parameters, [a.parts for a in answers], scores, summarise(scores), metrics))
        if name != "base":
            detach(backbone)
        say(f"{name}: {_line(arms[-1])} ({time.monotonic() - began:.0f} s)", done=True)

    seconds = time.monotonic() - start
    result: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "peak_rss_mb": round(_peak_rss_mb(), 1),
        "steps": steps,
        "n": stories,
        "reused": reused,
        "models": {arm.name: _figures(arm) for arm in arms},
    }
    facts = {
        "base model": f"tiny, {sum(p.numel() for p in backbone.parameters()):,} parameters, frozen",
        "training data": f"{TRAINING_STORIES:,} stories of three pictures, none with a held-out scene",
        "tuning": f"{steps} steps, the same data in the same order for each adapter",
        "writing": "free running, greedy, no model sees a picture it did not draw",
        "time": f"{seconds:.0f} s on {threads} threads, at most {result['peak_rss_mb']:.0f} MB"
        + (f"; {' and '.join(reused)} had been tuned before" if reused else ""),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
        "again": f"weft demo --steps {steps} --stories {stories} --threads {threads}",
    }
    page = render(
        arms,
        held_out,
        title="Teaching a small generalist to write illustrated stories",
        summary="The base knows single skills: draw a caption, caption a picture, change a picture. It has never seen "
        "a story. Each adapter learns on the same stories to write text and pictures in turn; the base stays frozen.",
        facts=facts,
    )
    write_text(out / "report.html", page)
    write_json(out / "report.json", result)
    return result


def build_stories(out: Path) -> None:
    """The training data, through the same pipeline as anybody's documents."""
    from weft.data.build import BuildConfig, build
    from weft.data.sources.picturebook_source import Picturebook

    build(BuildConfig(sources=(Picturebook(task="story", n=TRAINING_STORIES, seed=1),)), out)


def tune(
    kind: Literal["lora", "moss"], data: Path, out: Path, *, steps: int, threads: int, say: Callable[..., None]
) -> list[dict[str, Any]]:
    """Train one adapter into `out`; returns its losses by step. A finished run of the same recipe is used as it is."""
    from weft.adapters import AdapterConfig
    from weft.training import TrainConfig, train
    from weft.training.config import DataConfig, ScheduleConfig

    config = TrainConfig(
        data=DataConfig(path=data),
        adapter=AdapterConfig(kind=kind, rank=RANK),
        schedule=ScheduleConfig(steps=steps, warmup=min(20, steps - 1)),
        threads=threads,
        out=out,
        save_every=max(100, steps),
    )
    for report in train(config):
        loss = report.losses.total
        say(f"{kind}: step {report.step} of {steps}, " + ("skipped" if loss is None else f"loss {loss:.3f}"))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _figures(arm: Arm) -> dict[str, Any]:
    """The numbers of one model, plain and with intervals."""
    summary = arm.summary
    sentences = [s.value for s in summary.text_exact]
    return {
        "story_exact": [round(s.value, 4) for s in summary.story_exact],
        "wellformed": round(summary.wellformed.value, 4),
        "text_exact": round(sum(sentences) / len(sentences), 4),
        "trained_parameters": arm.parameters,
        "intervals": {column: s.to_json() for column, s in zip(COLUMNS, cells(summary), strict=True)},
    }


def _line(arm: Arm) -> str:
    pictures = " ".join(f"{s.value:.2f}" for s in arm.summary.story_exact)
    return f"well formed {arm.summary.wellformed.value:.2f}, pictures right {pictures}"


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
