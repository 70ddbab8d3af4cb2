"""MM-Interleaved whole: as the released model where tensors of it exist, and what must hold of any such model."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as PILImage
from pydantic import ValidationError
from safetensors.torch import load_file

from weft.backbones.base import DecodingOptions, encode_document
from weft.backbones.mm_interleaved import MMInterleavedBackbone, nano
from weft.backbones.mm_interleaved.config import LlamaSizes, MMInterleavedConfig, SamplerConfig, TokenIds
from weft.backbones.mm_interleaved.painting import (
    SCHEDULERS,
    Contexts,
    Draws,
    contexts_of,
    earlier_pictures,
    latents_of,
    make_scheduler,
    pixels_of,
)
from weft.backbones.mm_interleaved.released import key_map, tables
from weft.backbones.mm_interleaved.text import IGNORED, text_loss, text_targets, tokenize_marked
from weft.backbones.tokenizer import byte_tokenizer
from weft.codecs.resampler import ResamplerConfig
from weft.codecs.vision import VisionConfig, VisualTokenizerConfig
from weft.data.collate import collate
from weft.document import Document, Image, assistant, user
from weft.errors import RoutingError, UsageError
from weft.images import encode_png
from weft.layout import FEATURE, layout_of_tokens
from weft.synchronizer.attach_llm import DecoderSyncConfig
from weft.synchronizer.attach_unet import UNetSyncConfig
from weft.synchronizer.mmfs import FeatureBank
from weft.synchronizer.sight import Looks, see
from weft.synchronizer.visibility import begins_of, seen_by_pictures
from weft.training import Objective

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "mm_interleaved_loss"
CASES = ["row_context", "document_context", "document_context_caption_only", "prompt_offset_and_image_mask"]
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden tensors in {GOLDEN}")


# --- as the released model --------------------------------------------------------------------------------------------


def resampler_config(values):
    return ResamplerConfig(
        queries=values["num_queries"], width=values["hidden_size"], source_width=values["encoder_hidden_size"],
        layers=values["num_hidden_layers"], cross_every=values["cross_attention_frequency"],
        heads=values["num_attention_heads"], mlp=values["intermediate_size"], qk_norm=values["qk_normalization"],
    )  # fmt: skip


def released_config(c):
    llm, special, vis, dec = c["llm"], c["special"], c["vis"], c["dec"]
    levels = len(dec["vae"]["block_out_channels"])
    return MMInterleavedConfig(
        llm=LlamaSizes(
            vocabulary=c["txt_vocab_size"], width=llm["hidden_size"], mlp=llm["intermediate_size"],
            layers=llm["num_hidden_layers"], heads=llm["num_attention_heads"], eps=llm["rms_norm_eps"],
            context_length=c["seq_len"],
        ),
        tokens=TokenIds(
            begin=special["bos_token_id"], end=special["eos_token_id"], pad=special["pad_token_id"],
            begin_image=special["soi_token_id"], placeholder=special["image_token_id"],
        ),
        eye=VisualTokenizerConfig(
            vision=VisionConfig(
                side=vis["image_size"], patch=vis["patch_size"], width=vis["hidden_size"], layers=24,
                heads=vis["num_attention_heads"], mlp=vis["intermediate_size"], stem=vis["conv_inplane"],
            ),
            resampler=resampler_config(vis["perceiver"]),
            width=llm["hidden_size"],
        ),
        decoder_sync=DecoderSyncConfig(
            every=c["cross_attention_frequency"], feature_width=c["image_embed_dim"], value_width=c["image_embed_dim"],
            sides=c["spatial_shapes"], without_images="bias",
        ),
        condition=resampler_config(dec["perceiver"]),
        unet=dec["unet"],
        unet_sync=UNetSyncConfig(
            side=dec["unet"]["sample_size"], feature_width=c["image_embed_dim"], value_width=dec["block"]["attn_dim"],
            heads=dec["block"]["num_heads"], sides=(64, 32, 16, 8), without_images="bias",
        ),
        vae={
            **dec["vae"], "scaling_factor": c["vae_scaling_factor"],
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
        scheduler=c["scheduler"],
        drop_condition=dec["uncond_prob"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def released():
    """The model with the weights of the golden folder, by their released names."""
    values = json.loads((GOLDEN / "config.json").read_text())
    config = released_config(values)
    names = byte_tokenizer()  # not used: the ids are given
    model = MMInterleavedBackbone(config, names, "released").eval()
    weights, keys = load_file(GOLDEN / "weights.safetensors"), key_map(model)
    computed = tables(model)
    assert weights.keys() == keys.keys() | computed.keys()
    model.load_state_dict({ours: weights[theirs] for theirs, ours in keys.items()}, strict=True)
    return model


def run_released(model, case):
    """A case up to the hidden states: (hidden, ids, layout, looks, embeds)."""
    ids = case["in.text_ids"]
    layout = layout_of_tokens(ids, begin_image=model.tokens.begin_image, grid=model.config.grid, pad=model.tokens.pad)
    ids = torch.where(ids == model.config.tokens.placeholder, FEATURE, ids)
    layout, vectors, looks = see(model.synchronizer, case["in.image_tensors"] * 255, ids, layout, model.tokens.begin)
    embeds = model.embed(ids, layout, vectors)
    return model(embeds, layout), ids, layout, looks, embeds


def draws_of(case):
    return Draws(
        case["random.vae_posterior"], case["random.noise"], case["random.timesteps"],
        case["random.uncond_uniform"].flatten(),
    )  # fmt: skip


def all_scales(looks):
    return FeatureBank.of_maps([scale.unsqueeze(1) for scale in looks.maps])


def case_of(name):
    """A case, with the inputs that are stored once for all."""
    first = load_file(GOLDEN / "case_row_context.safetensors")
    shared = {key: first[key] for key in ("in.image_tensors", "in.image_tensors_dec", "in.text_ids")}
    return shared | load_file(GOLDEN / f"case_{name}.safetensors")


@needs_golden
@pytest.mark.parametrize("name", CASES)
def test_the_released_losses_and_gradients(released, name):
    case, values = case_of(name), json.loads((GOLDEN / "config.json").read_text())
    hidden, ids, layout, looks, embeds = run_released(released, case)
    real = case["in.attention_mask"].bool()
    assert torch.equal(layout.is_real, real)
    logits = released.text_logits(hidden)
    if "aux.mm_embeds" in case:
        torch.testing.assert_close(embeds[real], case["aux.mm_embeds"][real], rtol=0, atol=2e-4)
    torch.testing.assert_close(hidden[real], case["aux.last_hidden_state"][real], rtol=0, atol=2e-4)
    torch.testing.assert_close(logits[real], case["aux.text_logits"][real], rtol=0, atol=2e-4)

    prompt = torch.tensor(values["ignore_prompt_token_offset_case"]) if name.startswith("prompt") else 0
    targets = text_targets(
        ids, released.config.tokens, is_real=real, prompt=prompt, caption_only=name.endswith("caption_only")
    )
    assert torch.equal(targets, case["aux.gt_text_ids"])
    text = text_loss(logits, targets)

    painting = (hidden, ids, layout, looks, case["in.image_tensors_dec"] * 255)
    # the contexts of `row_context` go back over the start of a document
    first = torch.arange(ids.shape[1]).expand(ids.shape) == 0
    draws = {"draws": draws_of(case), "is_start": first if name == "row_context" else None}
    done, close = released.denoise_painted(*painting, **draws), {"rtol": 0, "atol": 5e-4}
    assert torch.equal(done.contexts.keep.long(), case["aux.context_attention_mask"])
    states = released.context_proj(done.contexts.states) + released.distances[: done.contexts.keep.shape[1]]
    torch.testing.assert_close(states, case["aux.context_features"], **close)
    torch.testing.assert_close(released.condition(states, done.contexts.keep), case["aux.image_condition"], **close)
    torch.testing.assert_close(done.condition, case["aux.image_condition_after_dropping"], **close)
    torch.testing.assert_close(done.noisy, case["aux.noisy_latents"], **close)
    torch.testing.assert_close(done.predicted, case["aux.noise_pred"], **close)

    keep = case["in.image_loss_mask"].bool() if "in.image_loss_mask" in case else None
    errors = released.painting_errors(*painting, **draws, keep=keep)
    squares = (done.predicted - done.wanted).square()
    torch.testing.assert_close(squares, case["aux.loss_per_element"], **close)
    counted = case["aux.context_attention_mask"].sum(1) > 2
    counted = counted if keep is None else counted & keep
    assert torch.equal(errors != 0, counted) and 0 < counted.sum() < len(counted)
    of_image, of_text = values["case_loss_weights"].get(name, (values["loss_img_weight"], values["loss_txt_weight"]))
    loss = of_image * errors.mean() + of_text * text
    for made, wanted in ((text, "loss_txt"), (errors.mean(), "loss_img"), (loss, "loss")):
        torch.testing.assert_close(made, case[f"out.{wanted}"], rtol=0, atol=2e-5)

    released.zero_grad()
    loss.backward()
    grads = {key.removeprefix("grad.param."): grad for key, grad in case.items() if key.startswith("grad.")}
    assert len(grads) == (43 if name in ("row_context", "document_context") else 0)
    keys, parameters = key_map(released), dict(released.named_parameters())
    for key, wanted in grads.items():
        made = parameters[keys[key]].grad
        torch.testing.assert_close(made, wanted, rtol=0, atol=2e-3 * wanted.abs().max().item(), msg=key)


@needs_golden
def test_the_released_pictures(released, monkeypatch):
    """Three pictures painted at once, with the noise of every step as it was."""
    case, values = (
        load_file(GOLDEN / "case_generate_images.safetensors"),
        json.loads((GOLDEN / "config.json").read_text()),
    )
    told, stored = values["losses"]["generate_images"], iter(case["random.step_noise"])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(stored))
    scheduler = make_scheduler("DDPMScheduler", values["scheduler"])
    scheduler.set_timesteps(told["num_inference_steps"])
    assert torch.equal(scheduler.timesteps, case["in.timesteps"])

    with torch.no_grad():
        hidden, ids, layout, looks, _ = run_released(released, case_of("row_context"))
    begins, is_start = begins_of(layout), torch.arange(ids.shape[1]).expand(ids.shape) == 0
    is_there = begins < ids.shape[1]
    chosen = is_there.clone()
    chosen[is_there] = torch.isin(torch.arange(6), case["in.target_image_idxs"])
    seen = seen_by_pictures(is_start, begins)
    bank, visible = earlier_pictures(all_scales(looks), is_there, seen, chosen)
    predicted = []
    released.unet.register_forward_hook(lambda *args: predicted.append(args[-1].sample))
    latents = released.draw(
        contexts_of(hidden, is_start, begins, chosen), bank, visible, case["random.initial_latents"], scheduler,
        told["guidance_scale"], torch.Generator(),
    )  # fmt: skip

    for made, wanted in zip(predicted, case["out.unet_output_uncond_then_cond"], strict=True):
        torch.testing.assert_close(made, wanted, rtol=0, atol=2e-3 * wanted.abs().max().item())
    wanted = case["out.latents_over_scaling_factor"]
    made = latents / released.vae.config.scaling_factor
    torch.testing.assert_close(made, wanted, rtol=0, atol=2e-3 * wanted.abs().max().item())
    torch.testing.assert_close(pixels_of(released.vae, latents), case["out.image"], rtol=0, atol=5e-3)
    assert next(stored, None) is None


# --- what must hold of any --------------------------------------------------------------------------------------------

BEGIN, END, PICTURE = 1, 2, "picture"
ROWS = [
    [BEGIN, 70, 71, PICTURE, 72, PICTURE, 73, PICTURE, END],
    [BEGIN, PICTURE, 74, END, BEGIN, 75, 76, PICTURE, 77],
    [BEGIN, 78, 79, 80],
]
"""Pictures 0, 1, 2; 3 alone at the start of its document, 4 in the next one; and none."""
PICTURES = 5


@pytest.fixture(scope="module")
def model():
    return nano()


@pytest.fixture
def own(model):
    """To be changed."""
    return copy.deepcopy(model)


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (PICTURES, 3, 28, 28), generator=torch.Generator().manual_seed(1)).byte()


@pytest.fixture
def painted():
    return torch.randint(0, 256, (PICTURES, 3, 32, 32), generator=torch.Generator().manual_seed(2)).byte()


@pytest.fixture
def draws():
    """Nothing is dropped."""
    normal = torch.randn(2, PICTURES, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return Draws(*normal, torch.tensor([5, 100, 400, 700, 990]), torch.ones(PICTURES))


def ids_of(model, rows):
    picture = [model.tokens.begin_image] + [FEATURE] * 4
    flat = [[id for part in row for id in (picture if part == PICTURE else [part])] for row in rows]
    length = max(map(len, flat))
    return torch.tensor([row + [model.tokens.pad] * (length - len(row)) for row in flat])


def run(model, ids, pixels):
    """(hidden, ids, layout, looks), as `painting_errors` takes them."""
    layout = layout_of_tokens(ids, begin_image=model.tokens.begin_image, grid=(2, 2), pad=model.tokens.pad)
    layout, vectors, looks = see(model.synchronizer, pixels, ids, layout, model.tokens.begin)
    return model(model.embed(ids, layout, vectors), layout), ids, layout, looks


@torch.no_grad()
def outputs(model, ids, pixels, painted, draws):
    """(hidden, predicted noise)"""
    ran = run(model, ids, pixels)
    return ran[0], model.denoise_painted(*ran, painted, draws=draws).predicted


def begins(model, ids):
    return (ids == model.tokens.begin_image).nonzero().tolist()


@pytest.mark.parametrize("number", range(PICTURES))
def test_no_earlier_output_moves_with_a_picture(model, pixels, painted, draws, number):
    ids = ids_of(model, ROWS)
    hidden, predicted = outputs(model, ids, pixels, painted, draws)
    row, begin = begins(model, ids)[number]
    changed = pixels.clone()
    changed[number] = 255 - changed[number]
    other, repainted = outputs(model, ids, changed, painted, draws)
    assert torch.equal(other[row, : begin + 1], hidden[row, : begin + 1])
    rows = [r for r in range(3) if r != row]
    assert torch.equal(other[rows], hidden[rows])
    assert not torch.isclose(other[row, begin + 1 :], hidden[row, begin + 1 :]).all(1)[:4].any()
    # a picture is not seen while it is painted itself
    later = [n for n, (r, at) in enumerate(begins(model, ids)) if r == row and at > begin]
    others = [n for n in range(PICTURES) if n not in later]
    assert torch.equal(repainted[others], predicted[others])
    assert not any(torch.allclose(repainted[n], predicted[n]) for n in later)


@pytest.mark.parametrize("cut", [2, 3, 6, 8, 9, 13, 20])
def test_no_earlier_output_moves_with_a_token(model, pixels, painted, draws, cut):
    ids = ids_of(model, ROWS)
    hidden, predicted = outputs(model, ids, pixels, painted, draws)
    changed = ids.clone()
    later = torch.arange(ids.shape[1]).expand(ids.shape) >= cut
    is_word = (ids > END) & (ids < model.tokens.pad)
    changed[later & is_word] += 20
    other, repainted = outputs(model, changed, pixels, painted, draws)
    assert torch.equal(other[:, :cut], hidden[:, :cut])
    for n, (row, begin) in enumerate(begins(model, ids)):
        same = torch.equal(changed[row, : begin + 1], ids[row, : begin + 1])
        assert torch.equal(repainted[n], predicted[n]) or not same


def test_a_picture_is_painted_from_its_document_alone(model, pixels, painted, draws):
    """Attention reaches over a document's start, as in the released model; nothing else does."""
    ids = ids_of(model, ROWS)
    hidden, *ran = run(model, ids, pixels)
    with torch.no_grad():
        wanted = model.denoise_painted(hidden, *ran, painted, draws=draws).predicted
        row, begin = begins(model, ids)[4]
        start = (ids[row, :begin] == BEGIN).nonzero()[-1].item()
        changed = hidden.clone()
        changed[row, :start] += 1
        ran[2] = Looks(tuple(torch.cat((m[:3], m[3:4] + 1, m[4:])) for m in ran[2].maps))
        found = model.denoise_painted(changed, *ran, painted, draws=draws).predicted
        assert torch.equal(found[4], wanted[4]) and not torch.allclose(found[3], wanted[3])


@pytest.mark.parametrize("reach", [1, 2])
def test_so_many_earlier_pictures_are_seen_in_painting(own, pixels, painted, draws, reach):
    own.config = own.config.model_copy(update={"max_prev_images": reach})
    hidden, ids, layout, looks = run(own, ids_of(own, ROWS), pixels)
    seen = []
    for number in range(PICTURES):
        maps = tuple(m.index_add(0, torch.tensor([number]), torch.ones_like(m[:1])) for m in looks.maps)
        with torch.no_grad():
            predicted = [
                own.denoise_painted(hidden, ids, layout, each, painted, draws=draws).predicted
                for each in (looks, Looks(maps))
            ]
        seen.append([n for n in range(PICTURES) if not torch.equal(*(p[n] for p in predicted))])
    assert seen == [[1, 2][:reach], [2], [], [], []]


def test_where_no_picture_is_before_nothing_is_added(model, pixels, painted, draws):
    ids = ids_of(model, ROWS)
    hidden, predicted = outputs(model, ids, pixels, painted, draws)
    plain = copy.deepcopy(model)
    plain.decoder_sync.detach()
    plain.unet_sync.detach()
    # the same states for both
    ran = run(model, ids, pixels)
    with torch.no_grad():
        without = plain.denoise_painted(*ran, painted, draws=draws).predicted
    firsts, others = [0, 3, 4], [1, 2]
    assert torch.equal(predicted[firsts], without[firsts])
    assert not any(torch.allclose(predicted[n], without[n]) for n in others)
    unseeing, *_ = run(plain, ids, pixels)
    assert torch.equal(hidden[2], unseeing[2]) and torch.equal(hidden[:, :2], unseeing[:, :2])


@pytest.fixture(scope="module")
def compatible(model):
    """A model like the nano one, as the released one in what differs."""
    values = model.config.model_dump()
    for sync in ("decoder_sync", "unet_sync"):
        values[sync]["without_images"] = "bias"
    torch.manual_seed(0)
    config = MMInterleavedConfig.model_validate(values | {"compat": True})
    made = MMInterleavedBackbone(config, model.tokenizer, "compatible").eval()
    for parameter in (*made.decoder_sync.parameters(), *made.unet_sync.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def test_in_compat_a_bias_is_added_also_where_the_whole_batch_has_no_picture(compatible, pixels, painted, draws):
    model = copy.deepcopy(compatible)
    ids = ids_of(model, ROWS)
    hidden, predicted = outputs(model, ids, pixels, painted, draws)
    alone, *_ = run(model, ids[2:], None)
    torch.testing.assert_close(alone[0, :4], hidden[2, :4], rtol=0, atol=1e-5)  # other sizes, other sums
    one = Draws(*(getattr(draws, name)[3:4] for name in ("posterior", "noise", "times", "uniform")))
    row = ids[1:2, :7]
    _, first = outputs(model, row, pixels[3:4], painted[3:4], one)
    torch.testing.assert_close(first[0], predicted[3], rtol=0, atol=1e-4)
    model.decoder_sync.detach()
    model.unet_sync.detach()
    plain, without = outputs(model, ids, pixels, painted, draws)
    assert not torch.isclose(plain[2, :4], hidden[2, :4]).all(1).any()
    assert not torch.allclose(without[3], predicted[3])


def test_a_new_model_is_what_its_parts_are_alone(model, pixels, painted, draws):
    torch.manual_seed(0)
    model = MMInterleavedBackbone(model.config, model.tokenizer, "new").eval()
    ids = ids_of(model, ROWS)
    hidden, ids, layout, looks = run(model, ids, pixels)
    done = model.denoise_painted(hidden, ids, layout, looks, painted, draws=draws)
    model.decoder_sync.detach()
    model.unet_sync.detach()
    vectors = torch.zeros(*ids.shape, 32)
    vectors[ids == FEATURE] = looks.tokens.flatten(0, 1)
    real = layout.is_real
    plain = model.decoder(inputs_embeds=model.embed(ids, layout, vectors), attention_mask=real, use_cache=False)
    assert torch.equal(plain.last_hidden_state[real], hidden[real])
    unet = model.unet(done.noisy, draws.times, encoder_hidden_states=done.condition).sample
    assert torch.equal(unet, done.predicted)
    logits, words = model.text_logits(hidden), model.vocabulary - 2
    assert torch.equal(logits[..., :words], torch.nn.functional.linear(hidden, model.head.weight)[..., :words])
    torch.testing.assert_close(logits[..., words], torch.full(ids.shape, -5.0), rtol=0, atol=1e-5)
    assert torch.equal(model.embed(ids, layout, vectors), torch.where(
        (ids == FEATURE)[..., None], vectors, model.table(ids.clamp_min(0))
    ))  # fmt: skip


def trained(model):
    model.requires_grad_(True).train()
    model.vae.requires_grad_(False)
    model.eye.encoder.trunk.requires_grad_(False)
    return model


def test_gradients_reach_all_that_is_trained(own, pixels, painted, draws):
    trained(own)
    for parameter in own.parameters():
        if not parameter.any():  # zeros hold gradients back at the very start
            torch.nn.init.normal_(parameter, std=0.1)
    draws.uniform[1] = 0.0
    hidden, ids, layout, looks = run(own, ids_of(own, ROWS), pixels)
    own.painting_errors(hidden, ids, layout, looks, painted, draws=draws).sum().backward()
    parts = (
        "table",
        "soi",
        "decoder",
        "decoder_sync",
        "eye",
        "context_proj",
        "condition",
        "blank",
        "unet",
        "unet_sync",
    )
    missing = {
        name for name, parameter in own.named_parameters()
        if name.startswith(parts) and parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    }  # fmt: skip
    # keys have no effect on a softmax; of the null slot nothing is read
    assert not {name for name in missing if not name.endswith(("k_norm.bias", ".key.bias", ".to_k.bias"))}
    assert own.vae.encoder.conv_in.weight.grad is None and own.head.weight.grad is None


def test_the_unet_alone_teaches_the_eye(own, pixels, painted, draws):
    trained(own)
    hidden, ids, layout, looks = run(own, ids_of(own, ROWS), pixels)
    own.painting_errors(hidden.detach(), ids, layout, looks, painted, draws=draws).sum().backward()
    assert own.eye.encoder.adapter.level_embed.grad.any() and own.eye.proj.weight.grad is None


def test_recomputed_activations_give_the_same_gradients(own, pixels, painted, draws):
    def gradients():
        trained(own).zero_grad()
        hidden, *rest = run(own, ids_of(own, ROWS), pixels)
        loss = own.painting_errors(hidden, *rest, painted, draws=draws).sum() + own.text_logits(hidden).square().mean()
        loss.backward()
        return {name: p.grad.clone() for name, p in own.named_parameters() if p.grad is not None}

    calls = []
    for part in (own.decoder_sync.branches["0"].mmfs, own.unet.up_blocks[0].resnets[0]):
        part.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    plain, once = gradients(), len(calls)
    own.decoder.activation_checkpointing_enable({"use_reentrant": False})
    own.unet.enable_gradient_checkpointing()
    again = gradients()
    assert (once, len(calls)) == (2, 6)
    for name, grad in plain.items():  # layers add theirs in another order
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-5 * max(grad.abs().max().item(), 1), msg=name)


def test_pictures_that_nothing_stands_before_count_zero(own, pixels, painted, draws):
    ran = run(own, ids_of(own, ROWS), pixels)
    with torch.no_grad():
        errors = own.painting_errors(*ran, painted, draws=draws)
        assert (errors > 0).tolist() == [True, True, True, False, True]
        predicted = own.denoise_painted(*ran, painted, draws=draws).predicted
        torch.testing.assert_close(errors[0], (predicted[0] - draws.noise[0]).pow(2).mean())
        keep = torch.tensor([True, False, True, True, True])
        kept = own.painting_errors(*ran, painted, draws=draws, keep=keep)
        assert torch.equal(kept, errors * keep)
        own.config = own.config.model_copy(update={"mean_over": "counted"})
        counted = own.painting_errors(*ran, painted, draws=draws, keep=keep)
    torch.testing.assert_close(counted.mean(), errors[[0, 2, 4]].mean())


def test_given_pictures_are_not_painted(model, pixels, painted, draws):
    hidden, ids, layout, looks = run(model, ids_of(model, ROWS), pixels)
    given = layout.given.clone()
    given[0, 0] = given[1, 0] = True
    chosen = [1, 2, 4]
    some = Draws(*(getattr(draws, name)[chosen] for name in ("posterior", "noise", "times", "uniform")))
    with torch.no_grad():
        all_of_them = model.painting_errors(hidden, ids, layout, looks, painted, draws=draws)
        layout = copy.copy(layout)
        object.__setattr__(layout, "given", given)
        found = model.painting_errors(hidden, ids, layout, looks, painted[chosen], draws=some)
        torch.testing.assert_close(found, all_of_them[chosen])
        with pytest.raises(RoutingError, match="5 are to be painted, but the sequences have 5, 3 of them not given"):
            model.painting_errors(hidden, ids, layout, looks, painted)


def test_the_condition_is_dropped_for_some(model, pixels, painted, draws):
    draws.uniform[:] = torch.tensor([0.05, 0.1, 0.5, 0.0999, 0.9])
    ran = run(model, ids_of(model, ROWS), pixels)
    condition = model.denoise_painted(*ran, painted, draws=draws).condition
    assert [torch.equal(each, model.blank[0]) for each in condition] == [True, False, False, True, False]


def test_noise_comes_of_torchs_own_generator(model, pixels, painted):
    ran, errors = run(model, ids_of(model, ROWS), pixels), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        errors.append(model.painting_errors(*ran, painted))
    assert torch.equal(errors[0], errors[1]) and not torch.isclose(errors[0], errors[2])[[0, 1, 2, 4]].any()


def test_a_unet_may_predict_velocity(own, pixels, painted, draws):
    own.config = own.config.model_copy(
        update={"scheduler": {**own.config.scheduler, "prediction_type": "v_prediction"}}
    )
    done = own.denoise_painted(*run(own, ids_of(own, ROWS), pixels), painted, draws=draws)
    kept = make_scheduler("DDPMScheduler", own.config.scheduler).alphas_cumprod[draws.times].view(-1, 1, 1, 1)
    latents = (done.noisy - (1 - kept).sqrt() * draws.noise) / kept.sqrt()
    wanted = kept.sqrt() * draws.noise - (1 - kept).sqrt() * latents
    torch.testing.assert_close(done.wanted, wanted, rtol=0, atol=1e-3)  # kept goes down to 0.005


def test_the_elements_of_a_picture_see_it_and_its_begin_token_does_not(model, pixels):
    _, ids, layout, _ = run(model, ids_of(model, ROWS), pixels)
    for n, (row, begin) in enumerate(begins(model, ids)):
        visible = layout.sight.visible[row, :, n if row == 0 else n - 3]
        assert visible[begin : begin + 2].tolist() == [False, True]


def test_the_condition_knows_the_order_of_its_context(own):
    """The resampler alone does not: it reads a set."""
    for parameter in own.condition.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    states, keep = torch.randn(1, 4, 32), torch.ones(1, 4, dtype=torch.bool)
    found = [own._condition(Contexts(each, keep)) for each in (states, states.flip(1))]
    assert not torch.allclose(*found, atol=1e-2)
    alone = [own.condition(each, keep) for each in (states, states.flip(1))]
    torch.testing.assert_close(*alone, rtol=0, atol=1e-4)


class Mirror:
    """An autoencoder whose latents are pixels, with a spread of 0.1."""

    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=0.5)

    def encode(self, pixels):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels, std=torch.full_like(pixels, 0.1)))

    def decode(self, latents):
        return SimpleNamespace(sample=latents)


def test_pixels_are_between_minus_one_and_one_for_the_autoencoder():
    values = torch.tensor([0, 51, 255]).byte().view(1, 3, 1, 1).expand(40, -1, -1, -1)
    draw = torch.arange(40.0).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    latents = latents_of(Mirror(), values, draw)
    wanted = (torch.tensor([-1.0, -0.6, 1.0]).view(3, 1, 1) + 0.1 * draw) * 0.5
    torch.testing.assert_close(latents, wanted)
    torch.testing.assert_close(pixels_of(Mirror(), latents[:1]).flatten(), torch.tensor([0.0, 0.2, 1.0]))
    assert pixels_of(Mirror(), latents[39:]).max() == 1


@pytest.mark.parametrize("seed", range(3))
def test_contexts_go_backwards_from_the_begin_token(seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 11, 2, generator=generator)
    is_start = torch.rand(3, 11, generator=generator) < 0.3
    at = torch.rand(3, 11, generator=generator).argsort(1)[:, :3].sort(1).values
    chosen = torch.rand(3, 3, generator=generator) < 0.7
    contexts, wanted = contexts_of(hidden, is_start, at, chosen), []
    for row, number in chosen.nonzero().tolist():
        states = []
        for place in range(at[row, number].item(), -1, -1):
            states.append(hidden[row, place])
            if is_start[row, place]:
                break
        wanted.append(torch.stack(states))
    assert contexts.lengths.tolist() == [len(states) for states in wanted]
    assert contexts.keep.shape[1] == max(map(len, wanted))
    for made, keep, states in zip(contexts.states, contexts.keep, wanted, strict=True):
        assert torch.equal(made[keep], states) and keep[: len(states)].all() and not made[~keep].any()


@pytest.mark.parametrize("reach", [1, 2, None])
def test_earlier_pictures_stand_nearest_last(reach):
    is_there = torch.tensor([[True, True, True, True], [True, True, False, False]])
    at = torch.tensor([[1, 3, 6, 8], [2, 5, 10, 10]])
    is_start = torch.zeros(2, 10, dtype=torch.bool)
    is_start[0, 2] = is_start[1, 0] = True
    chosen = torch.tensor([[True, True, False, True], [False, True, False, False]])
    bank = FeatureBank(torch.arange(1.0, 7.0).view(6, 1, 1, 1), ((1, 1),))
    found, visible = earlier_pictures(bank, is_there, seen_by_pictures(is_start, at, reach=reach), chosen)
    wanted = [[], [], [2, 3][-(reach or 9) :], [5]]
    assert [row[seen].tolist() for row, seen in zip(found.features[..., 0, 0], visible, strict=True)] == wanted
    assert visible[2, -1] and not found.features[~visible].any()


# --- painting ---------------------------------------------------------------------------------------------------------


def look(model, pixels):
    with torch.no_grad():
        return model.synchronizer.look(pixels)


@pytest.fixture
def context():
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(4))


def test_a_picture_depends_on_seed_text_and_the_picture_before(model, pixels, context):
    before = look(model, pixels[:2])
    wanted = model.paint(context, before, DecodingOptions(seed=1)).tobytes()
    assert model.paint(context, before, DecodingOptions(seed=1)).tobytes() == wanted
    others = [
        model.paint(context, before, DecodingOptions(seed=2)),
        model.paint(-context, before, DecodingOptions(seed=1)),
        model.paint(context, None, DecodingOptions(seed=1)),
        model.paint(context, look(model, pixels[2:4]), DecodingOptions(seed=1)),
        model.paint(context, before, DecodingOptions(seed=1, guidance=1.0)),
        model.paint(context, before, DecodingOptions(seed=1, steps=3)),
        model.paint(context, before, DecodingOptions(seed=1, scheduler="DDPMScheduler", steps=2)),
    ]
    assert all(other.size == (32, 32) and other.tobytes() != wanted for other in others)
    # the one before the last is not seen
    swapped = look(model, pixels[[4, 1]])
    assert model.paint(context, swapped, DecodingOptions(seed=1)).tobytes() == wanted


def test_guidance_leads_from_the_blank_condition_and_keeps_the_pictures(own, pixels, context):
    """Noise that the U-Net predicts alone, with and without the condition."""
    calls = []
    own.unet.register_forward_hook(
        lambda _, args, given, out: calls.append((args, given, out.sample)), with_kwargs=True
    )
    own.paint(context, look(own, pixels[:1]), DecodingOptions(steps=1, guidance=2.0))
    (latents, _), given, predicted = calls[0]
    blank, condition = given["encoder_hidden_states"]
    assert torch.equal(latents[0], latents[1]) and torch.equal(blank, own.blank[0])
    alone = contexts_of(context[None], torch.zeros(1, 6, dtype=torch.bool), torch.tensor([[5]]), torch.ones(1, 1) > 0)
    torch.testing.assert_close(condition, own._condition(alone)[0])
    own.paint(context, look(own, pixels[:1]), DecodingOptions(steps=1, guidance=1.0))
    assert calls[1][2].shape[0] == 1
    torch.testing.assert_close(calls[1][2][0], predicted[1], rtol=0, atol=1e-4)


def test_the_picture_before_is_projected_once_for_all_steps(own, pixels, context):
    calls = []
    for branch in own.unet_sync.branches.values():
        branch.mmfs.value_proj.register_forward_hook(lambda *_: calls.append(1))
    own.paint(context, look(own, pixels[:1]), DecodingOptions(steps=4))
    assert len(calls) == len(own.unet_sync.branches)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_any_scheduler_paints(model, context, scheduler):
    options = DecodingOptions(scheduler=scheduler, steps=3, seed=5)
    picture = model.paint(context, None, options)
    torch.manual_seed(0)  # is not what noise is drawn from
    assert model.paint(context, None, options).tobytes() == picture.tobytes()


def test_a_scheduler_that_is_not_known_is_refused(model, context):
    with pytest.raises(UsageError, match="no scheduler 'DDPMSheduler'") as caught:
        model.paint(context, None, DecodingOptions(scheduler="DDPMSheduler"))
    assert caught.value.fix == "did you mean DDPMScheduler?"
    with pytest.raises(UsageError) as caught:
        model.paint(context, None, DecodingOptions(scheduler="AutoencoderKL"))
    assert "DDPMScheduler, DPMSolverMultistepScheduler" in caught.value.fix
    with pytest.raises(UsageError, match="in 0 steps"):
        model.paint(context, None, DecodingOptions(steps=0))


def test_the_papers_scheduler_takes_the_papers_steps():
    usual = SamplerConfig()
    assert (usual.scheduler, usual.steps_of(usual.scheduler)) == ("DPMSolverMultistepScheduler", 25)
    assert usual.steps_of("DDPMScheduler") == 250 and usual.steps_of("DDIMScheduler") == 25
    assert SamplerConfig(scheduler="DDPMScheduler", steps=30).steps_of("DDPMScheduler") == 30


def test_half_precision_stays_close(own, pixels, painted, draws, context):
    """The autoencoder stays in float32, as it is loaded."""
    ran = run(own, ids_of(own, ROWS), pixels)
    with torch.no_grad():
        wanted = own.painting_errors(*ran, painted, draws=draws)
        for name, part in own.named_children():
            if name != "vae":
                part.bfloat16()
        own.soi.data, own.blank.data = own.soi.data.bfloat16(), own.blank.data.bfloat16()
        ran = run(own, ids_of(own, ROWS), pixels)
        found = own.painting_errors(*ran, painted, draws=draws)
    assert ran[0].dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0)
    assert own.paint(context.bfloat16(), ran[3]).size == (32, 32)


# --- as a backbone ----------------------------------------------------------------------------------------------------


def picture(colour):
    return Image(encode_png(PILImage.new("RGB", (40, 30), colour)))


DOCUMENT = Document(
    (user(picture("red"), "What is this?"), assistant("A thing.", picture("green"), "And", picture("blue"), "end"))
)


def test_the_objective_learns_text_and_pictures(own):
    batch = collate([encode_document(own, DOCUMENT)], own.tokens.pad)
    assert batch.pictures.seen.shape == (3, 3, 28, 28) and batch.pictures.painted.shape == (2, 3, 32, 32)
    trained(own)
    objective = Objective(own)
    optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=3e-3)

    def step():
        torch.manual_seed(0)
        return objective(batch)

    first = step().detach()
    for _ in range(8):
        optimizer.zero_grad()
        step().sum().backward()
        optimizer.step()
    assert (step() < 0.7 * first).all()


def test_text_goes_through_its_tokens_and_never_becomes_structure(model):
    text = "A thing: \u00e9t\u00e9 \U0001f600.\n\nAnd more"
    assert model.detokenize(model.tokenize(text)) == text
    assert model.tokenize(f"  {text}\n") == model.tokenize(text) and model.tokenize(" \n") == []
    assert not set(model.tokenize("</s><|beginofimage|><|image|><pad>")) & set(model.tokens)


def test_placeholders_are_written_in_compat_alone(model, compatible):
    hidden = torch.randn(2, 3, 32)
    assert model.text_logits(hidden)[..., -1].isneginf().all() and model.text_logits(hidden)[..., :-1].isfinite().all()
    assert compatible.text_logits(hidden).isfinite().all()


def test_what_it_cannot_do_is_said(model):
    (elements,) = model.encode_images([PILImage.new("RGB", (9, 9))], generated=True)
    assert elements.ids.tolist() == [FEATURE] * 4 and elements.features is None
    with pytest.raises(UsageError, match="cannot be made of them again"):
        model.decode_image(elements)
    for head in (model.image_logits, model.image_features):
        with pytest.raises(TypeError, match="painted at once"):
            head(torch.zeros(1, 32))
    assert model.form_of((32, 32)) == model.form
    with pytest.raises(UsageError, match="64 x 32"):
        model.form_of((64, 32))


# --- text -------------------------------------------------------------------------------------------------------------

IDS = TokenIds(begin=1, end=2, pad=39, begin_image=40, placeholder=41)
ROW = [1, 5, 6, 40, 41, 41, 7, 2, 1, 40, 41, 41, 8, 2, 39]


@pytest.mark.parametrize("element", [41, FEATURE])
def test_what_is_learnt_of_a_row(element):
    ids = torch.tensor([[element if id == 41 else id for id in ROW]])
    assert text_targets(ids, IDS).tolist() == [
        [5, 6, 40, IGNORED, IGNORED, 7, 2, IGNORED, IGNORED, IGNORED, IGNORED, 8, 2, IGNORED]
    ]
    captions = text_targets(ids, IDS, caption_only=True)
    assert captions.tolist() == [
        [IGNORED, IGNORED, 40, IGNORED, IGNORED, 7, 2, IGNORED, IGNORED, IGNORED, IGNORED, 8, 2, IGNORED]
    ]
    rest = text_targets(ids[:, 5:], IDS, caption_only=True)  # a row that begins within a document
    assert rest.tolist() == [[IGNORED] * 6 + [8, 2, IGNORED]]
    real = torch.arange(15).unsqueeze(0) < 7
    assert text_targets(ids, IDS, is_real=real).tolist() == [[5, 6, 40, IGNORED, IGNORED, 7] + [IGNORED] * 8]


def test_prompts_may_differ_in_length():
    ids = torch.tensor([[1, 5, 6, 7]] * 3)
    targets = text_targets(ids, IDS, prompt=torch.tensor([0, 2, 4]))
    assert targets.tolist() == [[5, 6, 7], [IGNORED, 6, 7], [IGNORED] * 3]
    assert torch.equal(text_targets(ids, IDS, prompt=2), targets[1:2].expand(3, -1))


def test_a_mean_over_nothing_is_refused():
    logits, targets = torch.randn(2, 4, 42), torch.full((2, 3), IGNORED)
    with pytest.raises(UsageError, match="no text is learnt in the whole batch"):
        text_loss(logits, targets)
    targets[0, 1], targets[1, 2] = 5, 7
    wanted = -(logits[0, 1].log_softmax(0)[5] + logits[1, 2].log_softmax(0)[7]) / 2
    torch.testing.assert_close(text_loss(logits, targets), wanted)


def test_marked_text_is_encoded_run_by_run():
    runs = []

    def encode(text):
        runs.append(text)
        return [100 + len(runs)]

    ids = tokenize_marked("foo <|beginofimage|><|image|><|image|> what is it? </s><s> so", encode, IDS)
    assert runs == ["foo", "what is it? ", " so"]
    assert ids == [1, 101, 40, 41, 41, 102, 2, 1, 103]
    runs.clear()
    assert tokenize_marked("<|beginofimage|> \n <|beginofimage|>a", encode, IDS, vectors=3) == (
        [1, 40, 41, 41, 41, 40, 41, 41, 41, 101]
    )
    assert runs == ["a"]


# --- configuration ----------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_released_model():
    config = MMInterleavedConfig()
    assert (config.canvas, config.grid, config.llm.vocabulary) == (512, (8, 8), 32002)
    assert MMInterleavedConfig.model_validate_json(config.model_dump_json()) == config
    with torch.device("meta"):
        model = MMInterleavedBackbone(config, byte_tokenizer(), "released")
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    wanted = {"decoder_sync": 363.0, "unet": 865.9, "unet_sync": 57.0, "context_proj": 26.2, "condition": 23.2}
    assert {name: round(sizes[name], 1) for name in wanted} == wanted
    computed = 44.56e6 + 257 * 1024  # positions, which the release stores
    assert round((sum(p.numel() for p in model.parameters()) + computed) / 1e9, 3) == 14.913


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"compat": True}, "compat needs decoder_sync.without_images bias"),
        ({"max_prev_images": 10}, "max_prev_images 10 is not below unet_sync.max_images 10"),
        ({"llm": {"width": 48}}, "eye.width 32 is not llm.width 48"),
        ({"tokens": {"placeholder": 999}}, "token 999 is beyond llm.vocabulary"),
        ({"tokens": {"begin_image": 5}}, r"are \(5, 261\), not the last of llm.vocabulary"),
        ({"unet_sync": {"sides": (8, 4)}}, "unet_sync.sides has 2 scales, the eye 4"),
        ({"unet": {"cross_attention_dim": 20}}, "condition.width 16 is not unet.cross_attention_dim 20"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(model, changes, complaint):
    values = model.config.model_dump()
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValidationError, match=complaint):
        MMInterleavedConfig.model_validate(values)
