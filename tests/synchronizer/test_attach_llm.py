"""Synchronisers in a LLaMA: by hooks that leave no trace, and as in the released model where tensors of it exist."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2Model,
    GraniteConfig,
    GraniteModel,
    LlamaConfig,
    LlamaModel,
    Olmo2Config,
    Olmo2Model,
)

from weft.errors import RoutingError, UsageError
from weft.synchronizer.attach_llm import DecoderSyncConfig, attach_to_decoder
from weft.synchronizer.mmfs import FeatureBank

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "llama_mmfs"
SHAPES = ((3, 3), (2, 2))
CONFIG = DecoderSyncConfig(
    every=2, feature_width=6, value_width=8, heads=2, points=3, sides=(3, 2), base=2, max_images=4, offset_init=1.0
)
RENAMES = {".llama_cross_attn.": ".", "model.layers.": "branches.", ".norm1.": ".query_norm.", ".norm2.": ".feat_norm."}
RENAMES |= {".attn.": ".mmfs."}
"""Parts of released keys -> of ours."""


def our_key(key):
    for released, ours in RENAMES.items():
        key = key.replace(released, ours)
    return key


def llama(layers=3, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **changes,
    )  # fmt: skip
    return LlamaModel(config).eval()


def attached(decoder, config=CONFIG, trained=True):
    torch.manual_seed(1)
    insertion = attach_to_decoder(decoder, config)
    if trained:
        for parameter in insertion.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return insertion


@pytest.fixture
def embeds():
    torch.manual_seed(2)
    return torch.randn(2, 7, 16)


@pytest.fixture
def bank():
    torch.manual_seed(3)
    return FeatureBank(torch.randn(2, 3, 13, 6), SHAPES)


@pytest.fixture
def visible():
    """The second sequence sees nothing before its fourth position, and never its third picture."""
    begins = torch.tensor([[0, 2, 5], [3, 4, 99]])
    return begins.unsqueeze(1) <= torch.arange(7).view(1, 7, 1)


def run(decoder, embeds, **more):
    return decoder(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state


def test_a_fresh_insertion_and_its_removal_change_no_bit(embeds, bank, visible):
    decoder = llama()
    plain, keys = run(decoder, embeds), decoder.state_dict().keys()
    insertion = attached(decoder, trained=False)
    insertion.set(bank, visible)
    assert torch.equal(run(decoder, embeds), plain)
    for branch in insertion.branches.values():
        branch.gate.data.fill_(0.7)
    assert not torch.allclose(run(decoder, embeds), plain, atol=1e-2)
    assert decoder.state_dict().keys() == keys
    insertion.detach()
    assert torch.equal(run(decoder, embeds), plain)


def test_the_branch_comes_between_attention_and_mlp(embeds, bank, visible):
    """Layer by layer with the layer's own parts, in float64."""
    decoder, embeds = llama().double(), embeds.double()
    insertion = attached(decoder).double()
    bank = FeatureBank(bank.features.double(), SHAPES)
    insertion.set(bank, visible)
    got = run(decoder, embeds)
    insertion.detach()
    h, angles = embeds, decoder.rotary_emb(embeds, torch.arange(7).unsqueeze(0))
    for number, layer in enumerate(decoder.layers):
        h = h + layer.self_attn(layer.input_layernorm(h), angles, None, is_causal=True)[0]
        if number % 2 == 0:
            branch = insertion.branches[str(number)]
            features = FeatureBank(branch.feat_norm(bank.features), SHAPES)
            read = branch.mmfs(branch.query_norm(h), features, visible, torch.full((1, 1, 2), 0.5))
            h = h + torch.tanh(branch.gate) * read
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    torch.testing.assert_close(got, decoder.norm(h), rtol=0, atol=1e-12)


def test_where_nothing_is_seen_nothing_is_added(embeds, bank, visible):
    decoder = llama()
    plain = run(decoder, embeds)
    insertion = attached(decoder)
    insertion.set(bank, visible)
    with_pictures = run(decoder, embeds)
    assert torch.equal(with_pictures[1, :3], plain[1, :3])
    assert not torch.isclose(with_pictures[1, 3:], plain[1, 3:]).all(1).any()
    insertion.set(bank, torch.zeros_like(visible))
    assert torch.equal(run(decoder, embeds), plain)
    insertion.set_without_pictures()
    assert torch.equal(run(decoder, embeds), plain)


def test_no_output_moves_with_a_later_picture(embeds, bank, visible):
    decoder = llama()
    insertion = attached(decoder)
    insertion.set(bank, visible)
    before = run(decoder, embeds)
    bank.features[0, 2] += 1.0
    insertion.set(bank, visible)
    after = run(decoder, embeds)
    assert torch.equal(after[0, :5], before[0, :5]) and torch.equal(after[1], before[1])
    assert not torch.isclose(after[0, 5:], before[0, 5:]).all(1).any()


def test_cached_decoding_with_kept_values_is_the_full_pass(embeds, bank, visible):
    decoder = llama()
    insertion = attached(decoder)
    visible = visible.clone()
    visible[:, 4:] = visible[:, 3:4]  # no picture begins after the prompt of four positions
    insertion.set(bank, visible)
    full = run(decoder, embeds)
    calls = []
    insertion.branches["0"].mmfs.value_proj.register_forward_hook(lambda *_: calls.append(1))
    kept, cache = insertion.project(bank), DynamicCache(config=decoder.config)
    insertion.set(kept, visible[:, :4])
    steps = [decoder(inputs_embeds=embeds[:, :4], past_key_values=cache, use_cache=True).last_hidden_state]
    insertion.set(kept, visible[:, 3:4])
    for t in range(4, 7):
        steps.append(decoder(inputs_embeds=embeds[:, t : t + 1], past_key_values=cache).last_hidden_state)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=2e-6)  # float32 sums in another order
    assert len(calls) == 1


def checkpoint(decoder, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        decoder.gradient_checkpointing_enable({"use_reentrant": reentrant})


def gradients(decoder, insertion, embeds, bank, visible, checkpointing=None):
    decoder.train().requires_grad_(False)
    if checkpointing is not None:
        checkpoint(decoder, checkpointing)
    features, embeds = bank.features.clone().requires_grad_(), embeds.clone().requires_grad_()
    insertion.zero_grad()
    insertion.set(FeatureBank(features, SHAPES), visible)
    (run(decoder, embeds) * torch.linspace(-1, 1, 7 * 16).view(7, 16)).sum().backward()
    assert all(parameter.grad is None for parameter in decoder.parameters())
    found = {name: parameter.grad.clone() for name, parameter in insertion.named_parameters()}
    return found | {"features": features.grad, "embeds": embeds.grad}


@pytest.mark.parametrize("reentrant", [True, False])
def test_only_the_insertion_trains_and_checkpointing_gives_the_same_gradients(embeds, bank, visible, reentrant):
    decoder = llama()
    insertion = attached(decoder)
    plain = gradients(decoder, insertion, embeds, bank, visible)
    assert all(grad.any() for grad in plain.values())
    calls = []
    insertion.branches["2"].mmfs.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(decoder, insertion, embeds, bank, visible, checkpointing=reentrant)
    assert len(calls) == 2  # it was run again
    for name, grad in plain.items():  # layers add theirs to the features' gradient in another order
        torch.testing.assert_close(again[name], grad, rtol=0, atol=1e-6 if name == "features" else 0, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_very_first_forward_may_be_checkpointed(embeds, bank, visible, reentrant):
    plain, again = (
        gradients(decoder, attached(decoder), embeds, bank, visible, checkpointing=form)
        for decoder, form in ((llama(), None), (llama(), reentrant))
    )
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=0, atol=1e-6 if name == "features" else 0, msg=name)


def test_an_encoder_is_trained_through_checkpointed_layers_that_are_not_reentrant(embeds, bank, visible):
    decoder, encoder = llama(), torch.nn.Linear(6, 6)
    insertion = attached(decoder)
    found = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            checkpoint(decoder.train(), reentrant)
        encoder.zero_grad()
        insertion.set(FeatureBank(encoder(bank.features), SHAPES), visible)
        out = run(decoder, embeds.clone().requires_grad_())
        if reentrant:
            with pytest.raises(RoutingError, match="use_reentrant=False"):
                out[..., 0].sum().backward()
        else:
            out[..., 0].sum().backward()
            found.append(encoder.weight.grad.clone())
    assert found[0].any()
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_never_reads_what_a_later_forward_reads(embeds, bank, visible, reentrant):
    decoder = llama().train()
    insertion = attached(decoder)
    checkpoint(decoder, reentrant)
    losses = []
    for _ in range(2):
        insertion.set(bank, visible)
        losses.append(run(decoder, embeds.clone().requires_grad_()).square().sum())
    with pytest.raises(RoutingError, match="a later one"):
        losses[0].backward()


def test_it_is_saved_alone_and_loaded_strictly(embeds, bank, visible, tmp_path):
    decoder = llama()
    insertion = attached(decoder)
    insertion.set(bank, visible)
    wanted = run(decoder, embeds)
    save_file(insertion.state_dict(), tmp_path / "sync.safetensors")
    insertion.detach()
    other = attached(decoder, trained=False)
    other.load_state_dict(load_file(tmp_path / "sync.safetensors"), strict=True)
    other.set(bank, visible)
    assert torch.equal(run(decoder, embeds), wanted)


def test_a_frozen_half_precision_base_takes_a_float32_insertion(embeds, bank, visible):
    decoder = llama().bfloat16()
    plain = run(decoder, embeds.bfloat16())
    insertion = attached(decoder, trained=False)
    insertion.set(bank, visible)
    assert torch.equal(run(decoder, embeds.bfloat16()), plain)


def test_what_was_not_set_or_is_of_another_size_raises(embeds, bank, visible):
    decoder = llama()
    insertion = attached(decoder)
    with pytest.raises(RoutingError, match="without being told what to read"):
        run(decoder, embeds)
    with pytest.raises(RoutingError, match=r"\(B, N\) are \(2, 3\)"):
        insertion.set(bank, visible[:, :, :2])
    insertion.set(bank, visible)
    for wrong in (embeds[:, :6], embeds[:1], embeds[:, :1]):
        with pytest.raises(RoutingError, match="was set for 2 x 7 queries"):
            run(decoder, wrong)
    insertion.detach()
    other = attached(decoder)
    with pytest.raises(RoutingError, match="without being told what to read"):
        run(decoder, embeds)
    other.set(bank, visible)
    run(decoder, embeds)


SIZES = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def test_models_without_such_layers_are_refused():
    with pytest.raises(UsageError, match="Linear has no list of layers"):
        attach_to_decoder(torch.nn.Linear(1, 1), CONFIG)
    with pytest.raises(UsageError, match="Olmo2DecoderLayer has no input_layernorm"):
        attach_to_decoder(Olmo2Model(Olmo2Config(**SIZES, pad_token_id=0, eos_token_id=1)), CONFIG)


class NormAfterAttention(torch.nn.Module):
    """As in some layers of Chameleon."""

    def __init__(self, like):
        super().__init__()
        self.self_attn, self.input_layernorm = like.self_attn, like.input_layernorm
        self.post_attention_layernorm = like.post_attention_layernorm

    def forward(self, x, **given):
        return x + self.post_attention_layernorm(self.input_layernorm(self.self_attn(x, **given)[0]))


def norms_after():
    decoder = llama()
    decoder.layers[0] = NormAfterAttention(decoder.layers[0])
    return decoder


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Gemma2Model(Gemma2Config(**SIZES, head_dim=4)), "attention is not simply added"),
        (lambda: GraniteModel(GraniteConfig(**SIZES, residual_multiplier=0.5)), "attention is not simply added"),
        (norms_after, "no residual is known"),
    ],
)
def test_layers_that_only_look_alike_raise_in_the_first_forward(embeds, bank, visible, make, what):
    decoder = make().eval()
    attached(decoder).set(bank, visible)
    with pytest.raises(UsageError, match=what):
        run(decoder, embeds)


def test_a_copied_decoder_has_its_own_insertion(embeds, bank, visible):
    decoder = llama()
    insertion = attached(decoder)
    insertion.set(bank, visible)
    wanted = run(decoder, embeds)
    both = copy.deepcopy((decoder, insertion))
    insertion.detach()
    assert torch.equal(run(both[0], embeds), wanted)


needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden tensors in {GOLDEN}")


@pytest.fixture
def released():
    """(decoder, insertion, logits of the text head) with the weights of the golden folder."""
    weights, c = load_file(GOLDEN / "weights.safetensors"), json.loads((GOLDEN / "config.json").read_text())
    decoder = LlamaModel(
        LlamaConfig(
            vocab_size=c["txt_vocab_size"], pad_token_id=None, bos_token_id=None, eos_token_id=None,
            **{key: c[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                       "max_position_embeddings", "rms_norm_eps", "hidden_act")},
        )
    ).eval()  # fmt: skip
    sync = DecoderSyncConfig(
        every=c["cross_attention_frequency"], feature_width=c["image_embed_dim"], value_width=c["image_embed_dim"],
        sides=c["spatial_shapes"], without_images="bias",
    )  # fmt: skip
    insertion = attach_to_decoder(decoder, sync)
    inserted = {our_key(key): weights.pop(key) for key in list(weights) if "llama_cross_attn" in key}
    insertion.load_state_dict(inserted, strict=True)
    stack = {key.removeprefix("model."): weights.pop(key) for key in list(weights) if key.startswith("model.")}
    decoder.load_state_dict(stack, strict=True)

    def text_logits(hidden):
        head = {key.removeprefix("text_decoder."): weight for key, weight in weights.items()}
        new = F.linear(hidden, head["head_new.weight"], head["head_new.bias"])
        return F.linear(hidden, head["head.weight"], head["head.bias"]) + F.pad(new, (c["vocab_size"], 0))

    return decoder, insertion, text_logits


def golden_bank(features):
    return FeatureBank(features, ((8, 8), (4, 4), (2, 2)))


def is_close_in(real, got, wanted):
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-4, atol=5e-5)


@needs_golden
@pytest.mark.parametrize(
    "case", ["right_padded", "left_padded_position_ids", "left_padded_default_positions", "text_only"]
)
def test_a_released_model_gives_its_outputs_and_gradients(released, case):
    decoder, insertion, text_logits = released
    case = load_file(GOLDEN / f"case_{case}.safetensors")
    embeds = case["in.inputs_embeds"].requires_grad_()
    features = case.get("in.vision_hidden_states")
    if features is None:
        insertion.set_without_pictures()
    else:
        insertion.set(golden_bank(features.requires_grad_()), case["in.cross_attention_mask"] > 0)
    out = decoder(
        inputs_embeds=embeds, attention_mask=case["in.attention_mask"], position_ids=case.get("in.position_ids"),
        use_cache=False, output_hidden_states=True,
    )  # fmt: skip
    real, logits = case["in.attention_mask"].bool(), text_logits(out.last_hidden_state)
    for number, hidden in enumerate(out.hidden_states):
        is_close_in(real, hidden, case[f"out.hidden_states.{number}"])
    is_close_in(real, logits, case["out.text_decoder_logits"])
    (logits * case["cot.text_decoder_logits"])[real].sum().backward()
    found = {f"grad.param.{name}": parameter.grad for name, parameter in insertion.named_parameters()}
    found |= {"grad.inputs_embeds": embeds.grad, "grad.vision_hidden_states": getattr(features, "grad", None)}
    for key in (key for key in case if key.startswith("grad.")):
        wanted = case[key]
        torch.testing.assert_close(found[our_key(key)], wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())


@needs_golden
def test_a_released_model_decodes_step_by_step(released):
    decoder, insertion, text_logits = released
    table = decoder.embed_tokens.weight
    case = load_file(GOLDEN / "case_incremental.safetensors")
    mask, positions = case["in.attention_mask"], case["in.position_ids"]
    visible = case["in.cross_attention_mask"] > 0
    kept = insertion.project(golden_bank(case["in.vision_hidden_states"]))

    def prompt():
        insertion.set(kept, visible)
        cache = DynamicCache(config=decoder.config)
        out = decoder(
            inputs_embeds=case["in.inputs_embeds"], attention_mask=mask, position_ids=positions, past_key_values=cache
        )
        insertion.set(kept, visible[:, -1:])
        return cache, out.last_hidden_state

    def step(cache, ids, t):
        return decoder(
            inputs_embeds=table[ids].unsqueeze(1), attention_mask=F.pad(mask, (0, t), value=1),
            position_ids=positions[:, -1:] + t, past_key_values=cache,
        ).last_hidden_state  # fmt: skip

    cache, hidden = prompt()
    is_close_in(mask.bool(), hidden, case["out.prefill_last_hidden_state"])
    for t in range(3):
        hidden = step(cache, case["in.next_token_ids"][:, t], t + 1)
        torch.testing.assert_close(hidden, case[f"out.step{t}_last_hidden_state"], rtol=1e-4, atol=5e-5)

    cache, hidden = prompt()
    ids = case["out.greedy_ids"][:, 1:]
    for t in range(6):
        logits = text_logits(hidden[:, -1])
        torch.testing.assert_close(logits, case["out.greedy_logits"][:, t], rtol=1e-4, atol=5e-5)
        assert torch.equal(logits.argmax(1), ids[:, t])
        hidden = step(cache, ids[:, t], t + 1)
