"""PEFT inserts, saves and loads the adapters; this file is where the two meet.

PEFT's list of adapter types is closed, so the type is added to its enumeration first (docs/decisions/).
"""

from typing import Any, cast

import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import Tensor, nn

from weft.adapters.config import PEFT_TYPE, MossConfig
from weft.adapters.layer import MossLinear
from weft.adapters.routing import RoutingState
from weft.errors import AdapterError


SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sister layers that transformers calls with one and the same tensor; whether it is the same is checked at each call."""


class MossModel(BaseTuner):
    """The tuner: replaces linear layers by `MossLinear` and lets them share one routing state."""

    prefix = "moss_"
    tuner_layer_cls = MossLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - the shape PEFT wants

    routing: RoutingState

    def _pre_injection_hook(self, model: nn.Module, config: MossConfig, adapter_name: str) -> None:
        self.routing = _find_routing(model) or RoutingState()

    def _create_and_replace(
        self,
        config: MossConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        branches = config.branches_of(current_key)
        if not branches.shared:
            self.routing.register(adapter_name, config.rule, branches.own_image.windows if branches.own_image else ())
        if isinstance(target, MossLinear):
            target.update_layer(adapter_name, branches, inference_mode=config.inference_mode)
            return
        features = (getattr(target, "in_features", None), getattr(target, "out_features", None))
        if not all(isinstance(size, int) for size in features):
            raise AdapterError(
                f"{current_key} is a {type(target).__name__}; only linear layers can be adapted",
                fix="name linear layers only (adapter.targets in a recipe, target_modules in PEFT)",
            )
        layer = MossLinear(target, self.routing)
        layer.update_layer(adapter_name, branches, inference_mode=config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _post_injection_hook(self, model: nn.Module, config: MossConfig, adapter_name: str) -> None:
        for module in model.modules():
            for names in SHARED_INPUT:
                sisters = tuple(s for s in (getattr(module, n, None) for n in names) if isinstance(s, MossLinear))
                for sister in sisters:
                    sister.siblings = sisters
        if not any(isinstance(hook, _TakesLayout) for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(_TakesLayout(self.routing), with_kwargs=True)

    def unload(self) -> nn.Module:
        for key in [k for k, hook in self.model._forward_pre_hooks.items() if isinstance(hook, _TakesLayout)]:
            del self.model._forward_pre_hooks[key]
            self.model._forward_pre_hooks_with_kwargs.pop(key, None)
        return cast(nn.Module, super().unload())

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MossConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT itself would leave a missing tensor at its random start and say nothing
        own = {
            key: tensor for key, tensor in model.state_dict().items() if f".{adapter_name}" in key and "moss_" in key
        }
        wanted = {cls._remove_adapter_name_from_key(key, adapter_name): tensor.shape for key, tensor in own.items()}
        given = {_with_prefix(key, wanted): tensor.shape for key, tensor in state_dict.items() if ".moss_" in key}
        for title, keys in (("lacks", wanted.keys() - given.keys()), ("holds unknown", given.keys() - wanted.keys())):
            if keys:
                raise AdapterError(
                    f"the adapter folder {title} tensors: {', '.join(sorted(keys))}",
                    fix="use the whole folder that save_pretrained wrote, on the model it was made for",
                )
        for key, shape in given.items():
            if shape != wanted[key]:
                raise AdapterError(
                    f"tensor {key} has shape {tuple(shape)}, this model wants {tuple(wanted[key])}",
                    fix="load the adapter on the base model it was trained on",
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


class _TakesLayout:
    """Forward pre-hook of the adapted model: takes the argument `layout`, which the model itself does not know.

    An object and not a closure, so that a copy of the model gets a hook with the copy's routing state.
    """

    def __init__(self, routing: RoutingState) -> None:
        self.routing = routing

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        layout = kwargs.pop("layout", None)
        if _is_active(model):
            self.routing.begin(layout)
        return args, kwargs


def _is_active(model: nn.Module) -> bool:
    layer = next((module for module in model.modules() if isinstance(module, MossLinear)), None)
    return layer is not None and not layer.disable_adapters


def _with_prefix(key: str, wanted: dict[str, torch.Size]) -> str:
    """A saved key as the model spells it: with or without PEFT's own prefix."""
    bare = key.removeprefix("base_model.model.")
    return bare if key not in wanted and bare in wanted else key


def _find_routing(model: nn.Module) -> RoutingState | None:
    return next((module.routing for module in model.modules() if isinstance(module, MossLinear)), None)


def register() -> None:
    """Make PEFT know the adapter type; harmless when called again."""
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=MossConfig, model_cls=MossModel, prefix="moss_")
