"""The modules that training concerns: which learn, which are run again for memory, and that every loss reaches all."""

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from weft.adapters import recompute_layers
from weft.backbones.base import Backbone
from weft.backbones.trained import Parts
from weft.synchronizer.adapter import AttachedSynchronizer
from weft.training.objective import Objective


def learning_modules(backbone: Backbone, parts: Parts) -> Iterator[nn.Module]:
    """Those whose dropout is on while learning: the decoder stack, the synchroniser, and where parts are trained."""
    yield backbone.decoder
    if isinstance(backbone.synchronizer, AttachedSynchronizer):
        yield from (backbone.synchronizer.eye, backbone.synchronizer.insertion)
    yield from _children(backbone, parts).values()


def recompute(backbone: Backbone, parts: Parts) -> None:
    """Compute the activations of the decoder stack's layers, and of a U-Net that is trained, again in backward."""
    if isinstance(backbone.decoder, PeftModel):
        recompute_layers(backbone)
    else:
        with warnings.catch_warnings():
            # transformers 5.23 gives the method a new name, earlier ones have the old one
            warnings.simplefilter("ignore", FutureWarning)
            stack = cast(Any, backbone.decoder)
            stack.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for child in _children(backbone, parts).values():
        if hasattr(child, "enable_gradient_checkpointing"):  # of diffusers' models
            cast(Any, child).enable_gradient_checkpointing()


def reach(objective: Objective, parts: Parts) -> None:
    """Let every loss reach all that is trained beside the adapter, if only with zeros: a batch without pictures leaves
    eye and U-Net out. The objective holds these parameters too, so that what wraps it for several processes sees them.
    """
    parameters = [*parts.parameters.values()]
    if isinstance(objective.backbone.synchronizer, AttachedSynchronizer):
        parameters += [parameter for _, parameter in objective.backbone.synchronizer.named_parameters()]
    if parameters:
        objective.beside = nn.ParameterList(parameters)
        objective.register_forward_hook(lambda _, __, losses: losses + _Nothing.apply(losses, *parameters))


class _Nothing(torch.autograd.Function):
    """Zero, whose gradients are zeros that take no memory until they are added."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return losses.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(tensor.new_zeros(()).expand_as(tensor) for tensor in ctx.saved_tensors)


def _children(backbone: Backbone, parts: Parts) -> dict[str, nn.Module]:
    """The backbone's modules in which parts are trained."""
    names = {name.split(".")[0] for name in parts.parameters}
    return {name: child for name, child in backbone.named_children() if name in names}
