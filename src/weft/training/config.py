"""What a training recipe says. Two runs with the same recipe, data and machine write the same bytes."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from weft.adapters import AdapterConfig
from weft.backbones.loading import LoadConfig
from weft.config import Config
from weft.data.rows import Packing, RowsConfig
from weft.synchronizer import SynchronizerConfig
from weft.training.objective import LossConfig

_OFF = BeforeValidator(lambda value: None if value == "none" else value)
"""`none` in a recipe leaves a section out."""
Share = Annotated[float, Field(ge=0, lt=1)]


class SetConfig(Config):
    """One of several datasets."""

    path: Path
    """The folder that `weft data build` made."""
    weight: PositiveFloat = 1.0
    """How often its documents are drawn, in relation to those of the others."""


class DataConfig(Config):
    """The documents to learn from. A list in a recipe is one of datasets."""

    path: Path | None = None
    """The folder that `weft data build` made; or, instead:"""
    sets: tuple[SetConfig, ...] = ()
    """Several of them, mixed."""
    validation: NonNegativeFloat = 0.0
    """Documents kept from training to measure its loss on: below 1 a share of all, from 1 a number."""
    context: PositiveInt | None = None
    """Positions of the longest sequence, or of every row; longer documents are cut in parts. None: what the model has.
    """
    packing: Packing = "none"
    """Several documents in a row: `best_fit`, whole ones that fit; `stream`, one after the other, cut where a row is
    full."""
    rows: RowsConfig = RowsConfig()
    """How they are packed."""
    cache: Path | None = None
    """A folder for documents as the model reads them, to encode each once for all runs."""
    workers: NonNegativeInt = 0
    """Threads that read and encode ahead."""
    reshard: bool = False
    """A run that is continued may have another number of processes than before."""

    @model_validator(mode="before")
    @classmethod
    def _is_list_of_sets(cls, value: Any) -> Any:
        return {"sets": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _has_documents(self) -> Self:
        if (self.path is None) == (not self.sets):
            raise ValueError("data needs path, or sets: one of the two")
        return self

    @property
    def weighted(self) -> tuple[SetConfig, ...]:
        """All datasets."""
        return self.sets if self.path is None else (SetConfig(path=self.path),)


class GroupConfig(Config):
    """Parameters that are trained with figures of their own."""

    match: str
    """A regular expression, searched in the names of trained parameters: those of the adapter as it is saved, those of
    an attached synchroniser after `synchronizer.`, the model's own after `parts.`."""
    learning_rate: PositiveFloat | None = None
    """At its peak. None: as all."""
    weight_decay: NonNegativeFloat | None = None
    """None: as all."""


class OptimConfig(Config):
    """AdamW."""

    learning_rate: PositiveFloat = 8e-3
    """At its peak."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """Of full weights towards zero; adapters are best without."""
    decays: Literal["all", "weights"] = "all"
    """What weight decay acts on: `weights` leaves out biases and the parameters of layer norms."""
    groups: tuple[GroupConfig, ...] = ()
    """The first that matches a parameter counts."""
    batch: PositiveInt = 8
    """Documents of one step, or rows where they are packed, over all processes."""
    micro_batch: PositiveInt | None = None
    """Sequences or rows of one forward; fewer take less memory and give the same step. None: all of a step at once."""
    clip: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""


class ScheduleConfig(Config):
    """Linear warm-up, then half a cosine down to `final`."""

    steps: PositiveInt = 400
    warmup: NonNegativeInt = 20
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of the learning rate that it falls towards."""

    @model_validator(mode="after")
    def _warms_up_before_the_end(self) -> Self:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} leaves nothing of steps = {self.steps}")
        return self


class SamplesConfig(Config):
    """Answers written while training, to look at."""

    every: PositiveInt | None = None
    """Steps between them. None: none."""
    prompts: tuple[str, ...] = ()
    """Texts to answer."""
    documents: NonNegativeInt = 4
    """And so many documents, as far as the first answer: of those kept for validation, if any; long ones are passed
    over."""
    max_images: NonNegativeInt = 8
    max_text_tokens: NonNegativeInt = 512
    temperature: NonNegativeFloat = 0.0
    """Of text and pictures; 0 always takes the likeliest."""
    guidance: NonNegativeFloat | None = None
    """Classifier-free guidance of pictures; 1 is off. None: as much as the model's makers use."""


class TrainConfig(Config):
    """One training run."""

    data: DataConfig
    model: str = "tiny"
    """A name, the folder of a model, or owner/name of a repository on the hub."""
    load: LoadConfig = LoadConfig()
    adapter: Annotated[AdapterConfig | None, _OFF] = AdapterConfig()
    """`none`: the model gets none."""
    synchronizer: Annotated[SynchronizerConfig | None, _OFF] = None
    """Lets the model look at earlier pictures again; for models that have none of their own."""
    parts: tuple[str, ...] = ()
    """Regular expressions, searched in the names of the model's own parameters: these are trained too, in fp32."""
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    sampling: SamplesConfig = SamplesConfig()
    out: Path = Path("runs/train")
    """The run's folder. The same command again continues what it finds there."""
    seed: NonNegativeInt = 0
    threads: PositiveInt | None = None
    """Threads of the arithmetic on a CPU. None: as the process has them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products; what is trained and the optimizer stay in fp32, the frozen weights are as `load.dtype` says."""
    checkpointing: bool = False
    """Activations of a decoder layer are computed again in the backward pass: a third more time, a fraction of the
    memory."""
    save_every: PositiveInt = 50
    """Steps between checkpoints, of which the last two are kept."""
    validate_every: PositiveInt = 50
    """Steps between measurements on the validation documents, if there are any."""
    verify: bool = True
    """In the end, load what was trained in a fresh process and compare its logits with those of the model just trained;
    the run has an adapter only if they are equal, and not those of the base."""
    resume: Annotated[Literal["auto", "never"] | Path, Field(union_mode="left_to_right")] = "auto"
    """`auto`: from the newest whole checkpoint in `out`, if any. `never`: a new run in a new folder. Or a checkpoint of
    this run to go back to; what came after it is removed."""

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if self.adapter is None and self.synchronizer is None and not self.parts:
            raise ValueError("nothing is trained: adapter is none, and there is no synchronizer and no parts")
        if self.adapter is not None and self.adapter.isolate_gradients and (self.synchronizer or self.parts):
            raise ValueError("adapter.isolate_gradients trains the adapter alone: leave out synchronizer and parts")
        return self
