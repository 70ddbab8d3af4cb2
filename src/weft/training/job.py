"""A whole training run: its folder, checkpoints, measurements and samples around the loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice

import torch

from weft.backbones.base import Backbone, check_fits, encode_document
from weft.document import Document, Turn, user
from weft.training.config import TrainConfig
from weft.training.folder import RunFolder, open_run
from weft.training.loop import StepReport, Training, build, make_accelerator, steps, validate
from weft.training.samples import write_samples

Sampler = Callable[[Backbone, Sequence[Document]], Sequence[Turn]]
"""Answers prompts. Given by the caller, because whatever writes answers is no part of training."""


def train(
    config: TrainConfig, sampler: Sampler | None = None, *, stop: Callable[[], bool] = lambda: False
) -> Iterator[StepReport]:
    """Run a recipe in its folder, continuing what is there; yields after each step, when all of it is on disk.

        for report in train(config):
            print(report.step, report.losses.total)

    When the last step is done, `config.out / "adapter"` holds what was trained. Killed at any moment, the same call
    goes on from the last checkpoint and ends with the same bytes.

    Args:
        sampler: writes the answers that `config.sampling` asks for; without one there are none.
        stop: asked after each step; if it says so, a checkpoint is written and the iterator ends.

    Raises:
        UsageError, ConfigError: the folder is in use or is not this recipe's.
        CheckpointError: a checkpoint cannot be written or does not fit.
        NonFiniteError: see `steps`.
    """
    with _folder_of_this_process(config) as run:
        training = build(config)
        main = training.accelerator.is_main_process
        prompts = _prompts(training) if sampler is not None and config.sampling.every else []
        run.restore(training)
        training.accelerator.wait_for_everyone()
        stopped = _agree(training, stop())
        left = steps(training)
        while not stopped and (report := next(left, None)) is not None:
            is_last = report.step == config.schedule.steps
            if training.validation and (is_last or report.step % config.validate_every == 0):
                report = replace(report, validation=validate(training))
            stopped = _agree(training, stop())
            if main:
                run.record(report, training.progress)
                if sampler is not None and prompts and report.step % (config.sampling.every or 1) == 0:
                    training.set_learning(False)
                    write_samples(run.path, report.step, prompts, sampler(training.backbone, prompts))
                if is_last or stopped or report.step % config.save_every == 0:
                    # last: whoever continues from a checkpoint finds everything before it
                    run.save(training)
            training.accelerator.wait_for_everyone()
            yield report
        if main and training.progress.step == config.schedule.steps:
            run.finish(training)


def _agree(training: Training, wish: bool) -> bool:
    """What any process wishes, all do: one that stopped alone would leave the others waiting for it."""
    wishes = torch.tensor(float(wish), device=training.accelerator.device)
    return bool(training.accelerator.reduce(wishes, "sum"))


def _folder_of_this_process(config: TrainConfig) -> AbstractContextManager[RunFolder]:
    """The first process prepares and holds the folder, the others only read it."""
    if make_accelerator().is_main_process:
        return open_run(config)
    return nullcontext(RunFolder(config.out, config))


def _prompts(training: Training) -> list[Document]:
    """What samples answer. At most half a context, so that an answer has room; checked at the start.

    Raises:
        ContextError: a prompt of the recipe is longer. Documents that are longer are left out.
    """
    wanted, backbone = training.config.sampling, training.backbone
    half = backbone.context_length // 2
    texts = [Document((user(text),)) for text in wanted.prompts]
    for prompt in texts:
        check_fits(encode_document(backbone, prompt, answer=True), half)
    asked = (_asked(training.dataset[number]) for number in training.validation or training.training)
    fitting = (p for p in asked if p is not None and len(encode_document(backbone, p, answer=True)) <= half)
    return [*texts, *islice(fitting, wanted.documents)]


def _asked(document: Document) -> Document | None:
    """A document as far as its first answer; None where nothing is asked before it."""
    first = next((i for i, turn in enumerate(document.turns) if turn.role == "assistant"), len(document.turns))
    return Document(document.turns[:first], document.id) if first else None
