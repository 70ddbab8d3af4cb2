"""What becomes part of the weights gives the same numbers; what cannot is refused, and the model stays as it was."""

import json
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from weft.adapters import Branch, MossConfig, RingCache, routing_of
from weft.adapters.export import export_text_lora
from weft.adapters.layer import MossLinear
from weft.adapters.merge import merge_text, split_weights
from weft.adapters.two_weights import TwoWeightLinear
from weft.backbones.base import DecodeStep
from weft.backbones.tiny import load
from weft.errors import AdapterError, RoutingError
from weft.layout import ImageSpan, TextSpan, lay_out

LINEAR = Branch(3, 6.0)
BRANCHES = {
    "lora": {"text": LINEAR, "image": "text"},
    "moe_lora": {"text": LINEAR, "image": Branch(5, 5.0, scaling="sqrt_rank")},
    "moss": {"text": LINEAR, "image": Branch(5, 5.0, kernel=2)},
    "kernel 3": {"text": LINEAR, "image": Branch(2, 0.5, kernel=3, scaling="raw")},
    "raster": {"text": LINEAR, "image": Branch(2, 2.0, kernel=3, window="raster")},
    "no text": {"text": None, "image": Branch(5, 5.0, kernel=2)},
    "no image": {"text": LINEAR, "image": None},
    "two full sets": {"text": Branch("full", 0.1), "image": Branch("full", 0.2)},
    "given pictures as text": {"text": LINEAR, "image": Branch(5, 5.0, kernel=2), "context_images": "text"},
    "by layer": {
        "text": LINEAR, "image": Branch(5, 5.0, kernel=2),
        "patterns": {"q_proj": {"image": "text"}, "k_proj": {"image": None}, "down_proj": {"text": {"rank": 7}}},
    },
}  # fmt: skip
SAM = {"text": LINEAR, "image": Branch(4, 4.0, experts=(2, 4))}
TEXT = [[TextSpan(7)], [TextSpan(4)]]
GIVEN = ImageSpan(2, 2, given=True)
PICTURES = {
    "text": TEXT,
    "several grids": [
        [TextSpan(2), ImageSpan(2, 3), TextSpan(3), ImageSpan(3, 1), TextSpan(2)],
        [TextSpan(1), GIVEN, TextSpan(1)],
    ],
    "adjacent": [[TextSpan(1), ImageSpan(2, 2), ImageSpan(2, 2), TextSpan(1)], [TextSpan(2)]],
    "unfinished": [[TextSpan(2), ImageSpan(2, 3, present=4)], [TextSpan(9)]],
}


def adapted(branches, *, dtype=torch.float64, std=0.1, **settings):
    """The instant model with a random adapter; double precision tells a wrong formula from rounding."""
    backbone = load("nano")
    model = get_peft_model(backbone.decoder, MossConfig(**branches, **settings))
    backbone.decoder, backbone.routing = model, routing_of(model)
    generator = torch.Generator().manual_seed(5)
    for parameter in (p for name, p in model.named_parameters() if ".moss_" in name):
        nn.init.normal_(parameter, std=std, generator=generator)
    return backbone.to(dtype).eval()


@torch.no_grad()
def hidden(backbone, layout):
    ids = torch.randint(6, 250, layout.shape, generator=torch.Generator().manual_seed(3))
    # the model's own table of places is for 2 x 2 patches
    return backbone.forward(backbone.table(ids), layout)[layout.is_real]


@torch.no_grad()
def step_by_step(backbone, layout, columns):
    ids = torch.randint(6, 250, layout.shape, generator=torch.Generator().manual_seed(3))
    embeds, real, batch = backbone.table(ids), layout.is_real, layout.shape[0]
    positions = (real.cumsum(1) - 1).clamp_min(0)
    cache, rings, slots, steps = DynamicCache(), RingCache(batch, columns), torch.arange(batch), []
    for t in range(layout.shape[1]):
        now = layout[t : t + 1]
        rings.reset(((now.outputs.row == 0) & (now.outputs.col == 0))[:, 0].nonzero().squeeze(1).tolist())
        mask = real[:, None, None, : t + 1].clone()
        mask[..., t] = True
        step = DecodeStep(slots, positions[:, t : t + 1], mask, cache, rings)
        steps.append(backbone.forward(embeds[:, t : t + 1], now, step))
    return torch.cat(steps, 1)[real]


def wrapped(model) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, MossLinear)]


@pytest.mark.parametrize("name", [*(name for name in BRANCHES if name != "no text"), "sam"])
def test_merged_text_is_the_adapted_model_on_text(name):
    backbone, layout = adapted({**BRANCHES, "sam": SAM}[name]), lay_out(TEXT)
    expected = hidden(backbone, layout)
    backbone.decoder, backbone.routing = merge_text(backbone.decoder), None
    torch.testing.assert_close(hidden(backbone, layout), expected, rtol=0, atol=1e-10)


def test_merged_in_single_precision():
    backbone, layout = adapted(BRANCHES["moss"], dtype=torch.float32, std=0.05), lay_out(TEXT)
    expected = hidden(backbone, layout)
    backbone.decoder, backbone.routing = merge_text(backbone.decoder), None
    torch.testing.assert_close(hidden(backbone, layout), expected, rtol=0, atol=1e-5)


def test_a_merged_model_is_the_plain_base_model():
    plain, backbone = load("nano").double(), adapted(BRANCHES["moss"])
    merged = merge_text(backbone.decoder)
    assert type(merged) is type(plain.decoder)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in plain.decoder.state_dict().items()
    }
    assert [(k, type(m)) for k, m in merged.named_modules()] == [(k, type(m)) for k, m in plain.decoder.named_modules()]
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert not hasattr(merged, "peft_config")
    merged(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))  # asks for no layout


@pytest.mark.parametrize("sequences", PICTURES)
@pytest.mark.parametrize("name", BRANCHES)
def test_split_weights_give_what_the_adapter_gave(name, sequences):
    backbone, layout = adapted(BRANCHES[name]), lay_out(PICTURES[sequences])
    expected = hidden(backbone, layout)
    backbone.decoder = split_weights(backbone.decoder)
    assert not wrapped(backbone.decoder)
    torch.testing.assert_close(hidden(backbone, layout), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BRANCHES)
def test_split_weights_decode_step_by_step(name):
    backbone, layout = adapted(BRANCHES[name]), lay_out(PICTURES["several grids"])
    expected = hidden(backbone, layout)
    backbone.decoder = split_weights(backbone.decoder)
    torch.testing.assert_close(step_by_step(backbone, layout, columns=3), expected, rtol=0, atol=1e-10)


def test_split_in_single_precision():
    backbone, layout = adapted(BRANCHES["moss"], dtype=torch.float32, std=0.05), lay_out(PICTURES["several grids"])
    expected = hidden(backbone, layout)
    backbone.decoder = split_weights(backbone.decoder)
    torch.testing.assert_close(hidden(backbone, layout), expected, rtol=0, atol=1e-5)


def test_what_splitting_costs():
    for name, others in (("moe_lora", 0), ("moss", 3)):
        backbone = adapted(BRANCHES[name])
        backbone.decoder = split_weights(backbone.decoder)
        layers = [layer for layer in backbone.decoder.modules() if isinstance(layer, TwoWeightLinear)]
        assert len(layers) == 14
        for layer in layers:
            c, e = layer.in_features, layer.out_features
            beside = 5 * (others * c + e) if others else 0
            assert sum(parameter.numel() for parameter in layer.parameters()) == 2 * c * e + beside


def test_split_weights_still_need_the_layout():
    model, layout = split_weights(adapted(BRANCHES["moss"]).decoder), lay_out([[TextSpan(3)]])
    embeds = torch.zeros(1, 3, 32, dtype=torch.float64)
    with pytest.raises(RoutingError, match="without the layout"):
        model(inputs_embeds=embeds)
    model(inputs_embeds=embeds, layout=layout)
    with pytest.raises(RoutingError, match="without the layout"):
        model(inputs_embeds=embeds)


class Quantised(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter((linear.weight * 100).to(torch.int8), requires_grad=False)


def quantise(backbone):
    layer = wrapped(backbone.decoder)[3]
    layer.base_layer = Quantised(layer.base_layer)


def halve(backbone):
    backbone.decoder.get_base_model().layers[1].mlp.up_proj.base_layer.bfloat16()


def share(backbone):
    layers = backbone.decoder.get_base_model().layers
    layers[0].elsewhere = nn.Linear(1, 1)
    layers[0].elsewhere.weight = layers[1].self_attn.q_proj.base_layer.weight


def poison(backbone):
    with torch.no_grad():
        backbone.decoder.get_base_model().layers[1].mlp.up_proj.moss_text_B["default"][0, 0] = torch.nan


@pytest.mark.parametrize("merge", [merge_text, split_weights])
@pytest.mark.parametrize(
    "harm, what",
    [
        (quantise, "o_proj is a Quantised"),
        (halve, "layers.1.mlp.up_proj is in bfloat16"),
        (share, "shares its weight with layers.1.self_attn.q_proj"),
        (poison, "layers.1.mlp.up_proj.moss_text_B.default is not finite"),
    ],
)
def test_a_weight_that_cannot_be_added_to_is_named_and_nothing_is_changed(merge, harm, what):
    backbone = adapted(BRANCHES["moss"])
    harm(backbone)
    before = {key: value.clone() for key, value in backbone.decoder.state_dict().items()}
    with pytest.raises(AdapterError, match=what) as caught:
        merge(backbone.decoder)
    assert caught.value.fix
    after = backbone.decoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)


def test_what_cannot_be_merged_says_so():
    with pytest.raises(AdapterError, match="GELU") as caught:
        split_weights(adapted(SAM).decoder)
    assert "merge_text" in caught.value.fix
    with pytest.raises(AdapterError, match="third weight"):
        split_weights(adapted({**BRANCHES["moss"], "context_images": "none"}).decoder)
    with pytest.raises(AdapterError, match="no text branch"):
        merge_text(adapted(BRANCHES["no text"]).decoder)
    with pytest.raises(AdapterError, match="no adapter 'second'") as caught:
        merge_text(adapted(BRANCHES["moss"]).decoder, "second")
    assert caught.value.fix == "it has default"
    with pytest.raises(AdapterError, match="no adapter"):
        merge_text(nn.Linear(2, 2))


@pytest.mark.parametrize("call", [
    lambda model: model.merge_adapter(),
    lambda model: model.merge_and_unload(),
    lambda model: wrapped(model)[0].merge(),
])  # fmt: skip
def test_a_plain_merge_is_refused_and_says_what_is_possible(call):
    model = adapted(BRANCHES["moss"], target_modules=["down_proj"], modules_to_save=["q_norm"]).decoder
    before = list(model.named_modules())
    with pytest.raises(AdapterError, match="cannot be merged into one weight") as caught:
        call(model)
    assert "merge_text(model)" in caught.value.fix and "split_weights(model)" in caught.value.fix
    # PEFT comes to the modules to save before it comes to the layers
    assert list(model.named_modules()) == before


@pytest.mark.parametrize("merge", [merge_text, split_weights])
def test_modules_that_were_trained_whole_stay(merge):
    backbone, layout = adapted(BRANCHES["moss"], modules_to_save=["norm"]), lay_out(TEXT)
    nn.init.normal_(backbone.decoder.get_base_model().norm.modules_to_save["default"].weight)
    expected = hidden(backbone, layout)
    backbone.decoder = merge(backbone.decoder)
    if merge is merge_text:
        backbone.routing = None
    torch.testing.assert_close(hidden(backbone, layout), expected, rtol=0, atol=1e-10)


def test_other_adapters_leave_nothing_behind():
    backbone, layout = adapted(BRANCHES["moss"], target_modules=["q_proj"]), lay_out(TEXT)
    expected = hidden(backbone, layout)
    backbone.decoder.add_adapter("second", MossConfig(text=LINEAR, image=None, target_modules=["q_proj", "o_proj"]))
    for layer in wrapped(backbone.decoder):
        if "second" in layer.moss_text_B:
            nn.init.normal_(layer.moss_text_B["second"])
    backbone.decoder, backbone.routing = merge_text(backbone.decoder), None
    torch.testing.assert_close(hidden(backbone, layout), expected, rtol=0, atol=1e-10)


STOCK = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
with torch.no_grad():
    out = model(torch.arange(12).view(2, 6)).logits
save_file({"out": out.contiguous()}, sys.argv[3])
assert not [name for name in sys.modules if name.partition(".")[0] == "weft"]
"""

CHOICES = {
    "pictures stay behind": {
        "text": Branch(3, 6.0), "image": Branch(5, 5.0, kernel=2), "modules_to_save": ["lm_head"],
        "patterns": {r"0\.mlp": {"text": {"rank": 5}}, "o_proj": {"text": {"alpha": 0.7, "scaling": "raw"}},
                     r"1\.self_attn\.v_proj": {"text": None}, "k_proj": {"text": {"scaling": "sqrt_rank"}}},
    },
    "root of the rank": {
        "text": Branch(3, 1.5, scaling="sqrt_rank"), "image": "text",
        "patterns": {"q_proj": {"text": {"rank": 6, "alpha": 2.5}}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=() if k == "root of the rank" else pytest.mark.slow) for k in CHOICES]
)
def test_stock_peft_loads_the_export_without_weft_and_gives_the_same_on_text(name, llama, tmp_path):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama), MossConfig(**CHOICES[name])).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for key, p in model.named_parameters() if ".moss_" in key or "modules_to_save" in key):
        nn.init.normal_(parameter, std=0.1, generator=generator)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad(), routing_of(model).text_only():
        expected = model(ids).logits
    with torch.no_grad(), model.disable_adapter():
        assert (model(ids).logits - expected).abs().max() > 0.1
    export_text_lora(model, tmp_path / "lora")
    out = tmp_path / "out.safetensors"
    run = [sys.executable, "-c", STOCK, str(llama), str(tmp_path / "lora"), str(out)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # not bit by bit: PEFT scales what leaves the up-projection, we scale what enters it
    torch.testing.assert_close(load_file(out)["out"], expected, rtol=0, atol=1e-6)


def test_the_exported_configuration_says_each_layer_once(llama, tmp_path):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama), MossConfig(**CHOICES["pictures stay behind"]))
    export_text_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 3, 6.0, False)
    assert config["modules_to_save"] == ["lm_head"]
    assert set(config["rank_pattern"].values()) == {5} and len(config["rank_pattern"]) == 3
    alphas = {key.rpartition(".")[2]: alpha for key, alpha in config["alpha_pattern"].items()}
    assert alphas == pytest.approx({"o_proj": 0.7 * 3, "k_proj": 6 * 3**0.5})
    assert r"model\.layers\.0\.self_attn\.v_proj" in config["target_modules"]
    assert r"model\.layers\.1\.self_attn\.v_proj" not in config["target_modules"]
    root = get_peft_model(LlamaForCausalLM.from_pretrained(llama), MossConfig(**CHOICES["root of the rank"]))
    export_text_lora(root, tmp_path / "root")
    config = json.loads((tmp_path / "root" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["lora_alpha"] == 1.5
    assert config["target_modules"] == sorted(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )


@pytest.mark.parametrize("name, what", [("two full sets", "full update"), ("no text", "no text branch")])
def test_what_is_no_lora_is_not_exported(name, what, tmp_path):
    with pytest.raises(AdapterError, match=what):
        export_text_lora(adapted(BRANCHES[name]).decoder, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
