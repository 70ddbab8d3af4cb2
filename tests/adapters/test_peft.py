"""PEFT's surface: what works for LoRA works for our adapters, exactly, in PEFT's way in and in transformers' own."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.nn import functional as F
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from weft.adapters import Branch, MossConfig, routing_of
from weft.adapters.layer import MossLinear
from weft.errors import AdapterError, RoutingError
from weft.layout import layout_of_tokens

BEGIN, GRID = 60, (2, 3)
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": None,
}  # fmt: skip
VQ = {
    "embed_dim": 4, "num_embeddings": 8, "latent_channels": 4, "resolution": 8, "base_channels": 32,
    "channel_multiplier": [1], "num_res_blocks": 1,
}  # fmt: skip


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).to(dtype).eval()


def chameleon():
    torch.manual_seed(0)
    # no picture codes in its vocabulary map: transformers masks the logits of those
    config = ChameleonConfig(**SIZES, vq_config=VQ, vocabulary_map={"<image>": 61})
    return ChameleonForConditionalGeneration(config).eval()


BASES = {"llama": llama, "chameleon": chameleon}


def config(rank=3, kernel=2, **settings):
    return MossConfig(**{"text": Branch(rank, 4.0), "image": Branch(rank, 4.0, kernel=kernel)} | settings)


def batch(seed=0):
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(seed))
    ids[0, 2] = ids[1, 4] = BEGIN
    return {"input_ids": ids, "labels": ids, "layout": layout_of_tokens(ids, begin_image=BEGIN, grid=GRID)}


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs or batch()).logits


def own(model, name="default"):
    return {key: value for key, value in model.named_parameters() if ".moss_" in key and key.rpartition(".")[2] == name}


def randomised(model, name="default", seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in own(model, name).values():
        nn.init.normal_(parameter.data, std=0.2, generator=generator)
    return model.eval()


def adapted(base=None, **settings):
    return randomised(get_peft_model(base or llama(), config(**settings)))


def targets(model):
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, MossLinear)}


def attention(*layers):
    return {f"model.layers.{i}.self_attn.q_proj" for i in layers}


# what is adapted


def test_all_linear_leaves_the_head_alone():
    found = targets(adapted())
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip  # noqa: E501
    assert found == {f"model.layers.{i}.{name}" for i in (0, 1) for name in names}


@pytest.mark.parametrize(
    "settings,wanted",
    [
        ({"target_modules": ["q_proj"]}, attention(0, 1)),
        ({"target_modules": r".*layers\.1\.self_attn\.q_proj"}, attention(1)),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, attention(1)),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, attention(0)),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, attention(0, 1)),
        ({"target_modules": ["q_proj", "lm_head"]}, {*attention(0, 1), "lm_head"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_targets_are_chosen_as_in_peft(settings, wanted):
    assert targets(adapted(**settings)) == wanted


def test_patterns_change_the_branches_of_the_layers_they_name():
    model = adapted(
        target_modules=["q_proj", "down_proj"],
        patterns={"down_proj$": {"image": {"rank": 5, "kernel": 3}}, r"layers\.0\.": {"image": None}},
    )
    shapes = {name.split("layers.")[1]: tuple(p.shape) for name, p in own(model).items() if "image_A" in name}
    assert shapes == {
        "1.self_attn.q_proj.moss_image_A.default": (12, 16),
        "1.mlp.down_proj.moss_image_A.default": (45, 24),
    }
    with torch.no_grad():
        assert model(**batch()).logits.isfinite().all()


def test_only_the_adapter_is_trained_and_starts_as_the_identity():
    model = get_peft_model(llama(), config())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(own(model))
    assert torch.equal(logits(model), logits(llama(), input_ids=batch()["input_ids"]))


# a script that knows only PEFT


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_trained_saved_and_loaded_with_peft_alone(base, tmp_path):
    model = get_peft_model(base(), config()).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(own(model)), "every tensor of the adapter and nothing else"
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))
    assert not torch.equal(logits(again), logits(base(), input_ids=batch()["input_ids"]))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    trainable = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == set(own(trainable))


def collate(rows):
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids, "layout": layout_of_tokens(ids, begin_image=BEGIN, grid=GRID)}


def test_the_trainer_of_transformers_trains_evaluates_and_resumes(tmp_path):
    rows = [{"input_ids": row} for seed in range(3) for row in batch(seed)["input_ids"]]

    def trainer(steps):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=2, remove_unused_columns=False, use_cpu=True,
            report_to=[], save_steps=2, disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-2,
            gradient_checkpointing=True, lr_scheduler_type="constant",
        )  # fmt: skip
        torch.manual_seed(0)
        model = get_peft_model(llama(), config())
        return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2], data_collator=collate)

    straight = trainer(4)
    straight.train()
    assert straight.evaluate()["eval_loss"] > 0
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in own(straight.model).items():
        assert torch.equal(own(resumed.model)[name], parameter), name


def test_a_layout_moves_with_its_batch():
    moved = send_to_device(batch(), "meta", non_blocking=True)
    assert moved["layout"].grids.device.type == moved["layout"].outputs.row.device.type == "meta"


# folders


SETTINGS = {
    "plain": {},
    "experts": {"image": Branch(3, 4.0, experts=(2, 4), gate="token"), "context_images": "text"},
    "full": {"text": Branch("full"), "image": Branch(3, 2.0, kernel=3, window="raster", scaling="sqrt_rank")},
    "lora": {"image": "text"},
    "one modality": {"text": None, "routing": "input", "isolate_gradients": False},
    "patterns": {"patterns": {"q_proj": {"image": {"kernel": 3}, "text": None}}, "exclude_modules": ["k_proj"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
    "saved modules": {"modules_to_save": ["embed_tokens", "lm_head"], "text": Branch(2, dropout=0.1)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_field_and_tensor_survives_a_folder(settings, tmp_path):
    model = adapted(**settings)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    saved, read = model.peft_config["default"], PeftConfig.from_pretrained(tmp_path)
    assert type(read) is MossConfig and read.auto_mapping["base_model_class"] == "LlamaForCausalLM"
    for f in fields(MossConfig):
        if f.name not in ("auto_mapping", "inference_mode"):  # PEFT writes these as it saves
            assert getattr(read, f.name) == getattr(saved, f.name), f.name
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_new_tokens_are_trained_through_modules_to_save(tmp_path):
    model = adapted(modules_to_save=["embed_tokens", "lm_head"]).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    base = llama()
    assert torch.equal(logits(again), logits(model.eval()))
    for find in ("get_input_embeddings", "get_output_embeddings"):
        trained, fresh = getattr(again, find)(), getattr(base, find)()
        assert not torch.equal(trained.modules_to_save["default"].weight, fresh.weight)
        assert torch.equal(trained.original_module.weight, fresh.weight)
    trained = again.get_output_embeddings().modules_to_save["default"].weight.clone()
    assert torch.equal(again.unload().lm_head.weight, trained), "these modules stay, as PEFT has it"


FRESH_PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_peft as t
torch.set_num_threads(1)
t.adapted(modules_to_save=["lm_head"]).save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_a_folder_has_the_same_bytes_from_every_process(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    adapted(modules_to_save=["lm_head"]).save_pretrained(here)
    subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, os.path.dirname(__file__), str(there)],
        check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    read = lambda folder: {file.name: file.read_bytes() for file in folder.iterdir()}  # noqa: E731
    assert read(here) == read(there) and len(read(here)) == 3


def test_the_model_card_says_how_to_load_the_adapter(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import weft.adapters" in card and "layout=layout" in card and "library_name: peft" in card
    (tmp_path / "README.md").write_text(card + "\nA word of the author.\n")
    model.save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert "A word of the author." in again and again.count("import weft.adapters") == 1


def test_an_adapter_is_loaded_without_memory_for_its_random_start(tmp_path):
    model = adapted(image=Branch(3, experts=(2, 4), gate="token"), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in again.parameters())
    assert torch.equal(logits(again), logits(model))
    again.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    again.set_adapter("second")
    assert torch.equal(logits(again), logits(model))


def test_weights_of_another_adapter_in_memory_are_taken():
    model, other = adapted(), randomised(get_peft_model(llama(), config()), seed=9)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(logits(other), logits(model))


# several adapters


def several():
    model = adapted()
    for name, settings in {
        "wide": {"rank": 5, "kernel": 3, "context_images": "text"},
        "lora": {"image": "text", "target_modules": ["q_proj", "lm_head"]},
        "input": {"kernel": 1, "routing": "input"},
    }.items():
        model.add_adapter(name, config(**settings))
        randomised(model, name, seed=len(name))
    return model


def test_adapters_of_different_rules_are_switched_and_add_up():
    model, names = several(), ("default", "wide", "lora", "input")
    alone = {}
    for name in names:
        model.set_adapter(name)
        alone[name] = logits(model)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(own(model, name))
    assert all(not torch.equal(alone[a], alone[b]) for a in names for b in names if a < b)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(3))

    def update(*active):
        model.base_model.set_adapter(list(active))
        routing_of(model).set(batch()["layout"])
        with torch.no_grad():
            return layer(x) - layer.base_layer(x)

    torch.testing.assert_close(update(*names), sum(update(name) for name in names), rtol=0, atol=1e-5)


def test_an_adapter_that_is_deleted_needs_no_layout_and_leaves_the_others():
    model = several()
    model.set_adapter("input")
    before = logits(model)
    for name in ("default", "wide"):
        model.delete_adapter(name)
        assert not own(model, name)
        assert torch.equal(logits(model), before)
    ids = batch()["input_ids"]
    with pytest.raises(RoutingError, match="without the layout"):
        model(input_ids=ids)
    model.set_adapter("lora")  # serves every position; no layout is needed although another adapter needs one
    assert torch.equal(logits(model, input_ids=ids), logits(model))
    model.delete_adapter("input")
    assert routing_of(model)._rules == {}
    model.add_adapter("input", config(kernel=4))  # the name is free again, for another rule
    model.set_adapter("input")
    logits(model)


def test_layers_that_a_second_adapter_adds_share_their_input_too():
    model = adapted(target_modules=["q_proj"])
    model.add_adapter("more", config(target_modules=["q_proj", "k_proj", "v_proj"]))
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.siblings == (attention.q_proj, attention.k_proj, attention.v_proj)


def test_disabled_adapters_give_the_base_and_come_back():
    model, base, ids = adapted(), llama(), batch()["input_ids"]
    before = logits(model)
    routing_of(model).set(batch()["layout"])
    with model.disable_adapter():
        model(input_ids=ids)
    with pytest.raises(RoutingError, match="without the layout"):
        model(input_ids=ids)  # that of a call without adapters is used up too
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids=ids), logits(base, input_ids=ids))
        assert torch.equal(logits(model), logits(base, input_ids=ids)), "a layout does no harm"
    assert torch.equal(logits(model), before)


def test_an_unloaded_model_is_the_base_bit_for_bit():
    plain = several().unload()
    base, ids = llama(), batch()["input_ids"]
    assert type(plain) is LlamaForCausalLM and not plain._forward_pre_hooks and not hasattr(plain, "peft_config")
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in base.named_parameters()]
    assert torch.equal(logits(plain, input_ids=ids), logits(base, input_ids=ids))
    assert torch.equal(logits(adapted(plain)), logits(adapted(base))), "and can be adapted again"


def test_named_adapters_are_saved_in_folders_and_loaded_from_them(tmp_path):
    model = several()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    for name in ("wide", "lora", "input"):
        again.load_adapter(tmp_path / name, name)
    for name in ("default", "wide", "lora", "input"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(logits(again), logits(model)), name


def test_a_name_that_begins_like_another_is_another(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    model.add_adapter("default2", config(rank=6))
    model.load_adapter(tmp_path, "def")
    model.set_adapter("def")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), tmp_path)))


# the ways in without a PeftModel


def test_transformers_own_methods_load_switch_and_delete(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    plain, ids = llama(), batch()["input_ids"]
    report = plain.load_adapter(str(tmp_path))
    assert not report.missing_keys and not report.unexpected_keys and not report.mismatched_keys
    assert torch.equal(logits(plain), logits(model))
    attention = plain.model.layers[0].self_attn
    assert attention.v_proj.siblings == (attention.q_proj, attention.k_proj, attention.v_proj)
    with pytest.raises(RoutingError, match="without the layout"):
        plain(input_ids=ids)
    plain.add_adapter(config(rank=2), "second")
    assert torch.equal(logits(plain), logits(llama(), input_ids=ids)), "a new one changes nothing"
    plain.set_adapter("default")
    plain.disable_adapters()
    assert torch.equal(logits(plain, input_ids=ids), logits(llama(), input_ids=ids))
    plain.enable_adapters()
    plain.delete_adapter("second")
    assert torch.equal(logits(plain), logits(model))
    plain.delete_adapter("default")
    assert torch.equal(logits(plain, input_ids=ids), logits(llama(), input_ids=ids))


def test_transformers_own_loading_reports_what_does_not_fit(tmp_path):
    model = adapted(target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path)
    weights = get_peft_model_state_dict(model)
    lost = weights.pop("base_model.model.model.layers.1.self_attn.q_proj.moss_image_A")
    weights["base_model.model.model.layers.1.self_attn.q_proj.moss_imageA"] = lost
    report = llama().load_adapter(peft_config=config(target_modules=["q_proj", "v_proj"]), adapter_state_dict=weights)
    assert [key.rpartition("layers.")[2] for key in report.missing_keys] == ["1.self_attn.q_proj.moss_image_A.default"]
    assert any("moss_imageA" in key for key in report.unexpected_keys)


def test_an_injected_adapter_routes_and_takes_weights():
    model, plain = adapted(), llama()
    assert inject_adapter_in_model(config(), plain) is plain
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    assert torch.equal(logits(plain), logits(model))


def test_weights_that_do_not_fit_an_injected_adapter_are_refused():
    plain = inject_adapter_in_model(config(), llama())
    weights = get_peft_model_state_dict(adapted())
    weights.pop("base_model.model.model.layers.1.self_attn.q_proj.moss_image_A")
    with pytest.raises(AdapterError, match=r"lacks model\.layers\.1\.self_attn\.q_proj\.moss_image_A"):
        set_peft_model_state_dict(plain, weights)


# what is around it


def test_the_adapter_of_a_bfloat16_base_is_float32():
    model = adapted(llama(torch.bfloat16))
    assert {parameter.dtype for parameter in own(model).values()} == {torch.float32}
    out = logits(model)
    assert out.dtype is torch.bfloat16 and not torch.equal(out, logits(llama(torch.bfloat16), input_ids=batch()["input_ids"]))  # fmt: skip  # noqa: E501
    model.train()(**batch()).loss.backward()
    assert {parameter.grad.dtype for parameter in own(model).values()} == {torch.float32}
    small = get_peft_model(llama(torch.bfloat16), config(), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in own(small).values()} == {torch.bfloat16}
    logits(small)


def test_a_copy_has_routes_of_its_own():
    model = adapted()
    twin = copy.deepcopy(model)
    assert routing_of(twin) is not routing_of(model)
    assert torch.equal(logits(twin), logits(model))
    routing_of(model).set(batch()["layout"])
    with pytest.raises(RoutingError, match="without the layout"):
        twin(input_ids=batch()["input_ids"])
    randomised(twin, seed=5)
    assert not torch.equal(logits(twin), logits(model))


def test_two_forwards_before_one_backward_have_the_gradients_of_each():
    """As in DPO: one batch chosen, one rejected, with other pictures elsewhere, and one backward for both."""

    def gradients(checkpointed):
        model = adapted().train()
        if checkpointed:
            model.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": routing_of(model).checkpoint_context}
            )
            model.enable_input_require_grads()
        chosen, rejected = batch(1), batch(2)
        rejected["input_ids"] = rejected["input_ids"].flip(0)
        rejected["layout"] = layout_of_tokens(rejected["input_ids"], begin_image=BEGIN, grid=GRID)
        (model(**chosen).loss - 0.5 * model(**rejected).loss).backward()
        return {name: parameter.grad for name, parameter in own(model).items()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-6, msg=name)


class Int8Linear(nn.Module):
    """A quantised linear layer: whole numbers in a buffer, a scale per row, and nothing called weight."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (layer.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return F.linear(x, (self.codes * self.scale).to(x.dtype))


def test_a_quantised_layer_is_wrapped_and_left_as_it_is(tmp_path):
    def quantised():
        model = llama()
        for layer in model.model.layers:
            layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
        return model

    base = quantised()
    model = adapted(base, target_modules=["q_proj", "down_proj"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert isinstance(layer, MossLinear) and type(layer.base_layer) is Int8Linear
    whole = llama()
    whole.model.layers[0].mlp.down_proj.weight.data = layer.base_layer.codes * layer.base_layer.scale
    twin = adapted(whole, target_modules=["q_proj", "down_proj"]).base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 12, 24)
    for one in (layer, twin):
        one.routing.set(batch()["layout"])
    assert torch.equal(layer(x), twin(x)) and not torch.equal(layer(x), layer.base_layer(x))
    model.train()(**batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in own(model).values())
    fresh = quantised().model.layers[0].mlp.down_proj
    assert torch.equal(layer.base_layer.codes, fresh.codes) and torch.equal(layer.base_layer.scale, fresh.scale)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised(), tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes quantises on CUDA devices only")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_base_is_wrapped_and_trains(bits):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = llama(torch.bfloat16)
    for layer in base.model.layers:
        old = layer.mlp.down_proj
        kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
        layer.mlp.down_proj = kind(old.in_features, old.out_features, bias=False)
        layer.mlp.down_proj.load_state_dict(old.state_dict())
    model = adapted(base.cuda()).train()
    inputs = {name: value.to("cuda") for name, value in batch().items()}
    model(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in own(model).values())
    with model.disable_adapter():
        before = model(**inputs).logits
    assert torch.equal(model.unload()(input_ids=inputs["input_ids"]).logits, before)


def test_text_is_generated_with_an_adapter():
    model = adapted()
    ids = batch()["input_ids"][:, :2]
    with routing_of(model).text_only():
        out = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 6)


def test_a_causal_lm_of_peft_passes_the_layout_on(tmp_path):
    model = randomised(get_peft_model(llama(), config(task_type="CAUSAL_LM")))
    assert type(model) is PeftModelForCausalLM
    assert torch.equal(logits(model), logits(adapted()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    with routing_of(model).text_only():
        assert model.generate(input_ids=batch()["input_ids"][:, :2], max_new_tokens=2, pad_token_id=0).shape == (2, 4)
    with pytest.raises(AdapterError, match="adapter_names"):
        model(**batch(), adapter_names=["default", "default"])


def test_a_configuration_of_a_later_peft_keeps_peft_s_own_tolerance(tmp_path):
    config().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_version": "99.0", "new_in_99": 1}))
    with pytest.warns(UserWarning, match="new_in_99"):
        assert PeftConfig.from_pretrained(tmp_path) == config(inference_mode=False, peft_version="99.0")


def test_an_injection_that_fails_leaves_the_model_as_it_was():
    base, ids = llama(), batch()["input_ids"]
    before = logits(base, input_ids=ids)
    with pytest.raises(AdapterError, match=r"model\.norm is of type LlamaRMSNorm"):  # reached after the layers
        get_peft_model(base, config(target_modules=["q_proj", "norm"]))
    assert not targets(base) and not base._forward_pre_hooks
    assert torch.equal(logits(base, input_ids=ids), before)
    model = adapted(base, target_modules=["q_proj"])
    before = logits(model)
    with pytest.raises(AdapterError, match="names no module"):
        model.add_adapter("second", config(modules_to_save=["lm_haed"]))
    assert torch.equal(logits(model), before)
    assert set(model.peft_config) == {"default"} and not own(model, "second")


def test_lora_beside_it_is_refused_in_both_orders():
    with pytest.raises(ValueError, match="Cannot combine adapters"):  # PEFT's own words: it asks first
        adapted().add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="already has an adapter of another type"), pytest.warns(match="second time"):
        get_peft_model(lora.get_base_model(), config())
