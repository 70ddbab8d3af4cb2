"""The sizes of the tiny MM-Interleaved, and how its weights start.

Everything is of the same classes as the released model, small and trained from scratch: 6.2 M weights. Its eye takes
64 x 64 pixels as 4 x 4 patches, and the adapter's maps have sides 16, 8, 4 and 2.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from torch import nn

from weft.backbones.mm_interleaved.config import LlamaSizes, MMInterleavedConfig, SamplerConfig, TokenIds
from weft.backbones.mm_interleaved.text import BEGIN, BEGIN_IMAGE, END, PLACEHOLDER
from weft.codecs.resampler import ResamplerConfig
from weft.codecs.vision import VisionConfig, VisualTokenizerConfig
from weft.synchronizer.attach_llm import DecoderSyncConfig
from weft.synchronizer.attach_unet import UNetSyncConfig

WIDTH, FEATURES, ATTENDED = 128, 64, 128
"""Of the language model, of the eye's maps, and of what the U-Net attends to."""

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [64, 96],
    "layers_per_block": 1,
    "cross_attention_dim": ATTENDED,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "use_linear_projection": True,
}
TIMES, SHIFT = 1000, 5.0


def betas() -> list[float]:
    """Of a cosine schedule with `SHIFT` times as much noise as signal everywhere, as if pictures were larger.

    What is painted follows from the text almost wholly. All that is to be learnt about that is learnt where the noise
    hides the picture, and what remains of it under little noise are details that nobody sees: of a plain cosine
    schedule, one time in eight is of the first kind, of this one nearly half.
    """
    angles = [math.pi / 2 * (i + 1) / (TIMES + 1) for i in range(TIMES)]
    kept = [1.0] + [1 / (1 + (SHIFT * math.tan(angle)) ** 2) for angle in angles]
    return [round(1 - after / before, 8) for before, after in itertools.pairwise(kept)]


SCHEDULER = {
    "num_train_timesteps": TIMES,
    "trained_betas": betas(),
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}


def read_tokenizer(folder: Path) -> Tokenizer:
    """That of the tiny generalist, as LLaMA's is used: a space before every text, and two more tokens for pictures."""
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.normalizer = normalizers.Prepend(" ")
    words.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    words.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (BEGIN_IMAGE, PLACEHOLDER)]
    )
    return words


def config_of(vae: dict[str, Any], words: Tokenizer) -> MMInterleavedConfig:
    """
    Args:
        vae: as `vae.py` wrote it.
    """
    ids = {"begin": BEGIN, "end": END, "pad": "<pad>", "begin_image": BEGIN_IMAGE, "placeholder": PLACEHOLDER}
    return MMInterleavedConfig(
        llm=LlamaSizes(vocabulary=words.get_vocab_size(), width=WIDTH, mlp=256, layers=6, heads=4, context_length=1024),
        tokens=TokenIds(**{name: words.token_to_id(token) for name, token in ids.items()}),
        eye=VisualTokenizerConfig(
            vision=VisionConfig(
                side=64, patch=16, width=FEATURES, layers=4, heads=4, mlp=128, activation="gelu", stem=16, points=2
            ),
            resampler=ResamplerConfig(
                queries=16, width=FEATURES, source_width=FEATURES, layers=2, cross_every=1, heads=4, mlp=128
            ),
            width=WIDTH,
        ),
        decoder_sync=DecoderSyncConfig(
            every=3,
            feature_width=FEATURES,
            value_width=FEATURES,
            heads=4,
            points=4,
            sides=(8, 4, 2),
            base=4,
            max_images=10,
            offset_init=1.6,
        ),
        condition=ResamplerConfig(
            queries=28, width=ATTENDED, source_width=WIDTH, layers=1, heads=4, mlp=256, qk_norm=True
        ),
        unet=UNET,
        unet_sync=UNetSyncConfig(
            side=8, feature_width=FEATURES, value_width=FEATURES, heads=4, points=2, sides=(16, 8, 4, 2), max_images=4
        ),
        vae=vae,
        scheduler=SCHEDULER,
        sampler=SamplerConfig(steps=20, guidance=1.0),
        compat=False,
    )


@torch.no_grad()
def start(model: nn.Module) -> None:
    """Weights to train from scratch, in place, drawn from torch's own generator.

    The usual ones leave a trained language model and U-Net as they are: whatever is new adds nothing at first. Here
    nothing is trained yet, and zeros only delay what has to be learnt.
    """
    for part in (model.condition, model.eye.resampler, model.context_proj):
        for layer in part.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.7 * layer.in_features**-0.5)
    # The layers of the language model add little to what they read at first: pictures are painted from its states, and
    # these must say which word stands where, which to predict the next one they need not.
    nn.init.normal_(model.table.weight)
    nn.init.normal_(model.eye.proj.weight, std=FEATURES**-0.5)
    nn.init.normal_(model.head.weight, std=0.02)
    for new in (model.head.bias, model.head_new.weight, model.head_new.bias):
        nn.init.zeros_(new)
    # Visual tokens start with a patch each to look at, and what the U-Net attends to with a word each, counted from the
    # picture backwards: a query is a position, without what all positions have in common.
    for resampler, places in (
        (model.eye.resampler, model.eye.positions),
        (model.condition, model.distances[: model.config.condition.queries]),
    ):
        reader = resampler.layers[0].crossattention
        centred = places - places.mean(0)
        resampler.queries.copy_(centred / centred.std())
        reader.key.weight.copy_(reader.query.weight)
        nn.init.constant_(reader.q_norm.weight, 4.0)
        reader.dense.weight.mul_(4.0)  # what is read counts, not who asks
    for branch in model.decoder_sync.branches.values():
        nn.init.constant_(branch.gate, 0.3)
    for branch in model.unet_sync.branches.values():
        nn.init.xavier_uniform_(branch.conv.weight, gain=0.3)
