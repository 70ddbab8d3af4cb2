"""The visual tokenizer against second computations, and against tensors of the released code where they are at hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weft.codecs.resampler import ResamplerConfig
from weft.codecs.vision import (
    MEAN,
    STD,
    DeformableAttention,
    VisionConfig,
    VisualTokenizer,
    VisualTokenizerConfig,
)
from weft.errors import UsageError

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "visual_tokenizer"
VISION = VisionConfig(side=20, patch=5, width=8, layers=4, heads=2, mlp=12, stem=3, points=3)
SMALL = VisualTokenizerConfig(
    vision=VISION, resampler=ResamplerConfig(queries=3, width=6, source_width=8, layers=2, heads=2, mlp=9), width=10
)
RENAMES = {
    "encoder.vision_model.adapter_": "encoder.adapter.",
    "encoder.vision_model.": "encoder.trunk.",
    "ffn.dwconv.dwconv.": "ffn.dwconv.",
    "perceiver_resampler.": "resampler.",
    "blip2qformer.layernorm.": "norm.",
    "blip2qformer.encoder.layer.": "layers.",
    "attention.attention.": "attention.",
    "attention.output.LayerNorm.": "attention.norm.",
    "attention.output.": "attention.",
    "intermediate_query.dense.": "mlp.fc1.",
    "output_query.dense.": "mlp.fc2.",
    "output_query.LayerNorm.": "mlp.norm.",
}
"""Parts of released keys -> of ours, applied in this order."""
RECOMPUTED = {"clip_mean", "clip_std", "pos_embed", "encoder.vision_model.embeddings.position_ids"}


def our_key(key):
    for released, ours in RENAMES.items():
        key = key.replace(released, ours)
    return key


@pytest.fixture
def tokenizer():
    """As it is made, in float64."""
    torch.manual_seed(0)
    return VisualTokenizer(SMALL).double().eval()


@pytest.fixture
def trained(tokenizer):
    """Nothing is zero any more."""
    for parameter in tokenizer.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.2
    return tokenizer


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 20, 20, dtype=torch.float64)


def pixel_at(image, row, col):
    inside = 0 <= row < image.shape[0] and 0 <= col < image.shape[1]
    return image[row, col] if inside else torch.zeros_like(image[0, 0])


def bilinear(image, x, y):
    """(rows, cols, C) at fractions of the map."""
    col, row = x * image.shape[1] - 0.5, y * image.shape[0] - 0.5
    left, top = math.floor(col.item()), math.floor(row.item())
    return sum(
        pixel_at(image, top + i, left + j) * (row - top if i else top + 1 - row) * (col - left if j else left + 1 - col)
        for i in (0, 1)
        for j in (0, 1)
    )


def attention_by_hand(attn, queries, places, source, shapes):
    """One query, head, scale and point after another."""
    (heads, scales, points), size = (attn.heads, attn.scales, attn.points), attn.value_proj.out_features // attn.heads
    rows_of = [rows * cols for rows, cols in shapes]
    out = []
    for query, (x, y) in zip(queries, places.tolist(), strict=True):
        offsets = attn.sampling_offsets(query).view(heads, scales, points, 2)
        weights = attn.attention_weights(query).view(heads, scales * points).softmax(-1)
        sums = []
        for h in range(heads):
            total = 0
            for s, (part, (rows, cols)) in enumerate(zip(source.split(rows_of), shapes, strict=True)):
                image = attn.value_proj(part)[:, h * size : (h + 1) * size].view(rows, cols, size)
                for k in range(points):
                    dx, dy = offsets[h, s, k]
                    total += weights[h, s * points + k] * bilinear(image, x + dx / cols, y + dy / rows)
            sums.append(total)
        out.append(attn.output_proj(torch.cat(sums)))
    return torch.stack(out)


@pytest.mark.parametrize("shapes", [((1, 1),), ((2, 3),), ((3, 2), (1, 3), (2, 1))])
def test_attention_samples_where_it_says(shapes):
    torch.manual_seed(1)
    attn = DeformableAttention(VISION, len(shapes)).double()
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    queries = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    source = torch.randn(1, sum(r * c for r, c in shapes), 8, dtype=torch.float64, requires_grad=True)
    places = torch.rand(5, 2, dtype=torch.float64)
    out = attn(queries, places, source, shapes)
    wanted = attention_by_hand(attn, queries[0], places, source[0], shapes)
    torch.testing.assert_close(out[0], wanted, rtol=0, atol=1e-12)
    cot, inputs = torch.randn_like(wanted), [queries, source, *attn.parameters()]
    made, other = (torch.autograd.grad((each * cot).sum(), inputs) for each in (out[0], wanted))
    torch.testing.assert_close(made, other, rtol=1e-9, atol=1e-11)


def test_points_start_in_the_directions_of_their_heads_one_step_after_another():
    attn = DeformableAttention(VisionConfig(heads=8, points=3, width=16), scales=2)
    offsets = attn.sampling_offsets.bias.view(8, 2, 3, 2)
    torch.testing.assert_close(offsets.abs().amax(-1), torch.tensor([1.0, 2.0, 3.0]).expand(8, 2, 3))
    angles = torch.atan2(offsets[..., 1], offsets[..., 0]) % (2 * math.pi)
    wanted = torch.arange(8).view(8, 1, 1).expand(8, 2, 3) * math.pi / 4
    torch.testing.assert_close(angles, wanted, rtol=0, atol=1e-5)


def test_points_of_a_head_learn_each_for_itself(tokenizer, pixels):
    tokenizer.encoder(pixels).maps[1].square().sum().backward()
    for interaction in tokenizer.encoder.adapter.interactions:
        grads = interaction.extractor.attn.sampling_offsets.bias.grad.view(2, 3, 2)
        apart = [grads[h, i].sub(grads[h, j]).abs().max() for h in range(2) for i in range(3) for j in range(i)]
        assert min(apart) > 1e-9


def test_a_new_adapter_leaves_the_vit_as_it_is(tokenizer, pixels):
    encoder = tokenizer.encoder
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    plain = encoder.trunk(pixel_values=(pixels - mean) / std).last_hidden_state
    torch.testing.assert_close(encoder(pixels).last_hidden, plain, rtol=0, atol=1e-12)
    encoder.adapter.interactions[0].injector.gamma.data += 0.1
    assert not torch.allclose(encoder(pixels).last_hidden, plain, atol=1e-3)


def test_the_class_token_is_not_injected_into_but_sees_what_is(trained, pixels):
    """With no layer in between it would not change: the first layer's input is what the plain ViT has."""
    seen = []
    trained.encoder.trunk.encoder.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trained.encoder(pixels)
    trained.encoder.trunk(pixel_values=pixels)
    adapted, plain = seen
    assert torch.equal(adapted[0, 0], plain[0, 0]) and not torch.allclose(adapted[0, 1:], plain[0, 1:])


def test_all_but_the_vit_is_trained(trained, pixels):
    trained.train()
    out = trained(pixels)
    (out.tokens.square().sum() + sum(m.square().sum() for m in out.maps)).backward()
    for name, parameter in trained.named_parameters():
        frozen = name.startswith("encoder.trunk.")
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name
        assert frozen or parameter.grad.any(), name


def test_the_callers_pixels_stay_as_they_are(trained, pixels):
    before = pixels.clone()
    first = trained(pixels).tokens
    assert torch.equal(pixels, before)
    assert torch.equal(trained(pixels).tokens, first)


def test_shapes(trained, pixels):
    out = trained(pixels)
    assert out.tokens.shape == (2, 3, 10)
    assert [tuple(m.shape) for m in out.maps] == [(2, 8, n, n) for n in (16, 8, 4, 2)]
    assert trained.encoder(pixels).last_hidden.shape == (2, 17, 8)


def test_pictures_do_not_see_each_other(trained, pixels):
    both, second = trained(pixels), trained(pixels[1:])
    torch.testing.assert_close((both.tokens[1:], *(m[1:] for m in both.maps)), (second.tokens, *second.maps))


def test_recomputed_layers_have_the_same_gradients(trained, pixels):
    def gradients():
        trained.zero_grad()
        out = trained.train()(pixels)
        (out.tokens.sum() + sum(m.square().sum() for m in out.maps)).backward()
        return {name: p.grad.clone() for name, p in trained.named_parameters() if p.requires_grad}

    runs = []
    trained.encoder.trunk.encoder.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    plain = gradients()
    trained.encoder.trunk.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)
    assert len(runs) == 1 + 2


@pytest.mark.parametrize("positions", [torch.float32, torch.bfloat16])
def test_bfloat16_stays_close(trained, pixels, positions):
    precise = trained(pixels)
    trained.bfloat16().positions = trained.positions.to(positions)
    half = trained(pixels.float())
    for made, wanted in zip((half.tokens, *half.maps), (precise.tokens, *precise.maps), strict=True):
        assert made.dtype == torch.bfloat16
        assert (made - wanted).abs().mean() < 0.05 * wanted.abs().mean()


@pytest.mark.parametrize("shape", [(3, 20, 20), (1, 3, 20, 15), (1, 1, 20, 20), (0, 3, 20, 20)])
def test_pixels_of_another_shape_are_refused(tokenizer, shape):
    with pytest.raises(UsageError, match=r"resize pictures to \(M, 3, 20, 20\)"):
        tokenizer(torch.zeros(shape))


@pytest.mark.parametrize(
    "values, complaint",
    [
        ({"side": 210}, "no even number of patches"),
        ({"layers": 22}, "do not divide into 4 groups"),
        ({"width": 24}, "no multiple of 2 \\* heads"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(values, complaint):
    with pytest.raises(ValueError, match=complaint):
        VisionConfig(**values)


def test_the_resampler_reads_the_vit():
    with pytest.raises(ValueError, match=r"source_width 1024 is not vision.width 8"):
        VisualTokenizerConfig(vision=VISION)


def test_the_released_sizes():
    with torch.device("meta"):
        tokenizer = VisualTokenizer(VisualTokenizerConfig())
    encoder = tokenizer.encoder
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == 326.41
    assert round(sum(p.numel() for p in encoder.adapter.parameters()) / 1e6, 2) == 23.23
    assert len(encoder.state_dict()) == 591 - 1, "all released tensors but `position_ids`"
    assert encoder.adapter.interactions[3].injector.attn.sampling_offsets.weight.shape == (384, 1024)
    assert tokenizer.positions.device.type == "cpu", "positions are no weights"


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.is_dir():
        pytest.skip("the tensors of the released code are not at hand")
    values = json.loads((GOLDEN / "config.json").read_text())
    perceiver = values["perceiver"]
    tokenizer = VisualTokenizer(
        VisualTokenizerConfig(
            vision=VisionConfig(
                side=values["image_size"], patch=values["patch_size"], width=values["hidden_size"],
                layers=values["vit_layers"], heads=values["num_attention_heads"], mlp=values["intermediate_size"],
                activation=values["clip_hidden_act"], stem=values["conv_inplane"],
                points=values["adapter"]["n_points"],
            ),
            resampler=ResamplerConfig(
                queries=perceiver["num_queries"], width=perceiver["hidden_size"],
                source_width=perceiver["encoder_hidden_size"], layers=perceiver["num_hidden_layers"],
                cross_every=perceiver["cross_attention_frequency"], heads=perceiver["num_attention_heads"],
                mlp=perceiver["intermediate_size"], qk_norm=perceiver["qk_normalization"],
            ),
            width=values["llm_hidden_size"],
        )
    ).eval()  # fmt: skip
    weights = load_file(GOLDEN / "weights.safetensors")
    tokenizer.load_state_dict({our_key(k): v for k, v in weights.items() if k not in RECOMPUTED})
    return tokenizer, weights, load_file(GOLDEN / "case_images.safetensors")


def test_what_is_recomputed_is_what_was_released(golden):
    tokenizer, weights, _ = golden
    positions = torch.cat((torch.zeros(1, 16), tokenizer.positions))
    torch.testing.assert_close(positions, weights["pos_embed"], rtol=0, atol=1e-7)
    assert torch.equal(torch.tensor(MEAN), weights["clip_mean"].flatten())
    assert torch.equal(torch.tensor(STD), weights["clip_std"].flatten())


def test_the_tokenizer_gives_the_released_tensors(golden):
    tokenizer, _, case = golden
    with torch.no_grad():
        out, pyramid = tokenizer(case["in.image"]), tokenizer.encoder(case["in.image"])
    torch.testing.assert_close(out.tokens, case["out.vis_embed"], rtol=0, atol=5e-5)
    for i, features in enumerate(out.maps):
        torch.testing.assert_close(features, case[f"out.multiscale_features.{i}"], rtol=0, atol=1e-4)
    last = pyramid.last_hidden
    torch.testing.assert_close(last, case["out.encoder_last_hidden_state"], rtol=0, atol=1e-4)
    torch.testing.assert_close(last[:, 1:] + tokenizer.positions, case["out.image_embeds"], rtol=0, atol=1e-4)


def test_the_tokenizer_has_the_released_gradients(golden):
    tokenizer, _, case = golden
    image = case["in.image"].clone().requires_grad_()
    out = tokenizer(image)
    made = (out.tokens, *out.maps)
    cots = (case["cot.vis_embed"], *(case[f"cot.multiscale_features.{i}"] for i in range(4)))
    sum((each * cot).sum() for each, cot in zip(made, cots, strict=True)).backward()
    wanted = {our_key(k.removeprefix("grad.param.")): v for k, v in case.items() if k.startswith("grad.param.")}
    found = {name: tokenizer.get_parameter(name).grad for name in wanted} | {"image": image.grad}
    for name, grad in (wanted | {"image": case["grad.image"]}).items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-4 * grad.abs().max().item(), msg=name)
