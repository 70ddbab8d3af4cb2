"""How a model's weights are held, as recipes and command lines say it."""

from typing import TYPE_CHECKING, Literal

from weft.config import Config

if TYPE_CHECKING:
    from weft.backbones.checkpoint import LoadOptions


class LoadConfig(Config):
    """Concerns released checkpoints; the bundled models are small and held in fp32."""

    revision: str | None = None
    """Branch, tag or commit of a hub's repository. None: its main branch."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the frozen weights."""
    device: str | None = None
    """Such as cpu or cuda:0. None: where training puts it; otherwise the CPU."""
    device_map: str | None = None
    """`auto`: the decoder stack is spread over the GPUs that there are."""
    quantize: Literal["8bit", "4bit"] | None = None
    """Linear layers of the decoder stack, on a CUDA device."""

    def options(self, device: str = "cpu") -> "LoadOptions":
        """The same for a loader; `device` is used where none is named.

        What is spread over GPUs or quantised has its other parts on the first GPU.
        """
        import torch

        from weft.backbones.checkpoint import LoadOptions

        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        if (self.device_map or self.quantize) and device == "cpu" and torch.cuda.is_available():
            device = "cuda:0"
        return LoadOptions(dtypes[self.dtype], self.device or device, self.device_map, self.quantize)
