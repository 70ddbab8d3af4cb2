"""What of an adapter can become part of the frozen weights, exactly, and what cannot.

    text branch, of any adapter   `merge_text`      W = W0 + s B A, for a model that serves text only
    a linear branch each          `split_weights`   W_text and W_image
    convolution for pictures      `split_weights`   W_image = W0 + s B K[0, 0]; the other T - 1 taps stay beside it
    experts for pictures          text branch only: between the experts and their up-projection stands a GELU

No single weight equals an adapter that depends on the modality, so PEFT's own merging refuses. A convolution is linear,
but not position by position: that is why its other taps stay.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from weft.adapters.config import Branch, MossConfig
from weft.adapters.layer import MossLinear
from weft.adapters.peft import drop_layout_hook
from weft.adapters.two_weights import OtherTaps, TwoWeightLinear
from weft.errors import AdapterError


def merge_text(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Add the text branch to the frozen weights and remove everything else of the adapter, in place.

    For serving text only: every position, those of pictures too, then takes the text branch, and the image branch is
    gone. On text the outputs are those of the adapted model up to fp32 rounding. Other adapters of the model go too.

    Args:
        model: a `PeftModel`, or any model that holds adapted layers.

    Returns:
        The plain base model.

    Raises:
        AdapterError: there is no text branch, or a frozen weight cannot be added to. The model is then as it was.
    """
    layers = adapted_layers(model, adapter)
    if all(layer.moss_branches[adapter].text is None for layer in layers.values()):
        raise AdapterError(
            f"adapter {adapter!r} has no text branch to merge", fix="use split_weights(model), or keep it attached"
        )
    _check_weights(model, layers)
    base = _rebuild(model, adapter, lambda layer: _linear(layer, _merged(layer, adapter, "text")))
    drop_layout_hook(base)
    return base


def split_weights(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Replace each adapted layer by one with a weight per modality (`TwoWeightLinear`), in place.

    Exact up to fp32 rounding, for whole sequences and cached steps. The weights of adapted layers take twice the
    memory; the layout is needed as before. Layers whose text branch serves pictures too become plain ones. Other
    adapters go.

    Returns:
        The base model with its new layers; `routing_of` finds their routing state.

    Raises:
        AdapterError: the image branch has experts, context pictures take no branch, or a frozen weight cannot be added
            to. The model is then as it was.
    """
    layers = adapted_layers(model, adapter)
    rule = cast(MossConfig, cast(Any, model).peft_config[adapter]).rule
    for name, layer in layers.items():
        branches = layer.moss_branches[adapter]
        if branches.own_image is not None and branches.own_image.experts:
            raise AdapterError(
                "experts cannot become a weight: a GELU stands between them and the up-projection",
                where=name,
                fix="merge_text(model) merges the text branch, to serve text only; or keep the adapter attached",
            )
        if not branches.shared and rule.context_images == "none":
            raise AdapterError(
                "with context_images='none' pictures in the context take no branch, which needs a third weight",
                where=name,
                fix="keep the adapter attached",
            )
    _check_weights(model, layers)
    return _rebuild(model, adapter, lambda layer: _split(layer, adapter))


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, MossLinear]:
    """The layers that an adapter of this name changes, by their names in the base model.

    Raises:
        AdapterError: there are none.
    """
    found = {name: layer for name, layer in _base(model).named_modules() if isinstance(layer, MossLinear)}
    layers = {name: layer for name, layer in found.items() if adapter in layer.moss_branches}
    if not layers:
        known = sorted({other for layer in found.values() for other in layer.moss_branches})
        raise AdapterError(
            f"the model has no adapter {adapter!r}",
            fix=f"it has {', '.join(known)}" if known else "attach or load one first",
        )
    return layers


def _base(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_weights(model: nn.Module, layers: dict[str, MossLinear]) -> None:
    """Every frozen weight can be added to, and every update is finite; known before anything is changed."""
    owners: dict[int, list[str]] = {}
    for name, parameter in _base(model).named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        base = layer.base_layer
        if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter:
            raise AdapterError(
                f"{name} is a {type(base).__name__}, whose weight cannot be added to",
                fix="load the base model unquantised, in float32, then the adapter",
            )
        if base.weight.dtype not in (torch.float32, torch.float64):
            raise AdapterError(
                f"{name} is in {str(base.weight.dtype).removeprefix('torch.')}, which would round the update away",
                fix="model.float() first, and back afterwards if you accept the rounding",
            )
        shared = owners[id(base.weight)]
        if len(shared) > 1:
            raise AdapterError(
                f"{name} shares its weight with {shared[1]}, which the adapter does not change",
                fix="untie them, or keep the adapter attached",
            )
        for key, parameter in layer.named_parameters():
            if parameter.is_meta or not bool(parameter.isfinite().all()):
                state = "not loaded" if parameter.is_meta else "not finite"
                raise AdapterError(f"tensor {name}.{key} is {state}", fix="load the whole adapter folder again")


def _rebuild(model: nn.Module, adapter: str, replacement: Callable[[MossLinear], nn.Module]) -> nn.Module:
    base = _base(model)
    for name, module in list(base.named_modules()):
        if isinstance(module, MossLinear):
            changed = adapter in module.moss_branches
            base.set_submodule(name, replacement(module) if changed else module.base_layer)
        elif isinstance(module, ModulesToSaveWrapper):
            trained = dict(module.modules_to_save)
            base.set_submodule(name, trained.get(adapter, module.original_module))
    for leftover in ("peft_config", "_hf_peft_config_loaded"):  # what PEFT and transformers know an adapted model by
        vars(base).pop(leftover, None)
    return base.requires_grad_(False)


def _split(layer: MossLinear, adapter: str) -> nn.Module:
    branches = layer.moss_branches[adapter]
    text = _merged(layer, adapter, "text")
    if branches.shared:
        return _linear(layer, text)
    others, image = None, branches.own_image
    if image is not None and not image.is_linear:
        assert image.rank != "full"
        taps = _parameter(layer, "image_A", adapter).to(text.dtype)[image.rank :]
        others = OtherTaps(image.taps, taps, _parameter(layer, "image_B", adapter).to(text.dtype) * image.scale)
    weight = _merged(layer, adapter, "image")
    return TwoWeightLinear(_linear(layer, text), weight, others, layer.routing, adapter)


@torch.no_grad()
def _merged(layer: MossLinear, adapter: str, modality: str) -> Tensor:
    """(E, C) frozen weight and what a branch adds to each position by itself; its own tap comes first."""
    weight = cast(Tensor, layer.base_layer.weight)
    branches = layer.moss_branches[adapter]
    branch: Branch | None = branches.text if modality == "text" else branches.own_image
    if branch is None:
        return weight.clone()
    update = _parameter(layer, f"{modality}_B", adapter).to(weight.dtype)
    if branch.rank != "full":
        update = update @ _parameter(layer, f"{modality}_A", adapter)[: branch.rank].to(weight.dtype)
    return weight + update * branch.scale


def _parameter(layer: MossLinear, part: str, adapter: str) -> Tensor:
    return cast(Tensor, getattr(layer, f"moss_{part}")[adapter].detach())


def _linear(layer: MossLinear, weight: Tensor) -> nn.Linear:
    """The frozen layer with another weight; the old one is freed with the model that held it."""
    base = layer.base_layer
    assert isinstance(base, nn.Linear)
    base.weight = nn.Parameter(weight, requires_grad=False)
    return base
