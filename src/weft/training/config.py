"""What a training recipe says. Two runs with the same recipe, data and machine write the same bytes."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from weft.adapters import AdapterConfig
from weft.backbones.loading import LoadConfig
from weft.config import Config
from weft.training.objective import LossConfig


class DataConfig(Config):
    """The documents to learn from."""

    path: Path
    """The folder that `weft data build` made."""
    validation: NonNegativeFloat = 0.0
    """Documents kept from training to measure its loss on: below 1 a share of all, from 1 a number."""
    context: PositiveInt | None = None
    """Positions of the longest sequence; longer documents are cut in parts. None: what the model has."""


class OptimConfig(Config):
    """AdamW without weight decay."""

    learning_rate: PositiveFloat = 8e-3
    batch: PositiveInt = 8
    """Documents of one step, over all processes."""
    micro_batch: PositiveInt | None = None
    """Sequences of one forward; fewer take less memory and give the same step. None: all of a step at once."""
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
    adapter: AdapterConfig = AdapterConfig()
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
    """Of the products; adapters and optimizer stay in fp32, the frozen weights are as `load.dtype` says."""
    checkpointing: bool = False
    """Activations of a decoder layer are computed again in the backward pass: a third more time, a fraction of the
    memory."""
    save_every: PositiveInt = 50
    """Steps between checkpoints, of which the last two are kept."""
    validate_every: PositiveInt = 50
    """Steps between measurements on the validation documents, if there are any."""
    verify: bool = True
    """In the end, load the adapter in a fresh process and compare its logits with those of the model just trained; the
    run has an adapter only if they are equal, and not those of the base."""
    resume: Annotated[Literal["auto", "never"] | Path, Field(union_mode="left_to_right")] = "auto"
    """`auto`: from the newest whole checkpoint in `out`, if any. `never`: a new run in a new folder. Or a checkpoint of
    this run to go back to; what came after it is removed."""
