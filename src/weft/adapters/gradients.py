"""Backward passes that keep the modalities apart: each loss trains the branches of its own modality only.

A picture's loss reaches the text branches of earlier positions through attention, and the reverse. Xu et al. 2024
(arXiv:2407.03604) say of each mode that it trains its own adapter; whether more is meant than the routing, this tests.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from weft.adapters.layer import MossLinear
from weft.errors import AdapterError


def backward_by_modality(
    model: nn.Module,
    text_loss: Tensor | None,
    image_loss: Tensor | None,
    backward: Callable[..., None] = torch.autograd.backward,
) -> None:
    """Add to every trainable parameter's gradient that of its own loss.

        text branches     d text_loss
        image branches    d image_loss
        anything else     d (text_loss + image_loss), such as modules_to_save: both modalities read them

    What is kept is exact; only the gradients across are cut. The losses may share one graph, of which each kind of
    parameter takes a pass of its own, so that none is visited twice, which wrappers for several processes do not allow.
    Parameters that no loss reaches get zeros.

    Args:
        model: has the adapter; parameters of other modules are not looked for.
        text_loss: scalar; None: there is none. With several processes give a zero of the graph instead, so that all
            processes meet.
        image_loss: likewise.
        backward: called with a loss, `inputs` and `retain_graph`, such as `accelerator.backward`.

    Raises:
        AdapterError: a branch serves both modalities.
    """
    text, image, others = _by_modality(model)
    both = [loss for loss in (text_loss, image_loss) if loss is not None]
    passes = [
        (loss, parameters)
        for loss, parameters in ((text_loss, text), (image_loss, image), (sum(both) if both else None, others))
        if loss is not None and parameters
    ]
    for number, (loss, parameters) in enumerate(passes, 1):
        backward(loss, inputs=parameters, retain_graph=number < len(passes))
    for parameter in (*text, *image, *others):
        if parameter.grad is None:  # zero and not missing, as for a batch without pictures
            parameter.grad = torch.zeros_like(parameter)


def _by_modality(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters of text branches, of image branches, and all others."""
    for name, module in model.named_modules():
        if isinstance(module, MossLinear):
            active = (module.moss_branches.get(adapter) for adapter in module.active_adapters)
            if any(branches is not None and branches.shared for branches in active):
                raise AdapterError(
                    f"the branch of {name} serves text and pictures, so their gradients cannot be kept apart",
                    fix="give pictures a branch of their own (adapter.kind moe_lora or full_two), or call backward",
                )
    text: list[nn.Parameter] = []
    image: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (text if ".moss_text_" in name else image if ".moss_image_" in name else others).append(parameter)
    return text, image, others
