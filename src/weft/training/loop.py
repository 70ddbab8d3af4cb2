"""The one training loop: a generator that yields a report after each step and touches no file.

One process or several (started by `accelerate launch` or `torchrun`) run the same code: every process takes its share
of each step's documents, and gradients and losses are summed over all of them.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from weft.adapters import attach
from weft.adapters.gradients import backward_by_modality
from weft.backbones import load_backbone
from weft.backbones.base import Backbone
from weft.backbones.trained import Parts, choose_parts, trained_parameters
from weft.data import open_dataset
from weft.data.collate import Batch, collate
from weft.data.loader import Loaded, Loader, Share
from weft.data.mixture import Joined, Mixture
from weft.data.rows import Cursor, Extent, Row, planned
from weft.errors import ConfigError, DocumentError, NonFiniteError
from weft.layout import TokenSequence
from weft.synchronizer import attach_synchronizer
from weft.training.checkpoint import Progress
from weft.training.config import OptimConfig, ScheduleConfig, TrainConfig
from weft.training.examples import Examples
from weft.training.groups import make_groups
from weft.training.modules import learning_modules, reach, recompute
from weft.training.objective import Losses, Objective, count_targets, evaluate_loss
from weft.training.order import derive_seed, split

MAX_SKIPPED_IN_A_ROW = 3
VALIDATION = 2**32
"""In place of a step's number where seeds are derived."""


@dataclass
class Training:
    """Everything a step reads and writes."""

    config: TrainConfig
    backbone: Backbone
    """Its adapter is trained, for full fine-tuning too; so is a synchroniser attached to it."""
    parts: Parts
    """And these parameters of its own."""
    dataset: Joined
    examples: Examples
    context: int
    """Positions of the longest sequence, or of every row."""
    training: Sequence[int]
    """Numbers of the documents learnt from."""
    validation: Sequence[int]
    order: Mixture
    """In which they come."""
    loader: Loader[tuple[TokenSequence, ...]]
    objective: nn.Module
    """`Objective`, possibly wrapped for several processes."""
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    progress: Progress = field(default_factory=Progress)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained."""
        return trained_parameters(self.backbone, self.parts)

    def set_learning(self, learning: bool) -> None:
        """With dropout, or without."""
        for module in learning_modules(self.backbone, self.parts):
            module.train(learning)


@dataclass(frozen=True)
class StepReport:
    """What one step did, over all processes."""

    step: int
    """From 1."""
    steps: int
    epoch: float
    """Passes over the training documents so far."""
    losses: Losses
    """Before the step's update."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    skipped: bool
    """A loss or a gradient was not finite: weights and optimizer were left alone."""
    cut_documents: int
    """Documents of this step, in this process, that were longer than the context and were cut in parts; of rows, those
    that go on in one of this step."""
    positions: int
    """Positions computed in this process, without padding."""
    seconds: float
    validation: Losses | None = None

    def to_json(self) -> dict[str, Any]:
        """What is the same in every run of the same recipe: all but the time it took."""
        record = {
            "step": self.step,
            "epoch": round(self.epoch, 6),
            **_losses_json(self.losses),
            "learning_rate": self.learning_rate,
            "gradient_norm": _finite(self.gradient_norm),
            "skipped": self.skipped,
            "cut_documents": self.cut_documents,
        }
        return record if self.validation is None else {**record, "validation": _losses_json(self.validation)}


def make_accelerator() -> Accelerator:
    """The device and the processes of this run: a GPU if there is one, else the CPU."""
    return Accelerator(cpu=not torch.cuda.is_available())


def build(config: TrainConfig) -> Training:
    """A training at step 0: the frozen model with what is fresh or trained of it, the documents, the optimizer.

    Raises:
        ConfigError: the recipe's numbers do not fit the documents or the processes, or a pattern no parameter.
        WeftError: the model or the documents cannot be opened.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator()
    if config.optim.batch % accelerator.num_processes:
        raise ConfigError(
            f"optim.batch = {config.optim.batch} cannot be shared by {accelerator.num_processes} processes",
            fix="use a multiple of the number of processes",
        )
    dataset = Joined([open_dataset(each.path) for each in config.data.weighted])
    training, validation = split(config.seed, len(dataset), config.data.validation)
    sets = dataset.apart(training)
    for own, opened, section in zip(sets, dataset.datasets, config.data.weighted, strict=True):
        if not own:
            raise ConfigError(
                f"of {len(opened)} documents, {len(opened)} are kept for validation and none is left to learn from",
                where=str(section.path),
                fix="lower data.validation, or build more data",
            )
    backbone = load_backbone(config.model, config.load, device=str(accelerator.device))
    if config.adapter is not None:
        attach(backbone, config.adapter, seed=config.seed)
    if config.synchronizer is not None:
        attach_synchronizer(backbone, config.synchronizer, seed=config.seed)
    parts = choose_parts(backbone, config.parts)
    if config.checkpointing:
        recompute(backbone, parts)
    context = min(config.data.context or backbone.context_length, backbone.context_length)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    groups = make_groups(backbone, trained_parameters(backbone, parts), config.optim)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    whole = Objective(backbone, precision, config.loss)
    reach(whole, parts)
    # what is spread over devices or quantised stays where its loader put it
    is_placed = config.load.device_map is not None or config.load.quantize is not None
    objective = accelerator.prepare(whole, device_placement=[False] if is_placed else None)
    optimizer = accelerator.prepare(optimizer)
    examples = Examples(dataset, backbone, context, config.data.cache)
    order = Mixture(sets, [each.weight for each in config.data.weighted], config.seed)
    loader = _loader(config, examples, order, context, accelerator)
    return Training(
        config, backbone, parts, dataset, examples, context, training, validation, order, loader, objective, optimizer,
        accelerator,
    )  # fmt: skip


def _loader(
    config: TrainConfig, examples: Examples, order: Mixture, context: int, accelerator: Accelerator
) -> Loader[tuple[TokenSequence, ...]]:
    data, share = config.data, Share(accelerator.process_index, accelerator.num_processes)

    def extents(places: range) -> list[Extent]:
        # every process finds out a part, and all know all
        own = [examples.extent(order[place]) for place in places[share.rank :: share.world]]
        return _interleaved(own, share.world) if share.world > 1 else own

    def plan(cursor: Cursor) -> Iterator[tuple[Row, Cursor]]:
        return planned(data.packing, data.rows, context, len(order), extents, cursor)

    def read(row: Row) -> tuple[TokenSequence, ...]:
        return examples.row(data.packing, row, order)

    # of the same run: that data, model and recipe are those of before is checked when it is continued
    name = f"{data.packing}, seed {config.seed}, {len(order)} documents, rows of {context}"
    return Loader(plan, read, config.optim.batch, name, share, data.workers)


def _interleaved(own: list[Extent], world: int) -> list[Extent]:
    """Of every process its share -> all of them in order."""
    shares: list[list[Extent]] = gather_object([own])
    assert len(shares) == world
    return [share[i] for i in range(len(shares[0])) for share in shares if i < len(share)]


def steps(training: Training) -> Iterator[StepReport]:
    """Do the steps that are left, one at a time; `training.progress` says how many are done.

    Raises:
        NonFiniteError: three steps in a row gave no finite loss and gradient; names the last one's documents.
        DocumentError: no document of a step has anything to learn.
    """
    config, progress, loader = training.config, training.progress, training.loader
    if progress.loader is None:  # at the start, or of a checkpoint from before there were rows
        done = progress.step * config.optim.batch
        loader.cursor = Cursor(done, 0, done)
    else:
        loader.restore(progress.loader, reshard=config.data.reshard)
    start = time.perf_counter()
    try:
        for step, loaded in zip(range(progress.step + 1, config.schedule.steps + 1), loader, strict=False):
            yield _report(training, step, loaded, start)
            start = time.perf_counter()
    finally:
        training.examples.flush()


def _report(training: Training, step: int, loaded: Loaded[tuple[TokenSequence, ...]], start: float) -> StepReport:
    """Do one step, which was begun at `start`."""
    config, progress, loader = training.config, training.progress, training.loader
    sequences = [part for parts in loaded.read for part in parts]
    seed = derive_seed(config.seed, step, training.accelerator.process_index)
    losses, norm = _step(training, sequences, step, seed)
    skipped = losses is None
    progress.step, progress.loader = step, loader.state()
    progress.skipped += skipped
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if skipped else 0
    if progress.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise NonFiniteError(
            f"loss or gradient was not finite in steps {step - MAX_SKIPPED_IN_A_ROW + 1} to {step}",
            where=f"documents {', '.join(part.name or '?' for part in sequences)}",
            fix="lower optim.learning_rate, or look at these documents",
        )
    return StepReport(
        step=step,
        steps=config.schedule.steps,
        epoch=loader.cursor.documents / len(training.order),
        losses=losses or Losses(None, None, 0, 0, None),
        learning_rate=learning_rate(config.optim, config.schedule, step),
        gradient_norm=norm,
        skipped=skipped,
        cut_documents=sum(len(parts) > 1 for parts in loaded.read)
        + sum(piece.start > 0 for row in loaded.rows for piece in row.pieces),
        positions=sum(map(len, sequences)),
        seconds=time.perf_counter() - start,
    )


def validate(training: Training) -> Losses:
    """Losses on the validation documents, without dropout; every process computes them whole.

    What a model draws while it learns, such as noise on pictures, is here the same every time.
    """
    parts = [part for number in training.validation for part in training.examples[number]]
    training.set_learning(False)
    objective = training.accelerator.unwrap_model(training.objective)
    with _drawing(training, derive_seed(training.config.seed, VALIDATION)):
        return evaluate_loss(objective, _batches(training, parts))


@contextmanager
def _drawing(training: Training, seed: int) -> Iterator[None]:
    """Random numbers are a function of `seed`, and the caller's are left alone."""
    device = training.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def learning_rate(optim: OptimConfig, schedule: ScheduleConfig, step: int) -> float:
    """The rate of step 1, 2, ... of parameters without one of their own."""
    return scheduled(optim.learning_rate, schedule, step)


def scheduled(peak: float, schedule: ScheduleConfig, step: int) -> float:
    if step <= schedule.warmup:
        return peak * step / schedule.warmup
    # one more, so that the last step still moves
    done = (step - schedule.warmup) / (schedule.steps - schedule.warmup + 1)
    return peak * (schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * done)) / 2)


def _step(training: Training, sequences: Sequence[TokenSequence], step: int, seed: int) -> tuple[Losses | None, float]:
    """One update. No losses: something was not finite and nothing was changed."""
    accelerator, optimizer = training.accelerator, training.optimizer
    batches = list(_batches(training, sequences))
    counts = accelerator.reduce(torch.stack([count_targets(batch) for batch in batches]).sum(0), "sum")
    if not counts.any():
        raise DocumentError(
            "no document of this step has anything to learn",
            where=", ".join(part.name or "?" for part in sequences),
            fix="keep only documents with a turn of the assistant",
        )
    training.set_learning(True)
    sums = torch.zeros(2, device=accelerator.device)
    weights = accelerator.unwrap_model(training.objective).weights(counts)
    # gradients are averaged over processes and wanted as a sum
    scale = accelerator.num_processes * weights
    with _drawing(training, seed):  # dropout is a function of the step
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(training.objective):
                part = training.objective(batch)
                _backward(training, part * scale)
                sums += part.detach()
    sums = accelerator.reduce(sums, "sum")
    norm = float(accelerator.clip_grad_norm_(list(training.parameters.values()), training.config.optim.clip))
    is_finite = math.isfinite(norm) and bool(sums.isfinite().all())
    if is_finite:
        for group in optimizer.param_groups:
            group["lr"] = scheduled(group["peak"], training.config.schedule, step)
        optimizer.step()
    optimizer.zero_grad()
    return (Losses.of(sums, counts, weights) if is_finite else None), norm


def _backward(training: Training, losses: Tensor) -> None:
    """Add the gradients of (2,) losses of text and pictures."""
    adapter = training.config.adapter
    if adapter is not None and adapter.isolate_gradients:
        text, image = losses
        backward_by_modality(training.backbone.decoder, text, image, training.accelerator.backward)
    else:
        training.accelerator.backward(losses.sum())


def _batches(training: Training, sequences: Sequence[TokenSequence]) -> Iterator[Batch]:
    size = training.config.optim.micro_batch or training.config.optim.batch
    isolated = training.config.data.rows.attention == "isolated"
    for start in range(0, len(sequences), size):
        batch = collate(sequences[start : start + size], training.backbone.tokens.pad, isolated=isolated)
        yield batch.to(training.accelerator.device)


def _losses_json(losses: Losses) -> dict[str, Any]:
    return {
        "loss": losses.total,
        "text_loss": losses.text,
        "image_loss": losses.image,
        "text_targets": losses.text_targets,
        "image_targets": losses.image_targets,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
