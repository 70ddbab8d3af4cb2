"""Decoding with rings equals the full forward, for every branch, window and rule, on a small stack."""

import dataclasses
import itertools
import zlib

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import DynamicCache

from weft.adapters import Branch, MossConfig, RingCache, routing_of
from weft.backbones import load_backbone
from weft.backbones.base import Backbone, DecodeStep
from weft.layout import ImageSpan, Modality, ModalityLayout, TextSpan, lay_out

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's, of transformers

TEXT = Branch(4, 8.0)
IMAGES = {
    "linear": Branch(3, 6.0),
    **{f"up_left {kernel}": Branch(4, 8.0, kernel=kernel) for kernel in (1, 2, 3, 4)},
    **{f"raster {kernel}": Branch(4, 8.0, kernel=kernel, window="raster") for kernel in (3, 4)},
    "sam": Branch(4, 8.0, experts=(2, 4)),
    "sam gated": Branch(4, 8.0, experts=(2, 4), gate="token"),
    "sam raster": Branch(4, 8.0, experts=(1, 2, 3), window="raster", gate="token"),
    "full": Branch("full", 0.5),
    "text": "text",
    "none": None,
}
CONFIGS = {
    **{f"image {name}": {"text": TEXT, "image": image} for name, image in IMAGES.items()},
    **{f"text none, image {name}": {"text": None, "image": IMAGES[name]} for name in ("linear", "up_left 2", "sam")},
    "both full": {"text": Branch("full"), "image": Branch("full")},
    **{
        f"{routing}, context {context}, image {name}": {
            "text": TEXT, "image": IMAGES[name], "routing": routing, "context_images": context,
        }
        for routing, context, name in itertools.product(
            ("output", "input"), ("image", "text", "none"), ("up_left 3", "raster 3", "sam gated")
        )
    },
    "a pattern": {
        "text": TEXT, "image": IMAGES["up_left 2"],
        "patterns": {"k_proj": {"image": {"kernel": 3}}, "mlp": {"text": None, "image": {"rank": 2, "kernel": 1}}},
    },
}  # fmt: skip

# Grids of all shapes, at different places at any one time; one picture follows another; one is not finished.
SEQUENCES = [
    [TextSpan(2), ImageSpan(2, 4, given=True), TextSpan(2), ImageSpan(3, 2)],
    [TextSpan(4), ImageSpan(3, 4), TextSpan(1)],
    [TextSpan(1), ImageSpan(1, 3), ImageSpan(3, 1), TextSpan(1), ImageSpan(3, 3, present=4)],
    [TextSpan(5)],
]
COLUMNS = 4


def adapted(config: MossConfig) -> Backbone:
    backbone = load_backbone("nano")
    model = get_peft_model(backbone.decoder, config)
    for name, parameter in model.named_parameters():
        if ".moss_" in name:  # a parameter's values depend on its name alone, not on what other branches there are
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    backbone.decoder, backbone.routing = model, routing_of(model)
    return backbone.eval()


def embeds_for(layout: ModalityLayout) -> Tensor:
    return torch.randn(*layout.shape, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def decode(backbone: Backbone, layout: ModalityLayout, embeds: Tensor, *, routing: str = "output") -> Tensor:
    """(B, L, D), one position after the other."""
    (batch, length), real = layout.shape, layout.is_real
    positions = (real.cumsum(1) - 1).clamp_min(0)
    cache, rings, slots, hidden = DynamicCache(), RingCache(batch + 2, COLUMNS), torch.arange(batch).flip(0) + 1, []
    for t in range(length):
        now = layout[t : t + 1]
        plane = now.outputs if routing == "output" else now.inputs
        rings.reset(slots[((plane.row == 0) & (plane.col == 0))[:, 0]].tolist())
        mask = real[:, None, None, : t + 1].clone()
        mask[..., t] = True  # a padding position attends to itself: no row of a softmax is empty
        step = DecodeStep(slots, positions[:, t : t + 1], mask, cache, rings)
        hidden.append(backbone.forward(embeds[:, t : t + 1], now, step))
    return torch.cat(hidden, 1)


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_step_by_step_equals_the_full_forward(values):
    config = MossConfig(**values)
    backbone, layout = adapted(config), lay_out(SEQUENCES)
    embeds = embeds_for(layout)
    full = backbone.forward(embeds, layout)
    with backbone.decoder.disable_adapter():
        assert (backbone.forward(embeds, layout) - full).abs().max() > 1e-2, "the adapter does something"
    real = layout.is_real
    stepped = decode(backbone, layout, embeds, routing=config.routing)
    torch.testing.assert_close(stepped[real], full[real], rtol=0, atol=1e-5)


def test_a_step_is_the_same_where_gradients_are_recorded():
    backbone, layout = adapted(MossConfig(text=TEXT, image=IMAGES["up_left 2"])), lay_out(SEQUENCES)
    embeds = embeds_for(layout)
    recorded = decode.__wrapped__(backbone, layout, embeds)
    assert recorded.requires_grad and torch.equal(recorded, decode(backbone, layout, embeds))


BITS = ("linear", "up_left 2", "raster 3", "sam gated", "full", "none")


@pytest.mark.parametrize("name", BITS)
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours(name):
    """Neither on what they hold, nor on whether all rows of a step happen to take one branch."""
    backbone = adapted(MossConfig(text=TEXT, image=IMAGES[name]))
    mine = [TextSpan(2), ImageSpan(3, 4), TextSpan(3)]
    neighbours = ([TextSpan(17)], mine, [TextSpan(7), ImageSpan(2, 3), TextSpan(4)], [TextSpan(4)])
    rows = []
    for seed, others in enumerate(neighbours):
        layout = lay_out([others, mine, others])
        embeds = embeds_for(layout)
        embeds[0::2] = torch.randn(2, *embeds.shape[1:], generator=torch.Generator().manual_seed(seed))
        rows.append(decode(backbone, layout, embeds)[1])
    assert all(torch.equal(row, rows[0]) for row in rows[1:])


@pytest.mark.parametrize("name", BITS)
@torch.no_grad()
def test_a_sequence_is_the_same_alone_batched_permuted_and_packed_with_another_grid(name):
    backbone = adapted(MossConfig(text=TEXT, image=IMAGES[name]))
    layout = lay_out(SEQUENCES)
    embeds, order = embeds_for(layout), [2, 0, 3, 1]
    full = backbone.forward(embeds, layout)
    permuted = backbone.forward(embeds[order], lay_out([SEQUENCES[b] for b in order], length=layout.shape[1]))
    for now, b in enumerate(order):
        n = sum(span.length for span in SEQUENCES[b])
        alone = backbone.forward(embeds[b : b + 1, :n], lay_out([SEQUENCES[b]]))
        for other in (permuted[now, :n], alone[0]):
            torch.testing.assert_close(other, full[b, :n], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in ("none", "text")])
@torch.no_grad()
def test_no_output_depends_on_a_later_position(name):
    backbone, layout = adapted(MossConfig(text=TEXT, image=IMAGES[name])), lay_out([SEQUENCES[0]])
    embeds = embeds_for(layout)
    full = backbone.forward(embeds, layout)
    for cut in range(1, layout.shape[1]):
        changed = torch.cat((embeds[:, :cut], embeds[:, cut:].flip(2)), 1)
        torch.testing.assert_close(backbone.forward(changed, layout)[:, :cut], full[:, :cut], rtol=0, atol=1e-5)


@pytest.mark.parametrize("context,moved", [("image", False), ("text", True), ("none", True)])
@torch.no_grad()
def test_a_given_picture_is_served_as_the_rule_says_and_others_as_ever(context, moved):
    """In the first layer, before attention mixes positions: what the hook of one projection sees come out."""
    outputs = []
    for rule in ("image", context):
        backbone = adapted(MossConfig(text=TEXT, image=IMAGES["up_left 2"], context_images=rule))
        layout = lay_out(SEQUENCES)
        layer = backbone.decoder.base_model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda _, args, out: outputs.append(out))
        backbone.forward(embeds_for(layout), layout)
    image = layout.outputs.modality == Modality.IMAGE
    of_given = image & (layout.outputs.image == 0) & (torch.arange(len(SEQUENCES)) == 0).unsqueeze(1)
    assert torch.equal(outputs[0][of_given], outputs[1][of_given]) != moved
    torch.testing.assert_close(outputs[0][~of_given], outputs[1][~of_given], rtol=0, atol=1e-6)


@torch.no_grad()
def test_where_every_picture_is_given_nothing_of_the_image_branch_is_left():
    spans = [[dataclasses.replace(s, given=True) if isinstance(s, ImageSpan) else s for s in SEQUENCES[0]]]
    backbone = adapted(MossConfig(text=TEXT, image=IMAGES["up_left 2"], context_images="none"))
    embeds = embeds_for(lay_out(spans))
    text_only = adapted(MossConfig(text=TEXT, image=None))
    got, wanted = backbone.forward(embeds, lay_out(spans)), text_only.forward(embeds, lay_out([SEQUENCES[0]]))
    assert torch.equal(got, wanted)
