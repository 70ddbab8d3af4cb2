"""A training state on disk: whole or absent, tensors in safetensors, the rest in JSON.

    checkpoints/step_000060/  adapter.safetensors  optimizer.safetensors  state.json  manifest.json

The learning rate and the dropout are functions of the step, and which documents come next is one of where the loader
stands, so there is nothing else to keep.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from weft.atomic import verify_folder, write_folder, write_json
from weft.errors import CheckpointError, NonFiniteError

log = logging.getLogger(__name__)

KEPT = 2


@dataclass
class Progress:
    """How far a run has come. All that changes from step to step beside weights and optimizer."""

    step: int = 0
    """Steps done, skipped ones included."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    metrics_bytes: int = 0
    """Length of `metrics.jsonl` after this step."""
    loader: dict[str, Any] | None = None
    """Where it stands, see `weft.data.loader.Loader.state`; None: at the start."""


def write_checkpoint(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Make `folder`, or leave nothing.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity; such a state is of no use later.
        CheckpointError: the disk is full, or refuses for another reason.
    """
    moments = {
        f"{name}/{key}": tensor
        for name, parameter in parameters.items()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }
    for name, tensor in (*parameters.items(), *moments.items()):
        if not tensor.isfinite().all():
            raise NonFiniteError(f"tensor {name} holds NaN or infinity, so no checkpoint is written", where=str(folder))
    try:
        with write_folder(folder) as staging:
            # saved to memory first: the library's own file writer hides why a disk refuses
            for name, tensors in (("adapter", parameters), ("optimizer", moments)):
                content = save({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()})
                (staging / f"{name}.safetensors").write_bytes(content)
            write_json(staging / "state.json", asdict(progress))
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {progress.step} cannot be written: {error.strerror or error}",
            where=str(folder),
            fix="make room, then run the same command: it continues from the checkpoint before",
        ) from error


def read_checkpoint(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's tensors in place; `folder` has been verified.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape: it belongs to another adapter or model.
    """
    weights = _load(folder / "adapter.safetensors")
    _check_shapes(
        weights, {name: parameter.shape for name, parameter in parameters.items()}, folder / "adapter.safetensors"
    )
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    place = folder / "optimizer.safetensors"
    for full_name, tensor in _load(place).items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters or (tensor.dim() and tensor.shape != parameters[name].shape):
            raise CheckpointError(
                f"tensor {full_name} {tuple(tensor.shape)} does not fit the adapter", where=str(place)
            )
        moments[name][key] = tensor
    try:
        progress = Progress(**json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"the state is not readable: {error}", where=str(folder / "state.json")) from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            # the count of steps is a scalar, which the optimizer keeps on the CPU
            optimizer.state[parameter] = {
                key: tensor.to(parameter.device) if tensor.dim() else tensor for key, tensor in moments[name].items()
            }
    return progress


def latest_whole(checkpoints: Path) -> Path | None:
    """The newest undamaged checkpoint of a run; damaged ones are passed over with a message. None: there is none.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    found = list_checkpoints(checkpoints)
    for folder in reversed(found):
        try:
            verify_folder(folder)
        except CheckpointError as error:
            log.warning("checkpoint %s is passed over: %s (%s)", folder.name, error.what, error.where)
        else:
            return folder
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints are damaged", where=str(checkpoints), fix="start a new run: --out NEW_FOLDER"
        )
    return None


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Whole or damaged, oldest first."""
    return sorted(checkpoints.glob("step_*"))


def remove_checkpoint(folder: Path) -> None:
    # out of sight first: killed half-way, no folder with missing files is left under a checkpoint's name
    hidden = folder.with_name(f".{folder.name}.old")
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the tensors are not readable: {error}", where=str(file)) from error


def _check_shapes(given: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], file: Path) -> None:
    for name in sorted(given.keys() | wanted.keys()):
        shapes = [str(tuple(shape)) if shape is not None else "nothing" for shape in
                  (given[name].shape if name in given else None, wanted.get(name))]  # fmt: skip
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"tensor {name}: the checkpoint has {shapes[0]}, the adapter has {shapes[1]}",
                where=str(file),
                fix="use the recipe that the checkpoint was made with, or another --out",
            )
