"""Which trained parameter is moved how fast, and which is decayed."""

import re
from typing import Any, cast

from torch import nn

from weft.backbones.base import Backbone
from weft.errors import ConfigError
from weft.training.config import GroupConfig, OptimConfig


def make_groups(backbone: Backbone, parameters: dict[str, nn.Parameter], optim: OptimConfig) -> list[dict[str, Any]]:
    """The optimizer's groups: `params` in the order given, `lr`, the same as `peak`, `weight_decay`.

    Raises:
        ConfigError: a group of the recipe matches no parameter.
    """
    for group in optim.groups:
        if not any(re.search(group.match, name) for name in parameters):
            near = ", ".join(list(parameters)[:3])
            raise ConfigError(
                f"optim.groups: {group.match!r} is found in the name of no trained parameter",
                fix=f"it is searched in names such as {near}",
            )
    spared = _of_layer_norms(backbone) if optim.decays == "weights" else set()
    default = GroupConfig(match="")
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        own = next((group for group in optim.groups if re.search(group.match, name)), default)
        rate = optim.learning_rate if own.learning_rate is None else own.learning_rate
        decay = optim.weight_decay if own.weight_decay is None else own.weight_decay
        if optim.decays == "weights" and (name.endswith("bias") or id(parameter) in spared):
            decay = 0.0
        found.setdefault((rate, decay), []).append(parameter)
    return [{"params": own, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), own in found.items()]


def _of_layer_norms(backbone: Backbone) -> set[int]:
    """Which parameters are; root-mean-square norms are decayed, as the released model's were."""
    synchronizer = backbone.synchronizer
    roots = [cast(nn.Module, backbone), *((synchronizer.eye, synchronizer.insertion) if synchronizer else ())]
    norms = (module for root in roots for module in root.modules() if isinstance(module, nn.LayerNorm))
    return {id(parameter) for norm in norms for parameter in norm.parameters()}
