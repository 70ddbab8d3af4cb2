"""A run's folder, which one process at a time may write.

config.yaml  inputs.json  environment.json    what was run, on what, where
metrics.jsonl  timing.jsonl                   one line per step; the second is when, the first is all that is exact
checkpoints/  samples/  samples.html
adapter/                                      the result, as PEFT saves it: there when the run is finished; in it
                                              synchronizer/ and parts.safetensors where such are trained
"""

import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from weft.atomic import clean_leftovers, verify_folder, write_folder, write_json, write_text
from weft.backbones.reload import verify_adapter
from weft.backbones.trained import detach_trained, load_trained, read_parts, save_trained, trained_parameters
from weft.config import load_config, to_yaml
from weft.errors import AdapterError, CheckpointError, ConfigError, UsageError
from weft.training.checkpoint import (
    KEPT,
    Progress,
    latest_whole,
    list_checkpoints,
    read_checkpoint,
    remove_checkpoint,
    write_checkpoint,
)
from weft.training.config import TrainConfig
from weft.training.loop import StepReport, Training

log = logging.getLogger(__name__)

LOCK = ".lock"
PACKAGES = ("accelerate", "numpy", "peft", "pillow", "safetensors", "tokenizers", "torch", "transformers", "weft")
FREE_KEYS = frozenset({"out", "resume", "verify", "data.cache", "data.workers", "data.reshard"})
"""Keys of a recipe that may differ when a run is continued."""


class RunFolder:
    """Opened by `open_run`."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config = path, config
        self.checkpoints, self.samples, self.adapter = path / "checkpoints", path / "samples", path / "adapter"
        self.metrics = path / "metrics.jsonl"

    def restore(self, training: Training) -> None:
        """Bring a fresh training to where this folder's run stands, and forget what was written after that.

        Raises:
            CheckpointError: the data or the model are others than before; or a checkpoint does not fit.
        """
        self._check_inputs(training)
        chosen = self._choose_checkpoint()
        if chosen is not None:
            training.progress = read_checkpoint(chosen, training.parameters, training.optimizer)
            log.info("continuing after step %d of %d", training.progress.step, self.config.schedule.steps)
        # nothing is removed while another process still reads it
        training.accelerator.wait_for_everyone()
        if training.accelerator.is_main_process:
            self._forget_after(training.progress)

    def record(self, report: StepReport, progress: Progress) -> None:
        """Append one step's line."""
        line = json.dumps(report.to_json(), allow_nan=False) + "\n"
        with open(self.metrics, "ab") as file:
            file.write(line.encode())
        progress.metrics_bytes += len(line.encode())
        with open(self.path / "timing.jsonl", "a") as file:
            file.write(
                json.dumps({"step": report.step, "seconds": report.seconds, "positions": report.positions}) + "\n"
            )

    def save(self, training: Training) -> None:
        """Write a checkpoint and let go of the oldest."""
        if self.metrics.exists():
            # a checkpoint promises the lines before it
            with open(self.metrics, "ab") as file:
                os.fsync(file.fileno())
        folder = self.checkpoint_of(training.progress.step)
        write_checkpoint(folder, training.parameters, training.optimizer, training.progress)
        for old in list_checkpoints(self.checkpoints)[:-KEPT]:
            remove_checkpoint(old)

    def finish(self, training: Training) -> None:
        """Write what was trained, believed only after it was read back equal, by a fresh process too if the recipe says
        so. The model then holds what was read.

        Raises:
            CheckpointError: what was read back differs.
            AdapterError: the fresh process fails or gives other logits, or what was trained does nothing.
        """
        training.set_learning(False)
        backbone, parts = training.backbone, training.parts
        trained = {name: tensor.detach().clone() for name, tensor in training.parameters.items()}
        with write_folder(self.adapter) as staging:
            save_trained(backbone, parts, staging)
            found = {f"parts.{name}": tensor for name, tensor in read_parts(staging)} if parts.parameters else {}
            detach_trained(backbone)
            parts.lower()
            load_trained(backbone, staging)
            for name, tensor in (trained_parameters(backbone) | found).items():
                if not torch.equal(tensor, trained[name].to(tensor.device)):
                    raise CheckpointError(f"tensor {name} of the saved adapter reads back changed", where=str(staging))
            if self.config.verify:
                self._verify(staging, training)

    def _verify(self, staging: Path, training: Training) -> None:
        try:
            verify_adapter(staging, self.config.model, training.backbone, self.config.load)
        except AdapterError as error:
            # where it was will be gone when this is read; the checkpoints stay
            error.where = str(self.adapter)
            raise

    def checkpoint_of(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def _choose_checkpoint(self) -> Path | None:
        if not isinstance(self.config.resume, Path):
            return latest_whole(self.checkpoints)
        chosen = self.config.resume
        if chosen.resolve().parent != self.checkpoints.resolve() or not chosen.is_dir():
            known = ", ".join(folder.name for folder in list_checkpoints(self.checkpoints)) or "none"
            raise CheckpointError(
                "this is not a checkpoint of this run",
                where=str(chosen),
                fix=f"resume: auto, or one of those in {self.checkpoints} ({known})",
            )
        verify_folder(chosen)
        return chosen

    def _forget_after(self, progress: Progress) -> None:
        """Remove everything that the steps after this one will write again."""
        for folder in list_checkpoints(self.checkpoints):
            if folder.name > self.checkpoint_of(progress.step).name:
                remove_checkpoint(folder)
        for page in self.samples.glob("step_*.html"):
            if page.stem > self.checkpoint_of(progress.step).name:
                page.unlink()
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        if size < progress.metrics_bytes:
            raise CheckpointError(
                f"{size} bytes are left of the {progress.metrics_bytes} written up to step {progress.step}",
                where=str(self.metrics),
                fix="put the file back, or start a new run: --out NEW_FOLDER",
            )
        if size > progress.metrics_bytes:
            os.truncate(self.metrics, progress.metrics_bytes)

    def _check_inputs(self, training: Training) -> None:
        """The same recipe may meet other data or another model than before."""
        found = {
            "data": training.dataset.fingerprint,
            "training_documents": len(training.training),
            "validation_documents": len(training.validation),
            "model": training.backbone.name,
            "model_fingerprint": training.backbone.fingerprint,
        }
        environment = _environment(training)
        for name, values in (("inputs.json", found), ("environment.json", environment)):
            file = self.path / name
            if not file.exists():
                if training.accelerator.is_main_process:
                    write_json(file, values)
                continue
            before = json.loads(file.read_text())
            change = next((f"{key} was {before.get(key)}, is {values[key]}" for key in values
                           if before.get(key) != values[key]), None)  # fmt: skip
            if change and name == "inputs.json":
                raise CheckpointError(
                    f"this run was begun on something else: {change}",
                    where=str(file),
                    fix="start a new run: --out NEW_FOLDER",
                )
            if change:
                log.warning("%s; a continued run may differ in the last bits", change)


@contextmanager
def open_run(config: TrainConfig) -> Iterator[RunFolder]:
    """The folder of a run, new or to be continued, locked against other processes until the context ends.

    Raises:
        UsageError: the folder is in use, holds something else, or holds a run and `resume` is `never`.
        ConfigError: its run has another recipe.
    """
    path = config.out
    path.mkdir(parents=True, exist_ok=True)
    # the system lets go of the lock when its process dies, however it dies
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            "another process is training in this folder", where=str(path), fix="wait for it, or use another --out"
        ) from error
    try:
        for folder in (path, path / "checkpoints", path / "samples"):
            clean_leftovers(folder)
        _check_recipe(path, config)
        yield RunFolder(path, config)
    finally:
        lock.release()


def _check_recipe(path: Path, config: TrainConfig) -> None:
    file = path / "config.yaml"
    # without its inputs a run never took a step: its recipe may have been mended since
    if not (path / "inputs.json").exists():
        strangers = sorted(entry.name for entry in path.iterdir() if entry.name not in (LOCK, "config.yaml"))
        if strangers:
            raise UsageError(
                f"the folder holds no run, but {', '.join(strangers[:3])}", where=str(path), fix="use another --out"
            )
        write_text(file, to_yaml(config))
        return
    if config.resume == "never":
        raise UsageError(
            "the folder holds a run already, and resume is never", where=str(path), fix="use another --out"
        )
    # read as a recipe: a key that is newer than the run has its default
    before, now = (_flat(each.model_dump(mode="json")) for each in (load_config(TrainConfig, file), config))
    for key in (*now, *before):
        if key not in FREE_KEYS and before.get(key) != now.get(key):
            raise ConfigError(
                f"{key} is {now.get(key)!r}, but the run in this folder was begun with {before.get(key)!r}",
                where=str(file),
                fix="set it back to continue, or start a new run: --out NEW_FOLDER",
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _environment(training: Training) -> dict[str, Any]:
    device = training.accelerator.device
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": training.accelerator.num_processes,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
