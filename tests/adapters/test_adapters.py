"""Adapters on a backbone: identity at first, exact when cached, whole when saved."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from weft.adapters import (
    AdapterConfig,
    RingCache,
    adapter_parameters,
    attach,
    detach,
    load_adapter,
    routing_of,
    save_adapter,
)
from weft.backbones.base import DecodeStep
from weft.backbones.tiny import load
from weft.config import load_config
from weft.errors import AdapterError, ConfigError, RoutingError
from weft.layout import ImageSpan, TextSpan, lay_out

PICTURE = ImageSpan(2, 2)
BATCHES = {
    "text only": [[TextSpan(7)], [TextSpan(4)]],
    "several pictures": [[TextSpan(2), PICTURE, TextSpan(3), PICTURE, TextSpan(2)], [TextSpan(9)]],
    "first and last": [[TextSpan(1), PICTURE, TextSpan(2)], [TextSpan(3), PICTURE]],
    "adjacent": [[TextSpan(1), PICTURE, TextSpan(2), PICTURE, TextSpan(1)], [TextSpan(2), PICTURE, PICTURE]],
    "unfinished": [[TextSpan(2), ImageSpan(2, 2, present=3)], [TextSpan(2), ImageSpan(2, 2, present=0)]],
}
KINDS = ["lora", "moe_lora", "moss"]


def adapted(kind: str, *, kernel: int = 2, dropout: float = 0.0):
    backbone = load("nano")
    settings = {"kind": kind, "rank": 4, "dropout": dropout} | ({"kernel": kernel} if kind == "moss" else {})
    attach(backbone, AdapterConfig(**settings), seed=1)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter_parameters(backbone).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    backbone.eval()
    return backbone


def ids_for(layout):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(6, 250, layout.shape, generator=generator)


@torch.no_grad()
def run(backbone, layout, ids=None):
    ids = ids_for(layout) if ids is None else ids
    return backbone.head(backbone.forward(backbone.embed(ids, layout), layout))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_removing_one_restores_the_base(kind):
    backbone = load("nano")
    layout = lay_out(BATCHES["several pictures"])
    before = run(backbone, layout)
    attach(backbone, AdapterConfig(kind=kind, rank=4))
    assert torch.equal(run(backbone, layout), before)
    for parameter in adapter_parameters(backbone).values():
        torch.nn.init.normal_(parameter)
    assert not torch.allclose(run(backbone, layout), before, atol=1e-2)
    detach(backbone)
    assert torch.equal(run(backbone, layout), before)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("kind,kernel", [("lora", 1), ("moe_lora", 1), ("moss", 2), ("moss", 3)])
@torch.no_grad()
def test_step_by_step_equals_the_full_pass(kind, kernel, name, left):
    backbone = adapted(kind, kernel=kernel)
    layout = lay_out(BATCHES[name], left=left)
    ids, batch = ids_for(layout), layout.shape[0]
    full = run(backbone, layout, ids)
    real, positions = layout.is_real, (layout.is_real.cumsum(1) - 1).clamp_min(0)
    cache, rings, slots, steps = DynamicCache(), RingCache(batch + 1, columns=2), torch.arange(batch) + 1, []
    for t in range(layout.shape[1]):
        now = layout[t : t + 1]
        starts = (now.outputs.row == 0) & (now.outputs.col == 0)
        rings.reset((starts[:, 0].nonzero().squeeze(1) + 1).tolist())
        mask = real[:, None, None, : t + 1].clone()
        mask[..., t] = True  # a padding position attends to itself: no row of a softmax is empty
        step = DecodeStep(slots, positions[:, t : t + 1], mask, cache, rings)
        hidden = backbone.forward(backbone.embed(ids[:, t : t + 1], now), now, step)
        steps.append(backbone.head(hidden))
    cached = torch.cat(steps, 1)
    torch.testing.assert_close(cached[real], full[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_element_changes_no_earlier_output(kind):
    backbone = adapted(kind)
    layout = lay_out(BATCHES["several pictures"])
    ids = ids_for(layout)
    full = run(backbone, layout, ids)
    for cut in range(1, layout.shape[1]):
        changed = ids.clone()
        changed[:, cut:] = ids[:, cut:].flip(1) + 1
        torch.testing.assert_close(run(backbone, layout, changed)[:, :cut], full[:, :cut], rtol=0, atol=1e-5)


def test_batched_equals_alone():
    backbone = adapted("moss")
    layout = lay_out(BATCHES["several pictures"])
    ids = ids_for(layout)
    full = run(backbone, layout, ids)
    for row, spans in enumerate(BATCHES["several pictures"]):
        alone = lay_out([spans])
        n = alone.shape[1]
        torch.testing.assert_close(run(backbone, alone, ids[row : row + 1, :n])[0], full[row, :n], rtol=0, atol=1e-5)


def losses_at(backbone, layout, chosen):
    hidden = backbone.forward(backbone.embed(ids_for(layout), layout), layout)
    backbone.head(hidden)[chosen].square().sum().backward()


def test_one_layer_routes_gradients_to_the_branch_of_the_output_modality_only():
    backbone = adapted("moss")
    layout = lay_out(BATCHES["several pictures"])
    layer = backbone.decoder.base_model.model.layers[-1].mlp.down_proj  # nothing mixes positions after it
    for modality, own, other in ((1, "text", "image"), (2, "image", "text")):
        backbone.zero_grad()
        losses_at(backbone, layout, layout.outputs.modality == modality)
        assert getattr(layer, f"moss_{own}_A")["default"].grad.abs().max() > 0
        assert getattr(layer, f"moss_{other}_A")["default"].grad.abs().max() == 0


def test_a_batch_without_pictures_leaves_zero_gradients_not_missing_ones():
    backbone = adapted("moss")
    layout = lay_out(BATCHES["text only"])
    losses_at(backbone, layout, layout.is_real)
    for name, parameter in adapter_parameters(backbone).items():
        assert parameter.grad is not None, name
        assert ("image" in name) == (parameter.grad.abs().max().item() == 0), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    def gradients(checkpointed: bool):
        backbone = adapted("moss")
        if checkpointed:
            backbone.decoder.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        backbone.train()
        layout = lay_out(BATCHES["several pictures"])
        embeds = backbone.embed(ids_for(layout), layout).requires_grad_()
        backbone.head(backbone.forward(embeds, layout)).square().mean().backward()
        return {name: parameter.grad for name, parameter in adapter_parameters(backbone).items()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_only_the_adapter_is_trainable():
    backbone = adapted("moss")
    trainable = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert trainable and all(".moss_" in name for name in trainable)


def test_moe_lora_is_moss_with_kernel_one():
    layout = lay_out(BATCHES["several pictures"])
    assert torch.equal(run(adapted("moe_lora"), layout), run(adapted("moss", kernel=1), layout))


def test_an_adapted_decoder_without_a_layout_raises():
    backbone = adapted("moss")
    routing_of(backbone.decoder).routes = None
    with pytest.raises(RoutingError, match="without the layout"):
        backbone.decoder(inputs_embeds=torch.zeros(1, 3, 32))


RELOAD = """
import sys, torch
from weft.adapters import load_adapter
from weft.backbones.tiny import load
from weft.layout import ImageSpan, TextSpan, lay_out
torch.set_num_threads(1)
backbone = load("nano"); load_adapter(backbone, sys.argv[1])
layout = lay_out([[TextSpan(2), ImageSpan(2, 2), TextSpan(3), ImageSpan(2, 2), TextSpan(2)], [TextSpan(9)]])
ids = torch.randint(6, 250, layout.shape, generator=torch.Generator().manual_seed(3))
with torch.no_grad():
    out = backbone.head(backbone.forward(backbone.embed(ids, layout), layout))
from safetensors.torch import save_file
save_file({"out": out.contiguous()}, sys.argv[2])
"""


@pytest.mark.slow
def test_saved_and_loaded_in_a_fresh_process_gives_equal_outputs(tmp_path):
    backbone = adapted("moss")
    save_adapter(backbone, tmp_path)
    out = tmp_path / "out.safetensors"
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path), str(out)], check=True, capture_output=True)
    assert torch.equal(load_file(out)["out"], run(backbone, lay_out(BATCHES["several pictures"])))


@pytest.mark.slow
def test_saved_bytes_do_not_depend_on_the_process(tmp_path):
    folders = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        script = (
            "import sys; from pathlib import Path; from weft.adapters import *; from weft.backbones.tiny import load\n"
            "b = load('nano'); attach(b, AdapterConfig(rank=2)); save_adapter(b, Path(sys.argv[1]))"
        )
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True, env=env)
        folders.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert folders[0] == folders[1]


def damaged(tmp_path, change):
    backbone = adapted("moss")
    save_adapter(backbone, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    fresh = load("nano")
    with pytest.raises(AdapterError) as caught:
        load_adapter(fresh, tmp_path)
    return str(caught.value)


def test_a_folder_without_its_convolution_does_not_load(tmp_path):
    message = damaged(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if "moss_image" not in k})
    assert "layers.0.mlp.down_proj.moss_image_A" in message and "lacks" in message


def test_a_folder_with_an_unknown_or_reshaped_tensor_does_not_load(tmp_path):
    key = "base_model.model.layers.0.self_attn.q_proj.moss_text_A"
    message = damaged(tmp_path, lambda t: {**t, key.replace("q_proj", "z_proj"): torch.zeros(1)})
    assert "z_proj" in message and "unknown" in message
    message = damaged(tmp_path, lambda t: {**t, key: torch.zeros(4, 7)})
    assert key in message and "(4, 7)" in message


def test_an_adapter_of_another_base_is_refused(tmp_path):
    save_adapter(adapted("moss"), tmp_path)
    record = json.loads((tmp_path / "weft_base.json").read_text())
    (tmp_path / "weft_base.json").write_text(json.dumps(record | {"fingerprint": "0" * 64}))
    with pytest.raises(AdapterError, match="other weights"):
        load_adapter(load("nano"), tmp_path)


def test_merging_is_refused_with_a_reason():
    with pytest.raises(AdapterError, match="cannot be merged"):
        adapted("moss").decoder.merge_adapter()


@pytest.mark.parametrize(
    "values,message",
    [
        ({"rank": 0}, "rank"),
        ({"kernel": 5}, "kernel must be 1 to 4"),
        ({"kind": "lora", "kernel": 2}, "lora has no kernel"),
        ({"dropout": 1.0}, "dropout"),
        ({"rnak": 8}, "did you mean rank"),
    ],
)
def test_bad_settings_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        load_config(AdapterConfig, overrides=values)


def test_dropout_is_one_mask_for_all_taps_and_off_in_eval():
    backbone = adapted("moss", dropout=0.5)
    layout = lay_out(BATCHES["several pictures"])
    assert torch.equal(run(backbone, layout), run(adapted("moss"), layout))
    backbone.train()
    assert not torch.equal(run(backbone, layout), run(backbone, layout))
