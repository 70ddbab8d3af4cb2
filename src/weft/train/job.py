"""A whole training run: its folder, checkpoints, measurements and samples around the loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from weft.backbones.base import Backbone
from weft.document import Document, Turn, user
from weft.train.config import TrainConfig
from weft.train.folder import RunFolder, open_run
from weft.train.loop import StepReport, Training, build, make_accelerator, steps, validate
from weft.train.samples import write_samples

Sampler = Callable[[Backbone, Sequence[Document]], Sequence[Turn]]
"""Answers prompts. Given by the caller, because whatever writes answers is no part of training."""


def train(
    config: TrainConfig, sampler: Sampler | None = None, *, stop: Callable[[], bool] = lambda: False
) -> Iterator[StepReport]:
    """Run a recipe in its folder, continuing what is there; yields after each step, when all of it is on disk.

        for report in train(config):
            print(report.step, report.losses.total)

    When the last step is done, `config.out / "adapter"` holds the adapter. Killed at any moment, the same call goes on
    from the last checkpoint and ends with the same bytes.

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
        stopped = stop()
        left = steps(training)
        while not stopped and (report := next(left, None)) is not None:
            is_last = report.step == config.schedule.steps
            if training.validation and (is_last or report.step % config.validate_every == 0):
                report = replace(report, validation=validate(training))
            stopped = stop()
            if main:
                run.record(report, training.progress)
                if sampler is not None and prompts and report.step % (config.sampling.every or 1) == 0:
                    write_samples(run.path, report.step, prompts, sampler(training.backbone, prompts))
                if is_last or stopped or report.step % config.save_every == 0:
                    # last: whoever continues from a checkpoint finds everything before it
                    run.save(training)
            training.accelerator.wait_for_everyone()
            yield report
        if main and training.progress.step == config.schedule.steps:
            run.finish(training)


def _folder_of_this_process(config: TrainConfig) -> AbstractContextManager[RunFolder]:
    """The first process prepares and holds the folder, the others only read it."""
    if make_accelerator().is_main_process:
        return open_run(config)
    return nullcontext(RunFolder(config.out, config))


def _prompts(training: Training) -> list[Document]:
    wanted = training.config.sampling
    numbers = (training.validation or training.training)[: wanted.documents]
    documents = [training.dataset[number] for number in numbers]
    return [*(Document((user(text),)) for text in wanted.prompts), *filter(None, map(_asked, documents))]


def _asked(document: Document) -> Document | None:
    """A document as far as its first answer; None where nothing is asked before it."""
    first = next((i for i, turn in enumerate(document.turns) if turn.role == "assistant"), len(document.turns))
    return Document(document.turns[:first], document.id) if first else None
