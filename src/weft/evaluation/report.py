"""The page of a comparison: scores with intervals, loss curves, stories side by side. One file, no network."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.data.sources.picturebook import Story
from weft.document import Image, Part
from weft.evaluation.interval import Share
from weft.evaluation.tasks.picturebook import StoryScore, StorySummary
from weft.images import data_uri


@dataclass(frozen=True)
class Arm:
    """One model of a comparison: its answers to the same stories, their scores, and how it was trained."""

    name: str
    parameters: int
    """Trained parameters."""
    answers: Sequence[Sequence[Part]]
    scores: Sequence[StoryScore]
    summary: StorySummary
    metrics: Sequence[Mapping[str, Any]]
    """Rows with step, image_loss, text_loss; empty for a model that was not trained."""


COLUMNS = ("well formed", "picture 1", "picture 2", "picture 3", "sentence 1", "sentence 2", "sentence 3")


def cells(summary: StorySummary) -> tuple[Share, ...]:
    """The shares of one model in the order of `COLUMNS`."""
    return (summary.wellformed, *summary.story_exact, *summary.text_exact)


def render(
    arms: Sequence[Arm],
    stories: Sequence[Story],
    *,
    title: str,
    summary: str,
    facts: Mapping[str, str],
    shown: int = 12,
) -> str:
    """The whole page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("weft.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html").render(
        title=title,
        summary=summary,
        n=len(stories),
        columns=COLUMNS,
        rows=[{"name": arm.name, "parameters": arm.parameters, "cells": cells(arm.summary)} for arm in arms],
        curves=loss_curves(arms),
        stories=[
            {"instruction": story.instruction(), "arms": [_side(arm, i) for arm in arms]}
            for i, story in enumerate(stories[:shown])
        ],
        facts=facts,
    )


def loss_curves(arms: Sequence[Arm]) -> str:
    """Text and image loss of the trained arms over steps, as SVG."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "weft", "font.size": 10}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, key, name in zip(
            figure.subplots(1, 2), ("image_loss", "text_loss"), ("picture", "text"), strict=True
        ):
            for arm in arms:
                if arm.metrics:
                    axes.plot(
                        [row["step"] for row in arm.metrics], [row[key] for row in arm.metrics], label=arm.name, lw=1
                    )
            axes.set(title=f"{name} loss, nats per element", xlabel="step", yscale="log")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _side(arm: Arm, i: int) -> dict[str, Any]:
    score, parts, number = arm.scores[i], [], 0
    for part in arm.answers[i]:
        if isinstance(part, Image):
            right = number < len(score.pictures) and score.pictures[number]
            seen = score.seen[number] if number < len(score.seen) else None
            alt = seen.caption() if seen else f"picture {number + 1}"
            parts.append({"picture": data_uri(part.data or b""), "alt": alt, "right": right})
            number += 1
        else:
            parts.append({"picture": None, "text": part.text})
    return {"name": arm.name, "parts": parts, "wellformed": score.wellformed}
