"""The models of one server: a base, and adapters on the same weights, each under a name of its own."""

import copy
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from weft.backbones import load_backbone
from weft.backbones.base import Backbone
from weft.backbones.loading import LoadConfig
from weft.backbones.trained import holds_parts, inspect_parts, load_trained
from weft.errors import UsageError


def load_models(
    name: str, adapters: Mapping[str, Path], load: LoadConfig = LoadConfig(), *, device: str = "cpu"
) -> dict[str, Backbone]:
    """Name -> model, the base first. The base's weights are in memory once, but for those that an adapter replaces.

    Raises:
        UsageError: an adapter has the base's name.
        AdapterError: a folder holds no adapter for this base.
    """
    base = load_backbone(name, load, device=device)
    models = {base.name: base}
    for own, folder in adapters.items():
        if own in models:
            raise UsageError(f"two models are called {own!r}", where=str(folder), fix="name it: --adapter NAME=FOLDER")
        model = sharing(base, but=inspect_parts(folder).names if holds_parts(folder) else ())
        load_trained(model, folder)
        models[own] = model
    return models


def sharing(base: Backbone, *, but: Collection[str] = ()) -> Backbone:
    """A second model over the same weights, to which something else may be attached.

    Args:
        but: names of parameters of which it gets copies: what is written into them must not reach the base.
    """
    model: Any = base
    shared = [parameter for name, parameter in model.named_parameters() if name not in but]
    kept = (*shared, *model.buffers(), model.tokenizer)
    return copy.deepcopy(base, {id(each): each for each in kept})


def use_threads(number: int | None) -> None:
    """Threads of each operation on a CPU. All cores are too many: callers are read and answered too, and the one thread
    of an operation that this holds up holds up the whole step.

    Args:
        number: None: OMP_NUM_THREADS, or half of the cores.
    """
    import torch

    if number is None and "OMP_NUM_THREADS" not in os.environ:
        number = max(1, torch.get_num_threads() // 2)
    if number is not None:
        torch.set_num_threads(number)
