"""Each loss trains the branches of its own modality, exactly, and nothing is missing."""

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from tests.adapters.llama import IMAGE_BRANCHES, LINEAR, MIXED, TEXT, adapted, base, ids_for
from weft.adapters import Branch, MossConfig
from weft.adapters.gradients import backward_by_modality
from weft.errors import AdapterError
from weft.layout import Modality, ModalityLayout


def losses_of(model: nn.Module, layout: ModalityLayout) -> tuple[Tensor, Tensor]:
    """Of text and of pictures, from one forward."""
    ids = ids_for(layout)
    logits = model(input_ids=ids, layout=layout).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    modality = layout.outputs.modality[:, :-1].flatten()
    return each[modality == Modality.TEXT].sum(), each[modality == Modality.IMAGE].sum()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in trained(model).items()}


def saving_norms(dtype: torch.dtype = torch.float64) -> PeftModel:
    config = MossConfig(text=LINEAR, image=Branch(4, 8.0, kernel=2), modules_to_save=["norm"])
    model = get_peft_model(base(2, dtype), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trained(model).items():
        if ".moss_" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.train()


def wanted(model: nn.Module, layout: ModalityLayout) -> dict[str, Tensor]:
    """By autograd, each loss from a forward of its own."""
    parameters = trained(model)
    of = []
    for number in (0, 1):
        loss = losses_of(model, layout)[number]
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        of.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found)})  # noqa: B905
    text, image = of
    return {
        name: text[name]
        if ".moss_text_" in name
        else image[name]
        if ".moss_image_" in name
        else text[name] + image[name]
        for name in parameters
    }


@pytest.mark.parametrize("kind", [*IMAGE_BRANCHES, "with norms"])
@pytest.mark.parametrize("layout", [MIXED, TEXT], ids=["mixed", "no pictures"])
def test_each_branch_gets_the_gradient_of_its_own_loss(kind, layout):
    model = saving_norms() if kind == "with norms" else adapted(kind, dtype=torch.float64)
    expected = wanted(model, layout)
    backward_by_modality(model, *losses_of(model, layout))
    for name, gradient in gradients(model).items():
        if "norm" in name:  # LLaMA's norms work in float32, so that a sum's gradient is that of its parts only to this
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)
    assert any(gradient.abs().max() > 0 for gradient in gradients(model).values())


def test_the_sum_of_both_losses_differs_by_what_crosses_and_nothing_else():
    model = adapted("moss", dtype=torch.float64)
    sum(losses_of(model, MIXED)).backward()
    summed = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    backward_by_modality(model, *losses_of(model, MIXED))
    isolated = gradients(model)
    crossing = {}
    for number, own in ((0, "image"), (1, "text")):  # text's loss at image branches, and the reverse
        names = [name for name in summed if f".moss_{own}_" in name]
        parts = torch.autograd.grad(losses_of(model, MIXED)[number], [trained(model)[name] for name in names])
        crossing |= dict(zip(names, parts, strict=True))
    for name, gradient in summed.items():
        # LLaMA's norms work in float32
        torch.testing.assert_close(isolated[name] + crossing[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert max(part.abs().max() for part in crossing.values()) > 1e-3, "there is something to cut"
    # the last layer mixes no positions after its down-projection, so there nothing crosses
    last = "base_model.model.model.layers.1.mlp.down_proj.moss_text_B.default"
    assert crossing[last].abs().max() == 0


def test_gradients_accumulate():
    model = adapted("moss", dtype=torch.float64)
    for layout in (MIXED, TEXT):
        backward_by_modality(model, *losses_of(model, layout))
    found = gradients(model)
    expected = [wanted(adapted("moss", dtype=torch.float64), layout) for layout in (MIXED, TEXT)]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in expected), rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("absent", ["text", "image"])
def test_an_absent_loss_leaves_zeros_and_what_was_there(absent):
    model = adapted("moss", dtype=torch.float64)
    text, image = losses_of(model, MIXED)
    one = (None, image) if absent == "text" else (text, None)
    backward_by_modality(model, *one)
    for name, gradient in gradients(model).items():
        assert gradient is not None
        assert (gradient.abs().max() == 0) == (f".moss_{absent}_" in name), name
    both = adapted("moss", dtype=torch.float64)
    backward_by_modality(both, *losses_of(both, MIXED))
    before = {name: gradient.clone() for name, gradient in gradients(both).items()}
    text, image = losses_of(both, MIXED)
    backward_by_modality(both, *((None, image) if absent == "text" else (text, None)))
    for name, gradient in gradients(both).items():
        assert torch.equal(gradient, before[name]) == (f".moss_{absent}_" in name), name


def test_an_adapter_of_one_modality_is_trained_by_its_loss_alone():
    model = get_peft_model(base(2, torch.float64), MossConfig(text=None, image=LINEAR), autocast_adapter_dtype=False)
    text, image = losses_of(model.train(), MIXED)
    backward_by_modality(model, text, image)
    assert gradients(model).keys() == {name for name in gradients(model) if ".moss_image_" in name}
    assert all(gradient is not None for gradient in gradients(model).values())


def test_through_accelerate_with_accumulation():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(adapted("moss", dtype=torch.float64))
    for layout in (MIXED, TEXT):
        with accelerator.accumulate(model):
            backward_by_modality(model, *losses_of(model, layout), backward=accelerator.backward)
    expected = [wanted(adapted("moss", dtype=torch.float64), layout) for layout in (MIXED, TEXT)]
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, sum(part[name] for part in expected) / 2, rtol=0, atol=1e-12, msg=name)


def test_with_layers_run_again_in_backward():
    plain, checkpointed = (adapted("moss", dtype=torch.float64) for _ in range(2))
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        backward_by_modality(model, *losses_of(model, MIXED))
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, gradients(plain)[name], rtol=0, atol=1e-12, msg=name)


def test_a_branch_of_both_modalities_is_refused():
    model = get_peft_model(base(1, torch.float32), MossConfig(text=LINEAR, image="text"))
    loss = model(input_ids=ids_for(MIXED)).logits.sum()
    with pytest.raises(AdapterError, match="serves text and pictures") as caught:
        backward_by_modality(model, loss, loss)
    assert "moe_lora" in caught.value.fix
    assert all(gradient is None for gradient in gradients(model).values())


def test_a_configuration_that_cannot_be_isolated_is_refused():
    with pytest.raises(AdapterError, match="cannot be isolated"):
        MossConfig(text=LINEAR, image="text", isolate_gradients=True)
