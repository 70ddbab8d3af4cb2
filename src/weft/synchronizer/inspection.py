"""What a saved synchroniser holds, read without its base model."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from weft.errors import AdapterError
from weft.synchronizer.adapter import TENSORS, SynchronizerConfig, read_record


@dataclass(frozen=True)
class SynchronizerInspection:
    base: str
    config: SynchronizerConfig
    eye: int
    """Parameters of what looks at pictures."""
    insertion: int
    """Parameters of what stands in the decoder."""
    gates: tuple[float, ...]
    """Of each branch, in the order of layers; all zero means that it was never trained."""

    def to_json(self) -> dict[str, object]:
        return {
            "base": self.base,
            **self.config.model_dump(mode="json"),
            "parameters": {"eye": self.eye, "branches": self.insertion, "all": self.eye + self.insertion},
            "gates": list(self.gates),
        }


def inspect_synchronizer(folder: Path) -> SynchronizerInspection:
    """Read a folder that `save_synchronizer` wrote.

    Raises:
        AdapterError: it is not one, or its tensors cannot be read.
    """
    config, base = read_record(folder)
    eye = insertion = 0
    gates: dict[int, float] = {}
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)
                if name.startswith("eye."):
                    eye += tensor.numel()
                    continue
                insertion += tensor.numel()
                if name.endswith(".gate"):
                    gates[int(name.split(".")[1])] = tensor.item()
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"the tensors of the synchroniser cannot be read: {error}",
            where=str(folder / TENSORS),
            fix="copy the whole folder again",
        ) from error
    return SynchronizerInspection(base["name"], config, eye, insertion, tuple(gates[i] for i in sorted(gates)))
