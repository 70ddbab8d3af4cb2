"""PEFT inserts, saves and loads the adapters; this file is where the two meet.

PEFT's list of adapter types is closed, so the type is added to its enumeration first (docs/decisions/).
"""

import contextlib
import copy
import functools
import re
from collections.abc import Iterator
from typing import Any, NoReturn, cast

from peft import PeftType
from peft.functional import delete_adapter
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import NoMatchingPeftModuleError, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from weft.adapters.config import PEFT_TYPE, MossConfig
from weft.adapters.layer import MossLinear
from weft.adapters.routing import RoutingState
from weft.adapters.two_weights import TwoWeightLinear
from weft.errors import AdapterError, RoutingError
from weft.layout import ModalityLayout

PEFT_PREFIX = "base_model.model."
"""What saved names begin with; a model that transformers itself put the adapter in has none."""

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sister layers that transformers calls with one and the same tensor; that it is the same is checked at each call."""


class MossModel(BaseTuner):
    """The tuner: replaces linear layers by `MossLinear` and lets them share one routing state."""

    prefix = "moss_"
    tuner_layer_cls = MossLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - the shape PEFT wants

    routing: RoutingState

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Every way in, PEFT's and transformers', for a first adapter and a further one, comes through here."""
        self.routing = find_routing(model) or RoutingState()
        config = self.peft_config[adapter_name]
        try:
            if config.target_modules is None:
                raise NoMatchingPeftModuleError
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            _check_modules_to_save(model, config, adapter_name)
            _check_patterns(model, config, adapter_name)
            _check_layers(model, config, adapter_name)
        except Exception as error:
            del self.peft_config[adapter_name]
            withdraw(model, adapter_name)
            if isinstance(error, NoMatchingPeftModuleError):
                raise _nothing_to_adapt(model, config) from error
            raise
        _introduce_sisters(model)
        if not any(isinstance(hook, _TakesLayout) for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(_TakesLayout(self.routing), with_kwargs=True)

    @staticmethod
    def _check_target_module_exists(config: MossConfig, key: str) -> Any:
        # PEFT's own looks at the layers only where a target is the end of a name, not for all-linear or an expression
        everywhere = copy.copy(config)
        everywhere.layers_to_transform = None
        found = BaseTuner._check_target_module_exists(everywhere, key)
        layers = _layers(config)
        return found if not found or not layers or _layer_of(config, key) in layers else False

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
        _check_target(target, parent, current_key)
        layer = MossLinear(target, self.routing)
        layer.update_layer(adapter_name, branches, inference_mode=config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's wants a weight of the child, to place the adapter on its device; the layer itself has done that
        setattr(parent, child_name, new_module)

    def unload(self) -> nn.Module:
        drop_layout_hook(self.model)
        return cast(nn.Module, super().unload())

    def _check_merge_allowed(self) -> None:
        # asked before anything is changed; PEFT itself would meet the layers' refusal half-way
        for layer in self.model.modules():
            if isinstance(layer, MossLinear):
                layer.merge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AdapterError(
            "adapters that route by modality cannot be averaged into a new one",
            fix="call set_adapter on a list of names: the updates of several active adapters add up",
        )

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT takes these arguments out of every call and, for a tuner that does not ask, forgets them
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise AdapterError(
                    f"{name} is not for adapters that route by modality, which treat all rows of a batch alike",
                    fix="leave it out; call set_adapter(name) and run the rows of each adapter by themselves",
                )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MossConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT itself would leave a missing tensor at its random start and say nothing
        given = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state = model.state_dict()
        given = {bare if (bare := key.removeprefix(PEFT_PREFIX)) in state else key: t for key, t in given.items()}
        wanted = {
            f"{name}.{part}.{adapter_name}"
            for name, layer in model.named_modules()
            if isinstance(layer, MossLinear)
            for part in layer.adapter_layer_names
            if adapter_name in getattr(layer, part)
        }
        saved_name = functools.partial(cls._remove_adapter_name_from_key, adapter_name=adapter_name)
        missing, unknown = sorted(wanted - given.keys()), sorted(given.keys() - state.keys())
        if missing or unknown:
            named = (("lacks", [saved_name(key) for key in missing]), ("has unknown", unknown))
            what = [f"{verb} {_some(keys)}" for verb, keys in named if keys]
            raise AdapterError(
                f"the saved adapter {' and '.join(what)}",
                fix="use the whole folder that save_pretrained wrote, on the base model it was trained on",
            )
        for key, tensor in given.items():
            if tensor.shape != state[key].shape:
                wants = tuple(state[key].shape)
                raise AdapterError(
                    f"saved tensor {saved_name(key)} has shape {tuple(tensor.shape)}, this model wants {wants}",
                    fix="load the adapter on the base model it was trained on, with the configuration saved beside it",
                )
        return given


def _check_target(target: nn.Module, parent: nn.Module, name: str) -> None:
    kind, fix = type(target).__name__, "name other layers (target_modules in PEFT, adapter.targets in a recipe)"
    if isinstance(target, BaseTunerLayer):
        raise AdapterError(
            f"{name} already has an adapter of another type, {type(target).__module__}.{kind}",
            fix="unload() that adapter first, or start from a fresh base model",
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise AdapterError(f"{name} is read, but never called, by the torch MultiheadAttention it belongs to", fix=fix)
    if not all(isinstance(getattr(target, side, None), int) for side in ("in_features", "out_features")):
        raise AdapterError(f"{name} is of type {kind}, and only linear layers can be adapted", fix=fix)


def _check_modules_to_save(model: nn.Module, config: MossConfig, adapter_name: str) -> None:
    # PEFT passes over names that are not there
    kept = [
        n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper) and adapter_name in m._adapters
    ]
    for name in config.modules_to_save or ():
        if not any(found.endswith(name) for found in kept):
            raise AdapterError(
                f"modules_to_save {name!r} names no module of {type(model).__name__}",
                fix="name modules as in model.named_modules(), such as embed_tokens, lm_head",
            )


def _check_patterns(model: nn.Module, config: MossConfig, adapter_name: str) -> None:
    layers = (n for n, m in model.named_modules() if isinstance(m, MossLinear) and adapter_name in m.moss_branches)
    idle = set(config.patterns)
    for layer in layers:
        idle -= {pattern for pattern in idle if re.search(pattern, layer)}
    if idle:
        raise AdapterError(
            f"patterns {', '.join(map(repr, sorted(idle)))} match none of the adapted layers",
            fix="a pattern is searched in full names, such as model.layers.0.self_attn.q_proj",
        )


def _check_layers(model: nn.Module, config: MossConfig, adapter_name: str) -> None:
    layers = (n for n, m in model.named_modules() if isinstance(m, MossLinear) and adapter_name in m.moss_branches)
    missing = _layers(config) - {_layer_of(config, name) for name in layers}
    if missing:
        raise AdapterError(
            f"layers {', '.join(map(str, sorted(missing)))} have nothing to adapt",
            fix="number the layers from 0 (layers_to_transform in PEFT, adapter.layers in a recipe)",
        )


def _layers(config: MossConfig) -> set[int]:
    """The layers to adapt; none: all."""
    chosen = config.layers_to_transform
    return {chosen} if isinstance(chosen, int) else set(chosen or ())


def _layer_of(config: MossConfig, name: str) -> int | None:
    """The first number in a module's name, or the one after one of `layers_pattern`."""
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    for pattern in patterns or [r"[^.]+"]:
        found = re.search(rf"(?:^|\.)(?:{pattern})\.(\d+)\.", name)
        if found:
            return int(found[1])
    return None


def _nothing_to_adapt(model: nn.Module, config: MossConfig) -> AdapterError:
    chosen = {
        name: getattr(config, name)
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    }
    said = [f"{name} {sorted(value) if isinstance(value, set) else value!r}" for name, value in chosen.items() if value]
    leaves = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    return AdapterError(
        f"no linear layer of {type(model).__name__} is left by {', '.join(said) or 'target_modules None'}",
        fix=f"use all-linear, or some of its linear layers: {', '.join(leaves)}",
    )


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take out an adapter that could not be completed; a model that is left with none is a plain one again."""
    delete_adapter(model, adapter_name, MossModel.prefix, MossLinear)
    modules = list(model.named_modules())
    if any(isinstance(module, MossLinear) and module.moss_branches for _, module in modules):
        return
    for name, module in modules:
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, MossLinear):
            setattr(model.get_submodule(parent), leaf, module.base_layer)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            setattr(model.get_submodule(parent), leaf, module.original_module)
    drop_layout_hook(model)
    model.__dict__.pop("peft_config", None)


def _introduce_sisters(model: nn.Module) -> None:
    for module in model.modules():
        for names in SHARED_INPUT:
            sisters = tuple(s for s in (getattr(module, n, None) for n in names) if isinstance(s, MossLinear))
            for sister in sisters:
                sister.siblings = sisters


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


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
        if layout is not None and not isinstance(layout, ModalityLayout):
            raise RoutingError(
                f"layout is a {type(layout).__name__}, not a ModalityLayout",
                fix="make it with weft.layout.layout_of_tokens or weft.layout.lay_out",
            )
        self.routing.begin(layout, _active(model))
        return args, kwargs


def drop_layout_hook(model: nn.Module) -> None:
    """Let a model that needs no layout any more refuse one, as it did before."""
    for key in [k for k, hook in model._forward_pre_hooks.items() if isinstance(hook, _TakesLayout)]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)


def _active(model: nn.Module) -> list[str]:
    """The adapters that a forward uses."""
    layer = next((module for module in model.modules() if isinstance(module, MossLinear | TwoWeightLinear)), None)
    if layer is None or layer.disable_adapters:
        return []
    return layer.active_adapters if isinstance(layer, MossLinear) else [cast(str, layer.adapter)]


def find_routing(model: nn.Module) -> RoutingState | None:
    routed = (module for module in model.modules() if isinstance(module, MossLinear | TwoWeightLinear))
    return next((module.routing for module in routed), None)


def register() -> None:
    """Make PEFT know the adapter type; harmless when called again."""
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=MossConfig, model_cls=MossModel, prefix="moss_")
