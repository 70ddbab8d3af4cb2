"""One adapted layer, and layers that share their input, against definitions written out here."""

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from weft.adapters import AdapterConfig, Branch, MossConfig
from weft.adapters.branches import sam
from weft.adapters.routing import route
from weft.layout import ImageSpan, Modality, TextSpan, lay_out
from weft.ops.causal_conv import reference

TEXT = Branch(4, 6.0)
IMAGES = {
    "linear": Branch(3, 6.0),
    "up_left 2": Branch(3, 6.0, kernel=2, scaling="sqrt_rank"),
    "up_left 4": Branch(3, 0.7, kernel=4, scaling="raw"),
    "raster 3": Branch(3, 6.0, kernel=3, window="raster"),
    "sam": Branch(3, 6.0, experts=(2, 4)),
    "sam gated": Branch(3, 6.0, experts=(2, 4), gate="token"),
    "full": Branch("full", 0.5),
}
each_image = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)

SPANS = [
    [TextSpan(3), ImageSpan(2, 3), TextSpan(2), ImageSpan(1, 4), TextSpan(1)],
    [TextSpan(2), ImageSpan(2, 3), TextSpan(2)],
    [TextSpan(5)],
]
LAYOUT = lay_out(SPANS)
IS_TEXT, IS_IMAGE = (LAYOUT.outputs.modality == modality for modality in (Modality.TEXT, Modality.IMAGE))


class Attention(nn.Module):
    """The three layers that share one input, named as everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 5, bias=False), nn.Linear(6, 4), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def adapted(config: MossConfig, module: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Attention() if module is None else module, config).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def inputs(*, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x with a gradient of its own to come, and weights to sum the outputs with."""
    torch.manual_seed(1)
    return torch.randn(*LAYOUT.shape, 6, dtype=dtype, requires_grad=True), torch.randn(*LAYOUT.shape, 14, dtype=dtype)


def update(x: Tensor, layer: nn.Module, modality: str, branch: Branch, rows: Tensor, patches) -> Tensor:
    """s B z over all positions, with z by the definitions of the operations, whose own tests they have."""
    b, z = getattr(layer, f"moss_{modality}_B")["default"], x.flatten(0, 1)[rows]
    if branch.rank != "full":
        a = getattr(layer, f"moss_{modality}_A")["default"]
        z = reference(z, a, branch.taps, patches) if patches else z @ a.T
        scale = branch.alpha / {"rank": branch.rank, "sqrt_rank": math.sqrt(branch.rank), "raw": 1}[branch.scaling]
    else:
        scale = branch.alpha
    if branch.experts:
        gate = layer.moss_image_gate["default"] if branch.gate else None
        z = sam(z, layer.moss_image_experts["default"], gate, branch.expert_taps, patches)
    return (
        torch.zeros(x[..., 0].numel(), len(b), dtype=x.dtype).index_add(0, rows, scale * z @ b.T).view(*x.shape[:2], -1)
    )


@each_image
@pytest.mark.parametrize("text", [TEXT, Branch("full", 0.5), None], ids=["text linear", "text full", "text none"])
def test_a_layer_is_its_frozen_one_and_the_updates_gradients_included(text, image):
    model, (x, weight) = adapted(MossConfig(text=text, image=image)), inputs()
    routes, outs = route(LAYOUT, windows=image.windows), []
    for layer in (model.q_proj, model.k_proj, model.v_proj):
        out = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
        if text:
            out = out + update(x, layer, "text", text, routes.text, None)
        outs.append(out + update(x, layer, "image", image, routes.image, routes.patches))
    got, wanted = model(x, layout=LAYOUT), torch.cat(outs, -1)
    parameters = [x, *(p for name, p in model.named_parameters() if ".moss_" in name)]
    gradients = [torch.autograd.grad((out * weight).sum(), parameters) for out in (got, wanted)]
    for ours, definition in ((got, wanted), *zip(*gradients, strict=True)):
        torch.testing.assert_close(ours, definition, rtol=0, atol=1e-11)  # sums of up to 100 products up to 30


def changed(model: PeftModel, modality: str) -> None:
    for name, parameter in model.named_parameters():
        if f".moss_{modality}_" in name:
            nn.init.normal_(parameter)


@each_image
@torch.no_grad()
def test_neither_modality_reads_the_parameters_of_the_other(image):
    model, (x, _) = adapted(MossConfig(text=TEXT, image=image)), inputs()
    for modality, own, other in (("image", IS_IMAGE, IS_TEXT), ("text", IS_TEXT, IS_IMAGE)):
        before = model(x, layout=LAYOUT)
        changed(model, modality)
        after = model(x, layout=LAYOUT)
        assert torch.equal(before[other], after[other])
        assert not torch.isclose(before[own], after[own]).all(-1).any()
        assert torch.equal(before[~LAYOUT.is_real], after[~LAYOUT.is_real])


@each_image
def test_neither_modalitys_loss_reaches_the_parameters_of_the_other(image):
    model, (x, weight) = adapted(MossConfig(text=TEXT, image=image)), inputs()
    for own, modality in ((IS_TEXT, "text"), (IS_IMAGE, "image")):
        model.zero_grad()
        (model(x, layout=LAYOUT) * weight)[own].sum().backward()
        for name, parameter in model.named_parameters():
            if ".moss_" in name:
                assert parameter.grad is not None, "missing would make distributed training wait"
                assert parameter.grad.any() == (f".moss_{modality}_" in name), name


@each_image
@torch.no_grad()
def test_without_a_text_branch_text_keeps_the_frozen_output_bit_for_bit(image):
    model, (x, _) = adapted(MossConfig(text=None, image=image)), inputs()
    out = model(x, layout=LAYOUT)
    with model.disable_adapter():
        frozen = model(x)
    assert torch.equal(out[~IS_IMAGE], frozen[~IS_IMAGE])
    assert not torch.isclose(out[IS_IMAGE], frozen[IS_IMAGE]).all(-1).any()


@torch.no_grad()
def test_a_hook_on_the_frozen_layer_keeps_the_frozen_output():
    model, (x, _) = adapted(MossConfig(text=TEXT, image=IMAGES["up_left 2"])), inputs()
    frozen, kept = model.q_proj.base_layer, []  # without a bias, so that its output is no view
    frozen.register_forward_hook(lambda _, __, out: kept.append(out))
    model(x, layout=LAYOUT)
    assert torch.equal(kept[0], F.linear(x, frozen.weight))


def test_without_an_image_branch_pictures_keep_the_frozen_output_bit_for_bit():
    model, (x, _) = adapted(MossConfig(text=TEXT, image=None)), inputs()
    out = model(x, layout=LAYOUT)
    with model.disable_adapter():
        frozen = model(x)
    assert torch.equal(out[~IS_TEXT], frozen[~IS_TEXT])
    assert not torch.isclose(out[IS_TEXT], frozen[IS_TEXT]).all(-1).any()


class MoeLora(nn.Module):
    """Two linear LoRAs with hard routing, by somebody who has never heard of windows."""

    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.base, self.scale = layer.base_layer, scale
        self.a_text, self.b_text, self.a_image, self.b_image = (
            nn.Parameter(getattr(layer, f"moss_{name}")["default"].detach().clone())
            for name in ("text_A", "text_B", "image_A", "image_B")
        )

    def forward(self, x: Tensor, modality: Tensor) -> Tensor:
        flat, out = x.flatten(0, 1), self.base(x).flatten(0, 1)
        for name, a, b in ((Modality.TEXT, self.a_text, self.b_text), (Modality.IMAGE, self.a_image, self.b_image)):
            rows = (modality == name).flatten().nonzero().squeeze(1)
            out = out.index_add(0, rows, F.linear(F.linear(flat[rows], a) * self.scale, b))
        return out.view(*x.shape[:-1], -1)


def moe_loras(spans: list, alpha: float) -> tuple[list[Tensor], list[Tensor]]:
    """Output, gradient of x and of A, B, A, B: ours with kernel 1, theirs."""
    layout, branch = lay_out(spans), Branch(4, alpha, kernel=1)
    config = MossConfig(text=branch, image=branch, target_modules=["0"])
    model = adapted(config, nn.Sequential(nn.Linear(6, 4)), torch.float32)
    layer = model.get_base_model()[0]
    theirs = MoeLora(layer, branch.scale)
    own = [getattr(layer, f"moss_{name}")["default"] for name in ("text_A", "text_B", "image_A", "image_B")]
    copies = [theirs.a_text, theirs.b_text, theirs.a_image, theirs.b_image]
    x, weight = torch.randn(*layout.shape, 6, requires_grad=True), torch.randn(*layout.shape, 4)
    outs = model(x, layout=layout), theirs(x, layout.outputs.modality)
    ours, others = (
        [out.detach(), *torch.autograd.grad((out * weight).sum(), [x, *parameters])]
        for out, parameters in zip(outs, (own, copies), strict=True)
    )
    return ours, others


ONE_GRID = [SPANS[0][:3], *SPANS[1:]]


def test_kernel_one_is_moe_lora_bit_for_bit():
    """With s = 2, as recommended: a power of two can be multiplied in anywhere without a change of bits."""
    for ours, theirs in zip(*moe_loras(ONE_GRID, alpha=8.0), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "spans,alpha",
    [
        (SPANS, 8.0),  # pictures are grouped by grid, and the gradients of A and B add their rows in that order
        (ONE_GRID, 5.0),  # s (g^T z), ours, and g^T (s z), theirs, round differently
    ],
    ids=["several grids", "another scale"],
)
def test_kernel_one_is_moe_lora_elsewhere_too(spans, alpha):
    """Outputs are the same bits here as well; gradients may differ in their last."""
    (out, *gradients), (their_out, *their_gradients) = moe_loras(spans, alpha)
    assert torch.equal(out, their_out)
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())


def test_the_recipes_moe_lora_is_moss_with_kernel_one_bit_for_bit():
    x, weight = inputs(dtype=torch.float32)
    found = []
    for recipe in (AdapterConfig(kind="moe_lora", rank=4), AdapterConfig(kind="moss", kernel=1, rank=4)):
        model = adapted(recipe.to_peft(), dtype=torch.float32)
        out = model(x, layout=LAYOUT)
        parameters = [p for name, p in model.named_parameters() if ".moss_" in name]
        found.append([out, *torch.autograd.grad((out * weight).sum(), [x, *parameters])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
