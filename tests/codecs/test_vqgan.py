"""Chameleon's picture codec against the original architecture, computed apart from it."""

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import nn

from tests.codecs.classic_vqgan import SMALL, decode, encode, random_state
from weft.codecs.vqgan import VQGAN, module_key, released_key
from weft.errors import CheckpointError

SHAPES = {
    "three levels": SMALL,
    "one level": {**SMALL, "channel_multiplier": [2], "num_res_blocks": 1, "resolution": 3},
    "as released": {**SMALL, "channel_multiplier": [1, 1, 2, 2, 4], "resolution": 32},
}


def build(config, decoder=True):
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig

    return VQGAN(ChameleonVQVAEConfig(**config), decoder=decoder)


def loaded(config, state):
    codec = build(config)
    rename = module_key(len(config["channel_multiplier"]))
    codec.load_state_dict({rename(key): tensor for key, tensor in state.items()})
    return codec


def noise(config, count=3):
    side = config["resolution"]
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def picture(size, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(values)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_every_released_tensor_has_its_place(config):
    codec, state = build(config), random_state(config)
    rename = module_key(codec.levels)
    assert {rename(key): tensor.shape for key, tensor in state.items()} == {
        key: tensor.shape for key, tensor in codec.state_dict().items()
    }
    assert all(released_key(rename(key), codec.levels) == key for key in state)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_pixel_decoder_is_the_classic_one(config):
    state = random_state(config)
    rows = config["resolution"] // 2 ** (len(config["channel_multiplier"]) - 1)
    codes = torch.randint(config["num_embeddings"], (3, rows * rows), generator=torch.Generator().manual_seed(2))
    wanted = decode(state, codes, config)
    assert wanted.std() > 0.3
    # float32 sums in another order, after a dozen normalised layers
    torch.testing.assert_close(loaded(config, state).decode(codes), wanted.clamp(-1, 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_encoder_is_the_classic_one(config):
    state, pixels = random_state(config), noise(config)
    codes = loaded(config, state).encode(pixels)
    assert codes.dtype == torch.int64 and len(codes.unique()) > 3
    assert torch.equal(codes, encode(state, pixels, config))


@pytest.mark.parametrize("size", [(16, 16), (40, 23), (7, 31), (16, 50), (333, 17), (15, 16)])
def test_pictures_are_prepared_as_transformers_prepares_them(size):
    from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

    processor = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    codec = build({**SMALL, "resolution": 16}, decoder=False)
    wanted = processor(picture(size), return_tensors="pt")["pixel_values"][0]
    # the processor multiplies in float64
    torch.testing.assert_close(codec.prepare(picture(size)), wanted, rtol=0, atol=2e-7)


def test_pixels_and_codes_round_trip_in_shape_and_range():
    codec = loaded(SMALL, random_state(SMALL))
    codes = codec.encode(noise(SMALL))
    pixels = codec.decode(codes)
    assert codes.shape == (3, 4) and pixels.shape == (3, 3, 8, 8)
    assert pixels.abs().max() <= 1 and pixels.dtype == torch.float32
    again = codec.encode(pixels)
    assert again.shape == codes.shape and set(again.flatten().tolist()) <= set(range(16))
    assert torch.equal(codec.decode(codes), pixels)


def test_pictures_alone_have_the_codes_they_have_together():
    codec, pixels = loaded(SMALL, random_state(SMALL)), noise(SMALL)
    assert torch.equal(codec.encode(pixels), torch.cat([codec.encode(one[None]) for one in pixels]))


def test_it_stays_frozen_and_in_eval_mode():
    codec = build(SMALL)
    model = nn.Sequential(codec).train()
    assert model.training and not any(part.training for part in codec.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())


def test_without_a_decoder_pictures_are_read_and_not_drawn():
    codec = build(SMALL, decoder=False)
    codes = codec.encode(noise(SMALL))
    with pytest.raises(CheckpointError, match=r"without the decoder") as error:
        codec.decode(codes)
    assert "weft models convert" in error.value.fix and "vqgan/" in error.value.fix


def test_half_precision_weights_read_and_draw():
    codec = loaded(SMALL, random_state(SMALL)).to(torch.bfloat16)
    assert codec.decode(codec.encode(noise(SMALL))).dtype == torch.float32
