"""`weft train`: an adapter from a recipe; the same command again continues where it stopped."""

import json
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from weft.backbones.base import Backbone
    from weft.document import Document, Turn
    from weft.training import Losses, Plan, Sampler, StepReport, TrainConfig
    from weft.training.plan import RowFigures

Overrides = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


def train(recipe: Path, /, *overrides: Overrides, dry_run: Annotated[bool, Parameter(negative=())] = False) -> int:
    """Teach a model to answer with text and pictures, as a recipe says.

    Any key of the recipe can be set on the line as well: `--optim.learning_rate 0.004 --out runs/second`.
    A terminal shows a progress bar; otherwise every step is one line of JSON. Ctrl-C and SIGTERM finish the step, save,
    and leave; the same command continues from there. A second Ctrl-C leaves at once.

    Parameters
    ----------
    recipe: Path
        A YAML file; see recipes/.
    dry_run: bool
        Do a few steps without writing anything: show how one document is read and learnt, and what the run would take.
    """
    from weft.config import load_config, parse_overrides
    from weft.training import TrainConfig, interruptible, make_plan
    from weft.training import train as run

    config = load_config(TrainConfig, recipe, parse_overrides(overrides))
    _show_messages()
    if dry_run:
        _print_plan(make_plan(config))
        return 0
    with interruptible() as interrupt:
        show = _show_bar if sys.stdout.isatty() else _show_lines
        if os.environ.get("RANK", "0") != "0":
            show = _show_nothing  # one of several processes talks
        last = show(run(config, _sampler(config), stop=lambda: bool(interrupt)), config)
        if interrupt and (last is None or last.step < config.schedule.steps):
            done = f"step {last.step} is saved" if last else "nothing was to be saved"
            print(f"interrupted: {done}; the same command continues", file=sys.stderr)
            return interrupt.exit_code
    if show is not _show_nothing:
        print(f"written to {config.out / 'adapter'}", file=sys.stderr)
    return 0


def _sampler(config: "TrainConfig") -> "Sampler":
    """Samples are written by the engine, each request with its own random numbers."""
    from weft.document import Turn
    from weft.generation import Choice, SamplingConfig, generate

    wanted = config.sampling
    choice = Choice(temperature=wanted.temperature)
    sampling = SamplingConfig(
        text=choice,
        image=choice,
        seed=config.seed,
        guidance=wanted.guidance,
        max_images=wanted.max_images,
        max_text_tokens=wanted.max_text_tokens,
    )

    def answer(backbone: "Backbone", prompts: "Sequence[Document]") -> "list[Turn]":
        return [Turn("assistant", given.parts) for given in generate(backbone, prompts, sampling)]

    return answer


def _show_nothing(reports: "Iterator[StepReport]", _: "TrainConfig") -> "StepReport | None":
    last = deque(reports, maxlen=1)
    return last[0] if last else None


def _show_lines(reports: "Iterator[StepReport]", _: "TrainConfig") -> "StepReport | None":
    last = None
    for last in reports:
        print(json.dumps({**last.to_json(), "seconds": round(last.seconds, 4)}), flush=True)
    return last


def _show_bar(reports: "Iterator[StepReport]", config: "TrainConfig") -> "StepReport | None":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("training", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    last = None
    with Progress(*columns) as progress:
        task = progress.add_task("starting", total=config.schedule.steps)
        for report in reports:
            if last is None:
                # the bar's clock starts here: steps of an earlier start say nothing about the time that is left
                progress.reset(task, completed=report.step)
            last = report
            progress.update(task, completed=last.step, description=_describe(last))
            if last.validation is not None:
                progress.console.print(f"step {last.step}, validation: {_losses(last.validation)}")
    return last


def _describe(report: "StepReport") -> str:
    return "skipped: not finite" if report.skipped else _losses(report.losses)


def _losses(losses: "Losses") -> str:
    parts = (("text", losses.text), ("pictures", losses.image))
    return ", ".join(f"{name} {value:.3f}" for name, value in parts if value is not None)


def _show_messages() -> None:
    """What the library has to say, such as where it continues, goes to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("weft")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)


def _describe_parameters(plan: "Plan") -> str:
    found = plan.parameters
    parts = (
        ("text branches", found.text),
        ("picture branches", found.image),
        ("whole modules", found.other),
        ("the synchroniser", found.synchronizer),
        ("the model's own parts", found.parts),
    )
    of = ", ".join(f"{count:,} in {name}" for name, count in parts if count)
    like = f"; as many as plain LoRA of rank {found.lora_rank:.3g}" if found.lora_rank else ""
    return f"{found.all:,} trained ({of}{like})"


def _describe_rows(rows: "RowFigures") -> str:
    left = f"; {rows.left:,} documents or parts are in none" if rows.left else ""
    return (
        f"{rows.packing}, {rows.length:,} positions each, of which {rows.utilisation:.1%} hold something "
        f"({rows.alone:.1%} with a document in each): {rows.documents:,} documents in {rows.rows:,} rows, "
        f"at most {rows.most_pictures:,} pictures in one{left}"
    )


def _print_plan(plan: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"text": "cyan", "image": "magenta", "none": "dim"}
    table = Table(title=f"How document {plan.document} is read and learnt")
    for column in ("positions", "read", "branch", "predicts", "learnt"):
        table.add_column(column, overflow="fold")
    for stretch in plan.stretches:
        places = f"{stretch.start}-{stretch.stop - 1}" if stretch.stop - stretch.start > 1 else str(stretch.start)
        table.add_row(
            places,
            Text(stretch.shown),
            Text(stretch.branch, styles[stretch.branch]),
            stretch.predicts,
            Text("yes", "bold green") if stretch.is_learnt else Text("no", "dim"),
        )
    console = Console()
    console.print(table)
    console.print(f"documents: {plan.training_documents:,} to learn from, {plan.validation_documents:,} for validation")
    if plan.rows is not None:
        console.print(f"rows: {_describe_rows(plan.rows)}")
    console.print(f"parameters: {_describe_parameters(plan)}, {plan.frozen_parameters:,} frozen")
    console.print(f"memory: about {plan.peak_bytes / 2**20:,.0f} MiB, the peak of the first steps")
    minutes = plan.seconds / 60
    console.print(f"time: {plan.seconds_per_step:.2f} s a step, about {minutes:.1f} min for {plan.steps} steps")
