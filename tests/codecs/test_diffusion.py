"""The loop that draws pictures against one written out with diffusers' parts."""

import sys

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

from weft.codecs.diffusion import DiffusionConfig, DiffusionDecoder
from weft.errors import UsageError

WIDTH, QUERIES = 12, 4
UNET = {
    "sample_size": 6, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": WIDTH, "attention_head_dim": 2,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}  # fmt: skip
PLAIN = {key: value for key, value in UNET.items() if "addition" not in key and "projection_class" not in key}
VAE = {
    "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "layers_per_block": 1,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4, "scaling_factor": 0.13025,
}  # fmt: skip
SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading",
    "steps_offset": 1,
}  # fmt: skip


def make(unet=UNET, **options):
    torch.manual_seed(0)
    return DiffusionDecoder(DiffusionConfig(unet, VAE, SCHEDULER, **options)).requires_grad_(False).eval()


@pytest.fixture
def embeddings():
    return torch.randn(2, QUERIES, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def negative():
    return torch.randn(2, QUERIES, WIDTH, generator=torch.Generator().manual_seed(2))


def by_hand(decoder, embeddings, negative, steps, guidance, seed, *, plain=False):
    """One row after the other, the two halves of guidance apart, the size spelt out."""
    unet = UNet2DConditionModel.from_config(decoder.config.unet)
    unet.load_state_dict(decoder.unet.state_dict())
    vae = AutoencoderKL.from_config(VAE)
    vae.load_state_dict(decoder.vae.state_dict())
    drawn = torch.randn(len(embeddings), 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    pictures = []
    for row in range(len(embeddings)):
        scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
        scheduler.set_timesteps(steps)
        latents = drawn[row : row + 1] * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, time)
            noise = []
            for half in (embeddings[row : row + 1], negative[row : row + 1]):
                added = {"text_embeds": half.sum(1) / QUERIES, "time_ids": torch.tensor([12, 12, 0, 0, 12, 12])}
                with torch.no_grad():
                    out = unet(scaled, time, half, added_cond_kwargs=None if plain else added)
                noise.append(out.sample)
            latents = scheduler.step(noise[1] + guidance * (noise[0] - noise[1]), time, latents).prev_sample
        with torch.no_grad():
            pictures.append((vae.decode(latents / 0.13025).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(pictures)


def test_pictures_are_those_of_the_loop_written_out(embeddings, negative):
    decoder = make()
    made = decoder(embeddings, negative, steps=5, guidance=3.0, seed=7)
    assert made.shape == (2, 3, 12, 12) and made.dtype == torch.float32
    # rows alone and in a batch, convolutions sum in another order: fp32 rounding through five steps
    torch.testing.assert_close(made, by_hand(decoder, embeddings, negative, 5, 3.0, 7), rtol=0, atol=2e-6)


def test_one_batch_of_both_halves_gives_the_same_bits(embeddings, negative):
    decoder = make()
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(3)) * scheduler.init_noise_sigma
    both = torch.cat([embeddings[:1], negative[:1]])
    added = {"text_embeds": both.mean(1), "time_ids": torch.tensor([[12, 12, 0, 0, 12, 12]] * 2)}
    with torch.no_grad():
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(torch.cat([latents] * 2), time)
            cond, uncond = decoder.unet(scaled, time, both, added_cond_kwargs=added).sample.chunk(2)
            latents = scheduler.step(uncond + 3.0 * (cond - uncond), time, latents).prev_sample
        wanted = (decoder.vae.decode(latents / decoder.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    made = decoder(embeddings[:1], negative[:1], steps=4, guidance=3.0, seed=3)
    assert torch.equal(made, wanted)
    assert made.std() > 0.02 and not torch.equal(
        made, decoder(embeddings[:1], negative[:1], steps=4, guidance=3.0, seed=4)
    )


def test_what_the_unet_is_given(embeddings, negative, monkeypatch):
    decoder, seen = make(), []
    unet = decoder.unet.forward
    monkeypatch.setattr(
        decoder.unet, "forward", lambda *args, **kwargs: seen.append((args, kwargs)) or unet(*args, **kwargs)
    )
    decoder(embeddings, negative, steps=3, guidance=3.0, seed=0)
    assert len(seen) == 3
    for (noisy, _), given in seen:
        assert torch.equal(noisy[:2], noisy[2:])
        assert torch.equal(given["encoder_hidden_states"], torch.cat([embeddings, negative]))
        added = given["added_cond_kwargs"]
        torch.testing.assert_close(added["text_embeds"], torch.cat([embeddings, negative]).mean(1))
        assert added["time_ids"].tolist() == [[12, 12, 0, 0, 12, 12]] * 4


def test_guidance_of_one_needs_no_negative_and_no_second_half(embeddings, monkeypatch):
    decoder, rows = make(), []
    unet = decoder.unet.forward
    monkeypatch.setattr(
        decoder.unet, "forward", lambda x, *args, **kwargs: rows.append(len(x)) or unet(x, *args, **kwargs)
    )
    alone = decoder(embeddings, None, steps=2, guidance=1.0, seed=0)
    assert rows == [2, 2]
    torch.testing.assert_close(alone, by_hand(decoder, embeddings, embeddings * 5, 2, 1.0, 0), rtol=0, atol=2e-6)


def test_a_unet_that_takes_no_size_gets_none(embeddings, negative):
    decoder = make(PLAIN)
    made = decoder(embeddings, negative, steps=2, guidance=3.0, seed=0)
    torch.testing.assert_close(made, by_hand(decoder, embeddings, negative, 2, 3.0, 0, plain=True), rtol=0, atol=2e-6)


def test_bfloat16_weights_draw_nearly_the_same_picture(embeddings, negative):
    decoder = make()
    exact = decoder(embeddings, negative, steps=3, guidance=2.0, seed=0)
    rough = decoder.to(torch.bfloat16)(embeddings, negative, steps=3, guidance=2.0, seed=0)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.02


@pytest.mark.parametrize(
    "options, words",
    [({"steps": 0, "guidance": 3.0}, "0 steps"), ({"steps": 1, "guidance": 3.0}, "lead away from")],
)
def test_what_cannot_be_meant_is_refused(embeddings, options, words):
    with pytest.raises(UsageError, match=words):
        make()(embeddings, None, seed=0, **options)


def test_without_diffusers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"diffusers(.|\n)*pip install 'weft\[diffusion\]'"):
        make()
