"""The resampler against a second computation, and against tensors of the released code where they are at hand."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weft.codecs.resampler import Resampler, ResamplerConfig
from weft.errors import UsageError

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "perceiver"
SMALL = ResamplerConfig(queries=3, width=6, source_width=5, layers=3, cross_every=2, heads=2, mlp=7)
KEEP = torch.tensor([[True, True, False, False], [True, True, True, True]])
RENAMES = {
    r"^blip2qformer\.layernorm\.": "norm.",
    r"^blip2qformer\.encoder\.layer\.": "layers.",
    r"attention\.(attention|output)\.": "attention.",
    r"LayerNorm\.": "norm.",
    r"intermediate_query\.dense\.": "mlp.fc1.",
    r"output_query\.dense\.": "mlp.fc2.",
    r"output_query\.": "mlp.",
}
"""Released keys -> ours, applied in this order."""


def our_key(key):
    for released, ours in RENAMES.items():
        key = re.sub(released, ours, key)
    return key


def small(**changes):
    torch.manual_seed(0)
    resampler = Resampler(SMALL.model_copy(update=changes)).double().eval()
    for parameter in resampler.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return resampler


def by_hand(state, config, source, keep):
    """One row, one layer and one head after another."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attention(x, read, name):
        q, k, v = linear(x, f"{name}.query"), linear(read, f"{name}.key"), linear(read, f"{name}.value")
        size, heads = config.width // config.heads, []
        for h in range(config.heads):
            part = slice(h * size, (h + 1) * size)
            one_q, one_k = q[:, part], k[:, part]
            if config.qk_norm:
                one_q, one_k = norm(one_q, f"{name}.q_norm"), norm(one_k, f"{name}.k_norm")
            heads.append((one_q @ one_k.T / math.sqrt(size)).softmax(-1) @ v[:, part])
        return norm(linear(torch.cat(heads, -1), f"{name}.dense") + x, f"{name}.norm")

    rows = []
    for one, kept in zip(source, keep, strict=True):
        x = norm(state["queries"][0], "norm")
        for i in range(config.layers):
            x = attention(x, x, f"layers.{i}.attention")
            if i % config.cross_every == 0:
                x = attention(x, one[kept], f"layers.{i}.crossattention")
            inner = linear(x, f"layers.{i}.mlp.fc1")
            inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
            x = norm(linear(inner, f"layers.{i}.mlp.fc2") + x, f"layers.{i}.mlp.norm")
        rows.append(x)
    return torch.stack(rows)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("cross_every", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_the_resampler_is_what_its_equations_say(qk_norm, cross_every, masked):
    resampler = small(qk_norm=qk_norm, cross_every=cross_every)
    source = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    cot = torch.randn(2, 3, 6, dtype=torch.float64)
    state = dict(resampler.named_parameters())
    out = resampler(source, KEEP if masked else None)
    wanted = by_hand(state, resampler.config, source, KEEP if masked else torch.ones_like(KEEP))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-11)
    inputs = [source, *state.values()]
    for made, other in zip(
        torch.autograd.grad((out * cot).sum(), inputs), torch.autograd.grad((wanted * cot).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(made, other, rtol=1e-9, atol=1e-10)


def test_what_is_not_kept_changes_nothing():
    resampler, source = small(), torch.randn(2, 4, 5, dtype=torch.float64)
    changed = torch.where(KEEP.unsqueeze(2), source, 1e6)
    assert torch.equal(resampler(changed, KEEP), resampler(source, KEEP))


def test_a_row_that_keeps_nothing_reads_zero_and_disturbs_no_other():
    resampler, source = small(), torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    out = resampler(source, torch.tensor([[False], [True]]).expand(2, 4))
    assert out.isfinite().all()
    torch.testing.assert_close(out[1:], resampler(source[1:]), rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(out.sum(), source)
    assert grad[0].eq(0).all() and grad.isfinite().all()


def test_norms_hold_in_float16():
    """Its smallest number is larger than their epsilon, and the squares of what they are given may be smaller still."""
    resampler = small()
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 1e-4, 0.0, 2e-4, 0.0, 0.0]])
    norm = resampler.norm.float()
    wanted = norm(x.half().float())
    torch.testing.assert_close(norm.half()(x.half()).float(), wanted, rtol=2e-2, atol=2e-3)
    assert resampler.half()(torch.randn(2, 4, 5).half()).isfinite().all()


def test_dropout_acts_in_training_alone():
    resampler, source = small(dropout=0.1), torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(resampler(source), small()(source), rtol=0, atol=0)
    resampler.train()
    assert not torch.allclose(resampler(source), resampler(source))


def test_a_new_one_starts_small():
    resampler = Resampler(ResamplerConfig(layers=1))
    assert abs(resampler.queries.std().item() - 0.02) < 1e-3
    assert abs(resampler.layers[0].crossattention.key.weight.std().item() - 0.02) < 1e-3
    assert all(not p.any() for name, p in resampler.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    "source, keep",
    [
        (torch.zeros(2, 4, 6), None),
        (torch.zeros(4, 5), None),
        (torch.zeros(2, 4, 5), torch.ones(2, 3, dtype=torch.bool)),
        (torch.zeros(2, 4, 5), torch.ones(2, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(source, keep):
    with pytest.raises(UsageError, match=r"\(2, |\(4, 5\)"):
        small()(source, keep)


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="no multiple of heads 5"):
        ResamplerConfig(heads=5)


@pytest.mark.parametrize(
    "config, tensors, millions",
    [
        (ResamplerConfig(), 327, 101.65),
        (ResamplerConfig(queries=77, width=1024, source_width=5120, layers=1, heads=16, qk_norm=False), 29, 23.17),
    ],
)
def test_the_released_sizes(config, tensors, millions):
    with torch.device("meta"):
        resampler = Resampler(config)
    assert len(resampler.state_dict()) == tensors
    assert round(sum(p.numel() for p in resampler.parameters()) / 1e6, 2) == millions


def golden_resampler(suffix):
    values = json.loads((GOLDEN / "config.json").read_text())
    if suffix:
        values |= values["weights_other_norm"]
    config = ResamplerConfig(
        queries=values["num_queries"], width=values["hidden_size"], source_width=values["encoder_hidden_size"],
        layers=values["num_hidden_layers"], cross_every=values["cross_attention_frequency"],
        heads=values["num_attention_heads"], mlp=values["intermediate_size"], qk_norm=values["qk_normalization"],
    )  # fmt: skip
    resampler = Resampler(config).double().eval()
    stored = load_file(GOLDEN / f"weights{suffix}.safetensors")
    resampler.load_state_dict({our_key(key): tensor for key, tensor in stored.items()})
    return resampler


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the tensors of the released code are not at hand")
@pytest.mark.parametrize("suffix", ["", "_other_norm"])
@pytest.mark.parametrize("case", ["masked", "nomask"])
def test_the_resampler_gives_the_released_tensors_and_gradients(case, suffix):
    stored = load_file(GOLDEN / f"case_{case}{suffix}.safetensors")
    source, keep = stored["in.encoder_hidden_states"], stored.get("in.encoder_attention_mask")
    keep = None if keep is None else keep.bool()
    resampler = golden_resampler(suffix)

    out = resampler(source.requires_grad_(), keep)
    torch.testing.assert_close(out, stored["out.last_hidden_state"], rtol=1e-9, atol=1e-10)

    (out * stored["cot.last_hidden_state"]).sum().backward()
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(source.grad, stored["grad.encoder_hidden_states"], **close)
    grads = {our_key(k.removeprefix("grad.param.")): v for k, v in stored.items() if k.startswith("grad.param.")}
    found = {name: parameter.grad for name, parameter in resampler.named_parameters()}
    torch.testing.assert_close(found, grads, **close)

    single = resampler.float()(source.detach().float(), keep)
    torch.testing.assert_close(single.double(), stored["out.last_hidden_state"], rtol=0, atol=5e-5)
