"""Steps of gradient descent that go on where they were stopped, exactly.

    folder/checkpoints/step_000050/    what is trained and the optimizer, the last two
    folder/curve.jsonl                 losses of every step

Everything that is drawn is a function of the seed and the step, so a run that was stopped ends with the same bits. Not
`weft.training`, because that loads models by their names, and the alphabets' models have none.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.atomic import write_text
from weft.backbones.base import Backbone
from weft.data.collate import collate
from weft.data.mixture import permutation
from weft.errors import NonFiniteError
from weft.layout import TokenSequence
from weft.training.checkpoint import (
    KEPT,
    Progress,
    latest_whole,
    list_checkpoints,
    read_checkpoint,
    remove_checkpoint,
    write_checkpoint,
)
from weft.training.config import OptimConfig, ScheduleConfig
from weft.training.loop import learning_rate
from weft.training.objective import Objective, count_targets

MAX_SKIPPED_IN_A_ROW = 3
Row = dict[str, Any]
Loss = Callable[[int], tuple[Tensor, Row]]
"""Step, from 1 -> what is minimised, and what is noted of it."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Pace:
    """How long and how fast."""

    steps: int
    rate: float
    """At its peak; half a cosine down to zero."""
    save_every: int
    weight_decay: float = 0.0

    @property
    def warmup(self) -> int:
        return min(20, self.steps - 1)


def descend(parameters: Mapping[str, nn.Parameter], loss: Loss, pace: Pace, folder: Path, say: Say) -> list[Row]:
    """Minimise; returns a row for each step. Parameters that need no gradient are kept in checkpoints and not moved.

    Raises:
        NonFiniteError: three steps in a row gave no finite gradient; a single one is passed over.
    """
    moved = [parameter for parameter in parameters.values() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=pace.rate, weight_decay=pace.weight_decay)
    optim = OptimConfig(learning_rate=pace.rate)
    schedule = ScheduleConfig(steps=pace.steps, warmup=pace.warmup)
    checkpoints, file = folder / "checkpoints", folder / "curve.jsonl"
    newest = latest_whole(checkpoints)
    progress = Progress() if newest is None else read_checkpoint(newest, parameters, optimizer)
    curve = _curve(file)[: progress.step]
    for step in range(progress.step + 1, pace.steps + 1):
        value, row = loss(step)
        value.backward()
        norm = nn.utils.clip_grad_norm_(moved, optim.clip)
        is_skipped = not math.isfinite(float(norm))
        if not is_skipped:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(optim, schedule, step)
            optimizer.step()
        optimizer.zero_grad()
        progress.step, progress.skipped = step, progress.skipped + is_skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if is_skipped else 0
        if progress.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"no finite gradient in steps {step - MAX_SKIPPED_IN_A_ROW + 1} to {step}",
                where=str(folder),
                fix="lower this arm's learning rate",
            )
        curve.append({"step": step, **row, **({"skipped": True} if is_skipped else {})})
        if step % pace.save_every == 0 or step == pace.steps:
            write_text(file, "".join(json.dumps(each) + "\n" for each in curve))
            write_checkpoint(checkpoints / f"step_{step:06d}", parameters, optimizer, progress)
            for old in list_checkpoints(checkpoints)[:-KEPT]:
                remove_checkpoint(old)
            say(f"step {step} of {pace.steps}")
    return curve


def document_loss(backbone: Backbone, sequences: Sequence[TokenSequence], batch: int, seed: int) -> Loss:
    """The objective of `weft train` on so many sequences of each step, all of them in turn before any comes again."""
    objective = Objective(backbone)

    def loss(step: int) -> tuple[Tensor, Row]:
        chosen = []
        for place in range((step - 1) * batch, step * batch):
            epoch, number = divmod(place, len(sequences))
            chosen.append(sequences[permutation(seed, epoch, len(sequences))[number]])
        of_step = collate(chosen, backbone.tokens.pad)
        counts = count_targets(of_step)
        sums = objective(of_step)
        text, image = (sums.detach() / counts.clamp_min(1)).tolist()
        return (sums * objective.weights(counts)).sum(), {"text_loss": text, "image_loss": image}

    return loss


@torch.no_grad()
def losses_of(backbone: Backbone, sequence: TokenSequence) -> tuple[float, float]:
    """(text, image) losses of one sequence, a target each."""
    batch = collate([sequence], backbone.tokens.pad)
    text, image = (Objective(backbone)(batch).double() / count_targets(batch).clamp_min(1)).tolist()
    return text, image


def _curve(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
