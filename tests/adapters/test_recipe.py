"""The adapter section of a recipe: what each kind is, what its keys change, and what is refused."""

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from weft.adapters import AdapterConfig, Branch, MossConfig, adapter_parameters, attach, detach
from weft.adapters.layer import MossLinear
from weft.adapters.recipe import USES
from weft.adapters.routing import Rule
from weft.backbones.tiny import load
from weft.config import load_config, parse_overrides, to_yaml
from weft.errors import AdapterError, ConfigError

TEXT = Branch(8, 16.0)
MEANINGS = {
    "lora": "text",
    "moe_lora": TEXT,
    "moss": Branch(8, 16.0, kernel=2),
    "sam_conv_lora": Branch(8, 16.0, experts=(2, 4)),
    "full": "text",
    "full_two": Branch("full"),
}


def config_of(*tokens: str, **values) -> AdapterConfig:
    return load_config(AdapterConfig, overrides=parse_overrides(tokens) | values)


def meaning_of(*tokens: str, **values) -> MossConfig:
    return config_of(*tokens, **values).to_peft()


def layers_of(config: AdapterConfig) -> dict[str, MossLinear]:
    backbone = load("nano")
    attach(backbone, config)
    return {
        name.removeprefix("base_model.model."): module
        for name, module in backbone.decoder.named_modules()
        if isinstance(module, MossLinear)
    }


@pytest.mark.parametrize("kind", USES)
def test_each_kind_is_its_branches(kind):
    found = meaning_of(kind=kind)
    assert found.text == (Branch("full") if kind.startswith("full") else TEXT)
    assert found.image == MEANINGS[kind]
    assert found.rule == Rule("output", "image")
    assert found.modules_to_save == (["norm"] if kind.startswith("full") else None)


def test_a_section_overrides_single_fields_of_its_branch():
    found = meaning_of("--kernel", "3", "--dropout", "0.1", "--image.rank", "4", "--text.dropout", "0", "--alpha", "6")
    assert found.text == Branch(8, 6.0)
    assert found.image == Branch(4, 6.0, kernel=3, dropout=0.1)
    found = meaning_of("--window", "raster", "--image.kernel", "4", "--image.scaling", "raw", "--image.alpha=0.5")
    assert (found.text, found.image) == (TEXT, Branch(8, 0.5, kernel=4, window="raster", scaling="raw"))
    found = meaning_of("--kind", "sam_conv_lora", "--image.experts", "[3]", "--image.gate", "token")
    assert found.image == Branch(8, 16.0, experts=(3,), gate="token")
    assert meaning_of("--kind", "lora", "--text.rank", "3").text == Branch(3, 6.0)


@pytest.mark.parametrize("scaling", ["rank", "sqrt_rank", "raw"])
def test_left_out_alpha_is_a_scale_of_two_for_every_rank(scaling):
    found = meaning_of(scaling=scaling, rank=5, **{"image.rank": 3})
    assert [found.text.rank, found.image.rank] == [5, 3]
    assert [found.text.scale, found.image.scale] == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("kind", ["moss", "full_two"])
@pytest.mark.parametrize("modality", ["text", "image"])
def test_none_leaves_a_modality_without_a_branch(kind, modality):
    assert getattr(meaning_of("--kind", kind, f"--{modality}", "none"), modality) is None
    layers = layers_of(config_of("--kind", kind, f"--{modality}", "none"))
    assert not any(getattr(layer, f"moss_{modality}_B") for layer in layers.values())


def test_lora_without_pictures_adapts_text_alone():
    found = meaning_of("--kind", "lora", "--image", "none", "--context_images", "none")
    assert (found.text, found.image, found.rule) == (TEXT, None, Rule("output", "none"))


def test_patterns_change_single_layers_and_keep_the_scale():
    patterns = {
        "mlp": {"image": {"rank": 2}},
        "down_proj": {"image": {"kernel": 3}, "text": "none"},
        r"layers\.1\.self_attn\.q": {"image": None},
    }
    layers = {name: layer.moss_branches["default"] for name, layer in layers_of(config_of(patterns=patterns)).items()}
    assert layers["layers.0.self_attn.q_proj"].image == MEANINGS["moss"]
    assert layers["layers.1.self_attn.q_proj"].image is None
    assert layers["layers.0.mlp.up_proj"].image == Branch(2, 4.0, kernel=2)
    assert layers["layers.0.mlp.down_proj"].image == Branch(2, 4.0, kernel=3)
    assert [layers[f"layers.0.mlp.{name}"].text for name in ("up_proj", "down_proj")] == [TEXT, None]


def test_a_pattern_brings_a_branch_to_layers_of_an_adapter_without():
    layers = layers_of(config_of(image="none", patterns={"q_proj": {"image": {"rank": 2}}}))
    assert layers["layers.0.self_attn.q_proj"].moss_branches["default"].image == Branch(2, 4.0, kernel=2)
    assert layers["layers.0.self_attn.k_proj"].moss_branches["default"].image is None


def test_targets_exclude_and_layers_choose():
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    chosen = layers_of(config_of("--exclude", "[q_proj, up_proj]", "--layers", "[1]"))
    assert {name.split(".")[1] for name in chosen} == {"1"}
    assert {name.rpartition(".")[2] for name in chosen} == {*linears} - {"q_proj", "up_proj"}
    assert len(layers_of(config_of("--targets", r".*(q|v)_proj"))) == 4
    assert layers_of(config_of("--targets", r".*q_proj", "--layers", "[0]")).keys() == {"layers.0.self_attn.q_proj"}
    assert layers_of(config_of("--targets", "[q_proj]", "--layers", "[1]")).keys() == {"layers.1.self_attn.q_proj"}
    with pytest.raises(AdapterError, match="layers 2, 7 have nothing to adapt"):
        layers_of(config_of("--layers", "[0, 2, 7]"))


@pytest.mark.parametrize("kind", USES)
def test_a_saved_recipe_means_the_same_again(kind, tmp_path):
    config = config_of("--text.rank", "3", kind=kind) if USES[kind] else config_of(kind=kind)
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    again = load_config(AdapterConfig, tmp_path / "recipe.yaml")
    assert again == config
    assert again.to_peft().to_dict() == config.to_peft().to_dict()


@pytest.mark.parametrize(
    "values,message",
    [
        ("rank: 0", "rank = 0"),
        ("rnak: 8", "did you mean rank"),
        ("image: {rnak: 8}", "did you mean image.rank"),
        ("text: {kernel: 1}", "unknown key text.kernel"),
        ("image: off", "image = False: it is a section"),
        ("kernel: 5", "kernel must be 1 to 4"),
        ("dropout: 1.0", "dropout"),
        ("alpha: .nan", "alpha must be a finite number"),
        ("window: raster", "nothing up-right below kernel 3"),
        ("{kind: lora, kernel: 2}", "lora has no kernel; use kind: moss"),
        ("{kind: moe_lora, window: raster}", "moe_lora has no window"),
        ("{kind: moss, image: {experts: [2]}}", "image: moss has no experts; use kind: sam_conv_lora"),
        ("{kind: sam_conv_lora, image: {kernel: 2}}", "sam_conv_lora has no kernel"),
        ("{kind: full, rank: 8}", "full has no rank"),
        ("{kind: full_two, alpha: 2}", "full_two has no alpha"),
        ("{kind: full_two, dropout: 0.1}", "full_two has no dropout"),
        ("{kind: lora, image: {rank: 4}}", "one branch for all positions.* moe_lora"),
        ("{kind: full, routing: input}", "nothing is routed; use kind: full_two"),
        ("{kind: lora, context_images: text}", "nothing is routed"),
        ("{kind: lora, isolate_gradients: true}", "one branch serves text and pictures"),
        ("{text: none, image: none}", "neither text nor image"),
        ("{kind: lora, text: none}", "neither text nor image"),
        ("layers: []", "layers"),
        ("patterns: {'(': {}}", "no regular expression"),
        ("patterns: {q: {imge: {}}}", "did you mean patterns.q.image"),
        ("{kind: moe_lora, patterns: {q: {image: {kernel: 3}}}}", "patterns: q: image: moe_lora has no kernel"),
        ("{kind: lora, patterns: {q: {image: {rank: 3}}}}", "one branch for all positions"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(values, message):
    with pytest.raises(ConfigError) as caught:
        load_config(AdapterConfig, overrides=yaml.safe_load(values))
    assert caught.match(message)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(AdapterError, match="qproj"):
        attach(load("nano"), config_of(patterns={"qproj": {"image": "none"}}))


# spec of the paper's sizes, in billions, for all seven linear layers of LLaMA-7B: LoRA, MoE-LoRA, MoSS k=2, k=3, SAM
SIZES = {
    64: (0.160, 0.320, 0.538, 0.903, 0.338),
    128: (0.320, 0.640, 1.077, 1.806, 0.713),
    256: (0.640, 1.279, 2.154, 3.611, 1.573),
}
KINDS = ({"kind": "lora"}, {"kind": "moe_lora"}, {}, {"kernel": 3}, {"kind": "sam_conv_lora"})


@pytest.mark.parametrize("rank", SIZES)
def test_sizes_are_those_of_the_paper_s_arithmetic(rank):
    width, mlp, layers = 4096, 11008, 32
    sizes = 4 * (width + width) + 3 * (width + mlp)  # C + D over the seven linears
    inputs, outputs = 4 * width + 2 * width + mlp, 4 * width + 2 * mlp + width
    exact = {
        "lora": rank * sizes,
        "moe_lora": 2 * rank * sizes,
        "moss": rank * sizes + rank * (4 * inputs + outputs),
        "moss3": rank * sizes + rank * (9 * inputs + outputs),
        "sam": 2 * rank * sizes + 7 * rank**2 * (4 + 16),
    }
    for values, count, rounded in zip(KINDS, exact.values(), SIZES[rank], strict=True):
        with torch.device("meta"):
            shape = LlamaConfig(
                hidden_size=width, intermediate_size=mlp, num_hidden_layers=1, num_attention_heads=32, vocab_size=8
            )
            model = get_peft_model(LlamaForCausalLM(shape), AdapterConfig(rank=rank, **values).to_peft())
        found = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert found == count
        assert found * layers / 1e9 == pytest.approx(rounded, abs=0.0006)  # three digits, as rounded there


def test_removing_an_adapter_with_whole_modules_restores_the_base():
    backbone = load("nano")
    before = {name: tensor.clone() for name, tensor in backbone.decoder.state_dict().items()}
    attach(backbone, config_of(kind="full"))
    for parameter in adapter_parameters(backbone).values():
        torch.nn.init.normal_(parameter)
    detach(backbone)
    after = backbone.decoder.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_full_trains_every_weight_of_the_stack_and_nothing_else():
    backbone = load("nano")
    stack = sum(parameter.numel() for parameter in backbone.decoder.parameters())
    attach(backbone, config_of(kind="full"))
    assert sum(parameter.numel() for parameter in adapter_parameters(backbone).values()) == stack
    trained = {id(p) for p in backbone.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter_parameters(backbone).values()}
    backbone = load("nano")
    attach(backbone, config_of(kind="full", modules_to_save=[]))
    linears = sum(p.numel() for n, p in load("nano").decoder.named_parameters() if "proj" in n)
    assert sum(parameter.numel() for parameter in adapter_parameters(backbone).values()) == linears
