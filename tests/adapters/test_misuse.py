"""Ways to misuse the adapters. Each raises one sentence, and a fix that says what to do; read them with `pytest -s`."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from weft.adapters import (
    AdapterConfig,
    Branch,
    MossConfig,
    RingCache,
    attach,
    detach,
    load_adapter,
    routing_of,
    save_adapter,
)
from weft.backbones.tiny import load as load_backbone
from weft.errors import AdapterError, LayoutError, RoutingError, WeftError
from weft.layout import ImageSpan, TextSpan, lay_out, layout_of_tokens

BEGIN, GRID = 60, (2, 2)
IDS = torch.tensor([[1, 2, BEGIN, 3, 4, 5, 6, 7]])
LAYOUT = layout_of_tokens(IDS, begin_image=BEGIN, grid=GRID)
IMAGE = Branch(2, kernel=2)


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes | changes))


def moss(**settings):
    return MossConfig(**{"text": Branch(2), "image": IMAGE} | settings)


def adapted(base=None, **settings):
    return get_peft_model(base or llama(), moss(**settings))


class Mixture(nn.Module):
    """One layer of every kind."""

    def __init__(self):
        super().__init__()
        self.linear, self.table, self.gpt = nn.Linear(4, 4), nn.Embedding(4, 4), Conv1D(4, 4)
        self.picture, self.attention = nn.Conv2d(4, 4, 2), nn.MultiheadAttention(4, 2)


def on(target):
    return lambda folder: adapted(Mixture(), target_modules=[target])


# a folder, changed, and loaded


def saved(folder, **settings):
    adapted(**settings).save_pretrained(folder)
    return folder


def with_tensors(change, base=llama, **settings):
    def misuse(folder):
        file = saved(folder, **settings) / "adapter_model.safetensors"
        save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file)
        PeftModel.from_pretrained(base(), folder)

    return misuse


def with_config(change):
    def misuse(folder):
        file = saved(folder) / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        PeftModel.from_pretrained(llama(), folder)

    return misuse


def without(part):
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def exchanged(tensors):
    swap = {"moss_text_A": "moss_image_A", "moss_image_A": "moss_text_A"}
    return {key.replace(part := key.rpartition(".")[2], swap.get(part, part)): v for key, v in tensors.items()}


def a_pickle(folder):
    adapted().save_pretrained(folder, safe_serialization=False)
    PeftModel.from_pretrained(llama(), folder)


def a_second_adapter_that_does_not_fit(folder):
    saved(folder, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    save_file(without("moss_image_A")(load_file(file)), file)
    adapted().load_adapter(folder, "second")


def shallower(folder):
    adapted(llama(num_hidden_layers=2), target_modules=["q_proj"]).save_pretrained(folder)
    PeftModel.from_pretrained(llama(), folder)


def backbone_folder(change):
    """A folder of a backbone's adapter, changed, and loaded on the backbone again."""

    def misuse(folder):
        backbone = load_backbone("nano")
        attach(backbone, AdapterConfig(rank=2))
        save_adapter(backbone, folder)
        change(folder)
        load_adapter(load_backbone("nano"), folder)

    return misuse


def another_base(folder):
    file = folder / "weft_base.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": "0" * 64}))


# a call


def stale(folder):
    model = adapted()
    model(input_ids=IDS, layout=LAYOUT)
    model(input_ids=IDS)


def merged_after(name):
    return lambda folder: getattr(adapted(modules_to_save=["embed_tokens"]), name)()


def on_lora(folder):
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    adapted(lora.get_base_model())


def attached_twice(folder):
    backbone = load_backbone("nano")
    for _ in range(2):
        attach(backbone, AdapterConfig(rank=2))


MISUSES = {
    # configuration
    "rank 0": (lambda _: Branch(0), "rank must be a positive integer or 'full', got 0"),
    "rank -1": (lambda _: Branch(-1), "got -1"),
    "rank 2.5": (lambda _: Branch(2.5), "got 2.5"),
    "rank True": (lambda _: Branch(True), "got True"),
    "kernel 5": (lambda _: Branch(2, kernel=5), "kernel must be 1 to 4, got 5"),
    "kernel 0": (lambda _: Branch(2, kernel=0), "kernel must be 1 to 4, got 0"),
    "an expert of kernel 9": (lambda _: Branch(2, experts=(2, 9)), "the kernel of an expert must be 1 to 4, got 9"),
    "raster with kernel 2": (lambda _: Branch(2, kernel=2, window="raster"), "nothing up-right below kernel 3"),
    "an unknown window": (lambda _: Branch(2, window="round"), "window cannot be 'round'"),
    "an unknown scaling": (lambda _: Branch(2, scaling="cube"), "scaling cannot be 'cube'"),
    "dropout 1.0": (lambda _: Branch(2, dropout=1.0), "dropout must be at least 0 and below 1"),
    "alpha nan": (lambda _: Branch(2, alpha=float("nan")), "alpha must be a finite number"),
    "a gate without experts": (lambda _: Branch(2, gate="token"), "a gate weighs experts"),
    "experts with a kernel": (lambda _: Branch(2, kernel=2, experts=(2, 4)), "inside the rank space"),
    "a full update with a kernel": (lambda _: Branch("full", kernel=2), "a full update has no window"),
    "a text branch with a kernel": (lambda _: moss(text=IMAGE), "the text branch is linear"),
    "neither branch": (lambda _: moss(text=None, image=None), "neither text nor image"),
    "an image branch that is a word": (lambda _: moss(image="same"), "image must be a Branch"),
    "a branch without a rank": (lambda _: moss(image={"kernel": 2}), "a branch needs its rank"),
    "an unknown field of a branch": (lambda _: moss(image={"rank": 2, "kernal": 2}), "no kernal"),
    "an unknown field of the configuration": (lambda _: moss(target_module=["q_proj"]), "no target_module"),
    "an unknown routing": (lambda _: moss(routing="both"), "routing cannot be 'both'"),
    "an unknown format": (lambda _: moss(format=99), "format 99"),
    "a pattern that is no expression": (lambda _: moss(patterns={"(": {}}), "no regular expression"),
    "a pattern with an unknown modality": (lambda _: moss(patterns={"q": {"sound": {}}}), "must map to"),
    "a pattern with no branch at all": (lambda _: moss(patterns={"q": {"image": "txt"}}), "got 'txt'"),
    "a pattern with an unknown field": (lambda _: moss(patterns={"q": {"image": {"krnel": 2}}}), "no krnel"),
    # where it goes
    "a pattern that matches nothing": (
        lambda _: adapted(patterns={"dwn_proj$": {"image": None}}), "none of the adapted"),
    "targets that are not there": (lambda _: adapted(target_modules=["query"]), "is left by target_modules"),
    "targets that are all excluded": (
        lambda _: adapted(target_modules=["q_proj"], exclude_modules=["q_proj"]), "exclude_modules"),
    "no targets": (lambda _: adapted(target_modules=None), "target_modules None"),
    "modules_to_save that are not there": (lambda _: adapted(modules_to_save=["lm_haed"]), "'lm_haed' names no module"),
    "a convolution": (on("picture"), "picture is of type Conv2d"),
    "transformers' Conv1D": (on("gpt"), "gpt is of type Conv1D"),
    "an embedding": (on("table"), "table is of type Embedding"),
    "a block of layers": (on("attention"), "attention is of type MultiheadAttention"),
    "a layer that is never called": (on("out_proj"), "never called"),
    "a layer with another type of adapter": (on_lora, "already has an adapter of another type"),
    "attaching twice": (attached_twice, "already has an adapter"),
    "detaching nothing": (lambda _: detach(load_backbone("nano")), "has no adapter"),
    "asking a plain model for its routing": (lambda _: routing_of(llama()), "no adapter that routes"),
    # layouts
    "no layout": (lambda _: adapted()(input_ids=IDS), "without the layout"),
    "the layout of the call before": (stale, "without the layout"),
    "a layout of another length": (lambda _: adapted()(input_ids=IDS[:, :6], layout=LAYOUT), r"1 x 8 positions"),
    "a layout of another batch": (lambda _: adapted()(input_ids=IDS.view(2, 4), layout=LAYOUT), r"1 x 8 positions"),
    "a mask for a layout": (lambda _: adapted()(input_ids=IDS, layout=IDS == BEGIN), "layout is a Tensor"),
    "a picture that starts in its middle": (
        lambda _: adapted()(input_ids=IDS[:, 4:], layout=LAYOUT[4:]), "sequence 0, position 0"),
    "an unfinished picture in the middle": (
        lambda _: lay_out([[TextSpan(1), ImageSpan(2, 2, present=3), TextSpan(1)]]), "sequence 0, position 1"),
    "a picture without patches": (lambda _: lay_out([[ImageSpan(0, 2)]]), "0 x 2 patches"),
    "a sequence that is too long": (lambda _: lay_out([[TextSpan(5)]], length=4), "more than 4"),
    "decoding two positions at once": (
        lambda _: routing_of(adapted()).set(LAYOUT[:2], RingCache(1, 2)), "one position per row, got 2"),
    "pictures of another grid": (
        lambda _: layout_of_tokens(torch.tensor([[1, 9, 2, 2, 9, 2, 2]]), begin_image=9, grid=(2, 2)),
        "sequence 0, position 4: a picture begins inside"),
    "a picture that ends late": (
        lambda _: layout_of_tokens(torch.tensor([[9, 2, 2, 8, 1]]), begin_image=9, end_image=8, grid=(1, 1)),
        "sequence 0, position 2: a picture should end here"),
    "an end without a begin": (
        lambda _: layout_of_tokens(torch.tensor([[1, 8, 1]]), begin_image=9, end_image=8, grid=(1, 1)), "none ends"),
    "embeddings for ids": (lambda _: layout_of_tokens(torch.rand(1, 4), begin_image=9, grid=GRID), "must be integers"),
    "padding on both sides": (
        lambda _: layout_of_tokens(torch.tensor([[0, 0, 1], [1, 0, 0]]), begin_image=9, grid=GRID, pad=0), "padded"),
    # calls of PEFT that cannot be meant
    "merging": (merged_after("merge_adapter"), "cannot be merged"),
    "merging for good": (merged_after("merge_and_unload"), "cannot be merged"),
    "unmerging": (merged_after("unmerge_adapter"), "nothing was merged"),
    "an adapter for each row": (
        lambda _: adapted()(input_ids=IDS, layout=LAYOUT, adapter_names=["default"]), "adapter_names is not for"),
    "generating with an adapter for each row": (
        lambda _: adapted().generate(input_ids=IDS, adapter_names=["default"]), "adapter_names is not for"),
    "offsets of activated LoRA": (
        lambda _: adapted()(input_ids=IDS, layout=LAYOUT, alora_offsets=[1]), "alora_offsets is not for"),
    "a weighted mean of adapters": (
        lambda _: adapted().add_weighted_adapter(["default"], [1.0], "mean"), "cannot be averaged"),
    # folders
    "a folder without a tensor": (with_tensors(without("q_proj.moss_image_A")), "lacks .*q_proj.moss_image_A"),
    "a folder with one tensor more": (
        with_tensors(lambda t: t | {"base_model.model.lm_head.moss_text_A": torch.zeros(1)}), "has unknown .*lm_head"),
    "a folder with a renamed tensor": (
        with_tensors(renamed("q_proj.moss_text_A", "q_proj.moss_txt_A")),
        "lacks .*moss_text_A and has unknown .*moss_txt"),
    "a folder without its gate": (
        with_tensors(without("gate_proj.moss_image_gate"), image=Branch(2, experts=(2, 4), gate="token")),
        "lacks .*moss_image_gate"),
    "a folder with text and image exchanged": (with_tensors(exchanged), r"moss_image_A has shape \(2, "),
    "a wider base": (with_tensors(dict, base=lambda: llama(hidden_size=32)), r"this model wants \("),
    "a deeper base": (with_tensors(dict, target_modules=["q_proj"], base=lambda: llama(num_hidden_layers=2)), "lacks"),
    "a shallower base": (shallower, "has unknown .*layers.1"),
    "a second adapter that does not fit": (a_second_adapter_that_does_not_fit, "lacks"),
    "an unknown key in a folder": (with_config({"kernel_size": 3}), "no kernel_size"),
    "a folder of another format": (with_config({"format": 1}), "format 1"),
    "weights that are a pickle": (a_pickle, "pickle"),
    "another base of equal shape": (backbone_folder(another_base), "other weights than this nano: 00000000"),
    "a folder without weights": (
        backbone_folder(lambda folder: (folder / "adapter_model.safetensors").unlink()),
        "no adapter_model.safetensors"),
    "a folder without a configuration": (
        backbone_folder(lambda folder: (folder / "adapter_config.json").unlink()), "no adapter_config.json"),
    "weights that were cut short": (
        backbone_folder(lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x09")), "cannot be read"),
    "a configuration that is no JSON": (
        backbone_folder(lambda folder: (folder / "adapter_config.json").write_text("{")), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_answered_with_one_sentence_and_what_to_do(name, tmp_path):
    misuse, said = MISUSES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about a second adapter on one model
        with pytest.raises(WeftError, match=said) as caught:
            misuse(tmp_path)
    error = caught.value
    print(f"\n{name}\n  {type(error).__name__}: {error}".replace(str(tmp_path), "folder"))
    assert isinstance(error, AdapterError | LayoutError | RoutingError)
    assert error.fix, "what to do"
    assert ". " not in error.what and "\n" not in error.what and len(error.what) < 400, "one sentence"


PEFT_ANSWERS = {
    # PEFT compares the types before it asks the tuner
    "LoRA beside it": (
        lambda _: adapted().add_adapter("lora", LoraConfig(target_modules=["q_proj"])), "Cannot combine"),
    # PEFT lists the types that may be mixed
    "a mixed model": (lambda _: get_peft_model(llama(), moss(), mixed=True), "is not compatible"),
    # PEFT swaps LoRA's tensors in place and no other's
    "hot-swapping": (lambda folder: hotswap_adapter(adapted(), saved(folder), "default"), "MOSS"),
    # PEFT copies modules_to_save by name before the tuner sees the tensors
    "a saved module that is missing": (with_tensors(without("lm_head"), modules_to_save=["lm_head"]), "lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT_ANSWERS)
def test_what_peft_refuses_before_us_it_refuses_by_name(name, tmp_path):
    misuse, said = PEFT_ANSWERS[name]
    with pytest.raises((ValueError, KeyError), match=said) as caught:
        misuse(tmp_path)
    print(f"\n{name}\n  {type(caught.value).__name__}: {caught.value}")
