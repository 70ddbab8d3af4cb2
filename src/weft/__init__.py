"""Teach a vision-language generalist to write illustrated documents. The public names; each loads on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.adapters import AdapterConfig, attach
    from weft.backbones import load_model
    from weft.data import open_dataset
    from weft.document import Document, Image, Text, Turn, assistant, user
    from weft.errors import WeftError
    from weft.generation import SamplingConfig, generate
    from weft.layout import layout_of_tokens
    from weft.synchronizer import SynchronizerConfig, attach_synchronizer
    from weft.training import TrainConfig, train

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "Document",
    "Image",
    "SamplingConfig",
    "SynchronizerConfig",
    "Text",
    "TrainConfig",
    "Turn",
    "WeftError",
    "assistant",
    "attach",
    "attach_synchronizer",
    "generate",
    "layout_of_tokens",
    "load_model",
    "open_dataset",
    "train",
    "user",
]

_NAMES = {
    "weft.adapters": ("AdapterConfig", "attach"),
    "weft.backbones": ("load_model",),
    "weft.data": ("open_dataset",),
    "weft.document": ("Document", "Image", "Text", "Turn", "assistant", "user"),
    "weft.errors": ("WeftError",),
    "weft.generation": ("SamplingConfig", "generate"),
    "weft.layout": ("layout_of_tokens",),
    "weft.synchronizer": ("SynchronizerConfig", "attach_synchronizer"),
    "weft.training": ("TrainConfig", "train"),
}


def __getattr__(name: str) -> Any:
    for place, names in _NAMES.items():
        if name in names:
            module = import_module(place)
            # all at once: one import serves all names of a package
            globals().update({public: getattr(module, public) for public in names})
            return globals()[name]
    raise AttributeError(f"module 'weft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
