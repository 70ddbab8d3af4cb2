"""What a recipe would do, found out by doing a few steps of it without writing anything."""

import resource
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import nn

from weft.adapters import MossConfig
from weft.adapters.layer import MossLinear
from weft.adapters.routing import route
from weft.backbones.base import Backbone
from weft.data.rows import Packing, best_fit, stream, utilisation
from weft.layout import Modality, ModalityLayout, TokenSequence, lay_out
from weft.training.config import TrainConfig
from weft.training.loop import Training, build, steps

MEASURED_STEPS = 3


@dataclass(frozen=True)
class Stretch:
    """Consecutive positions that are treated alike."""

    start: int
    stop: int
    shown: str
    """The text read there, control tokens as <name>; or which patches of which picture."""
    branch: str
    """The adapter branch that the positions take: text, image, or none. Patterns may change it in single layers."""
    predicts: str
    is_learnt: bool
    """What the positions predict counts in the loss."""


@dataclass(frozen=True)
class Parameters:
    """How many parameters are trained."""

    text: int
    """Of text branches, also where these serve pictures too."""
    image: int
    other: int
    """Of modules that an adapter trains whole."""
    synchronizer: int
    parts: int
    """The model's own."""
    lora_rank: float
    """Of the plain LoRA on the adapted layers that would train as many: what to compare with at an equal number. 0
    where no layer is adapted."""

    @property
    def all(self) -> int:
        return self.text + self.image + self.other + self.synchronizer + self.parts

    @classmethod
    def of(cls, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> "Parameters":
        """Of a decoder stack and all that is trained, see `trained_parameters`."""
        counts = {"text": 0, "image": 0, "other": 0, "synchronizer": 0, "parts": 0}
        for name, parameter in trained.items():
            beside = name.split(".")[0]
            kind = beside if beside in ("synchronizer", "parts") else "other"
            kind = next((kind for kind in ("text", "image") if f".moss_{kind}_" in name), kind)
            counts[kind] += parameter.numel()
        layers = (module for module in model.modules() if isinstance(module, MossLinear))
        per_rank = sum(layer.in_features + layer.out_features for layer in layers)
        return cls(**counts, lora_rank=sum(counts.values()) / per_rank if per_rank else 0.0)


@dataclass(frozen=True)
class RowFigures:
    """How the first documents that would be learnt from are packed, as many as are looked at together."""

    packing: Packing
    length: int
    documents: int
    rows: int
    utilisation: float
    """The share of their positions that hold an element."""
    alone: float
    """The same with one document in a row."""
    most_pictures: int
    """In one row."""
    left: int
    """Documents, or parts of them, in no row: too long, without a picture, or at the end of the stream."""


@dataclass(frozen=True)
class Plan:
    """Figures are of this machine; memory and time are measured on the first steps."""

    document: str
    """Name of the document shown: the first that would be learnt from."""
    stretches: tuple[Stretch, ...]
    training_documents: int
    validation_documents: int
    parameters: Parameters
    frozen_parameters: int
    peak_bytes: int
    """Of the process, or of the GPU's memory."""
    seconds_per_step: float
    steps: int
    rows: RowFigures | None
    """None: documents are not packed."""

    @property
    def seconds(self) -> float:
        """Without validation, samples and checkpoints."""
        return self.seconds_per_step * self.steps


def make_plan(config: TrainConfig) -> Plan:
    """Do a few steps of a recipe and tell what the whole would take. Its folder is not touched.

    Raises:
        WeftError: whatever would stop the run itself at its start.
    """
    training = build(config)
    first = training.order[0]
    sequence = training.examples[first][0]
    reports = list(islice(steps(training), MEASURED_STEPS))
    trained = training.parameters
    everything = {id(parameter): parameter for parameter in (*training.backbone.parameters(), *trained.values())}
    parameters = Parameters.of(training.backbone.decoder, trained)
    return Plan(
        document=sequence.name or f"number {first}",
        stretches=describe(training.backbone, sequence, None if config.adapter is None else config.adapter.to_peft()),
        training_documents=len(training.training),
        validation_documents=len(training.validation),
        parameters=parameters,
        frozen_parameters=sum(parameter.numel() for parameter in everything.values()) - parameters.all,
        peak_bytes=_peak_bytes(training),
        # the first step also warms up
        seconds_per_step=statistics.median(report.seconds for report in reports[-2:]),
        steps=config.schedule.steps,
        rows=None if config.data.packing == "none" else _figures(training),
    )


def _figures(training: Training) -> RowFigures:
    data, length = training.config.data, training.context
    window = min(data.rows.window, len(training.order))
    extents = [training.examples.extent(training.order[place]) for place in range(window)]
    most = data.rows.max_images
    if data.packing == "stream":
        packed = stream(extents, length, max_images=most, cut=data.rows.cut)
    else:
        packed = best_fit(extents, length, max_images=most, long=data.rows.long)
    rows = [row for row in packed.rows if row.pictures or data.rows.without_images == "keep"]
    return RowFigures(
        packing=data.packing,
        length=length,
        documents=window,
        rows=len(rows),
        utilisation=utilisation(rows, length),
        alone=sum(min(extent.length, length) for extent in extents) / (window * length),
        most_pictures=max((row.pictures for row in rows), default=0),
        left=len(packed.left) + sum(len(row.pieces) for row in packed.rows) - sum(len(row.pieces) for row in rows),
    )


def describe(backbone: Backbone, sequence: TokenSequence, adapter: MossConfig | None) -> tuple[Stretch, ...]:
    """What each position of a sequence reads, which branch it takes, and where something is learnt."""
    layout = lay_out([sequence.spans])
    branches = _branches(layout, adapter)
    learnt = [*sequence.is_target[1:].tolist(), False]
    inputs, outputs = layout.inputs, layout.outputs
    facts = [
        (int(inputs.modality[0, t]), int(inputs.image[0, t]), int(outputs.image[0, t]), branches[t], learnt[t])
        for t in range(len(sequence))
    ]
    stretches = []
    for (modality, image, target, branch, is_learnt), group in groupby(range(len(sequence)), key=facts.__getitem__):
        places = list(group)
        start, stop = places[0], places[-1] + 1
        if modality == Modality.IMAGE:
            cols = int(layout.grids[0, image, 1])
            first, last = (int(inputs.row[0, t]) * cols + int(inputs.col[0, t]) for t in (start, stop - 1))
            shown = (
                f"picture {image + 1}, patches {first} to {last}"
                if last > first
                else f"picture {image + 1}, patch {first}"
            )
        else:
            shown = _spell(backbone, sequence.ids[start:stop].tolist())
        predicts = "text" if target < 0 else f"picture {target + 1}"
        stretches.append(Stretch(start, stop, shown, branch, predicts, is_learnt))
    return tuple(stretches)


def _branches(layout: ModalityLayout, adapter: MossConfig | None) -> list[str]:
    """The branch that every position of a single sequence takes."""
    if adapter is None:
        return ["none"] * layout.shape[1]
    if adapter.branches.shared:
        return ["text"] * layout.shape[1]
    routes = route(layout, adapter.rule)
    names = ["none"] * layout.shape[1]
    for name, branch, index in (
        ("text", adapter.branches.text, routes.text),
        ("image", adapter.branches.image, routes.image),
    ):
        for position in index.tolist() if branch is not None else ():
            names[position] = name
    return names


def _spell(backbone: Backbone, ids: list[int]) -> str:
    names = {
        getattr(backbone.tokens, name): f"<{name}>"
        for name in ("begin", "end", "pad", "separator", "begin_image", "end_image")
    }
    runs = groupby(ids, key=lambda token: names.get(token))
    return "".join(name * len(list(group)) if name else backbone.detokenize(list(group)) for name, group in runs)


def _peak_bytes(training: Training) -> int:
    device = training.accelerator.device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
