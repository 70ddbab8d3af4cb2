"""How a model's weights are held, as flags that several verbs share."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from weft.backbones.loading import LoadConfig


@Parameter(name="*")
@dataclass(frozen=True)
class Loading:
    """How the model's weights are held; for released checkpoints."""

    revision: str | None = None
    """Branch, tag or commit of a repository on the hub."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights."""
    device: str | None = None
    """Such as cpu or cuda:0; by default the CPU."""
    device_map: str | None = None
    """`auto`: spread over the GPUs that there are."""
    quantize: Literal["8bit", "4bit"] | None = None
    """Weights of 8 or 4 bits, on a CUDA device."""

    def config(self) -> "LoadConfig":
        from weft.backbones.loading import LoadConfig
        from weft.config import load_config

        return load_config(LoadConfig, overrides=asdict(self))
