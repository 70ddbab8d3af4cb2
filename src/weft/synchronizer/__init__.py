"""The feature synchroniser: what a language model or a picture decoder reads again from the pictures before it.

For a model that was made without one there is `attach_synchronizer`.
"""

from weft.synchronizer.adapter import (
    SynchronizerConfig,
    attach_synchronizer,
    detach_synchronizer,
    load_synchronizer,
    save_synchronizer,
    synchronizer_parameters,
)

__all__ = [
    "SynchronizerConfig", "attach_synchronizer", "detach_synchronizer", "load_synchronizer", "save_synchronizer",
    "synchronizer_parameters",
]  # fmt: skip
