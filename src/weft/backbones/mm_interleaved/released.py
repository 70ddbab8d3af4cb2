"""How the released MM-Interleaved names its tensors, and which of them our model computes itself.

`released_key` is the one place where the names meet; `key_map` is the same for all tensors of a model, with `tables`
it is the whole of a release: 2,659 tensors of the 13B model. Nothing is renamed by guessing, and nothing is left over.
Rows of weights that nothing reads (those of the null slot) and the null slot's value stay as they were stored.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.backbones.mm_interleaved.config import MMInterleavedConfig
from weft.codecs.vision import MEAN, STD
from weft.ops.positions import grid_sin_cos
from weft.synchronizer.attach_unet import MIDDLE

_RESAMPLER = {
    "queries": "queries",
    "norm.": "blip2qformer.layernorm.",
    "layers.#.mlp.fc1.": "blip2qformer.encoder.layer.#.intermediate_query.dense.",
    "layers.#.mlp.fc2.": "blip2qformer.encoder.layer.#.output_query.dense.",
    "layers.#.mlp.norm.": "blip2qformer.encoder.layer.#.output_query.LayerNorm.",
} | {
    f"layers.#.{attention}.{ours}": f"blip2qformer.encoder.layer.#.{attention}.{released}"
    for attention in ("attention", "crossattention")
    for ours, released in {"": "attention.", "dense.": "output.dense.", "norm.": "output.LayerNorm."}.items()
}
_ENCODER, _UNET_SYNC = "visual_tokenizer.encoder.vision_model", "image_decoder.decoder.mmfs_module"
_KEYS = {
    "table.": "mm_decoder.embed_tokens.",
    "soi": "soi_token",
    "decoder.": "mm_decoder.",
    "decoder_sync.branches.#.gate": "mm_decoder.layers.#.llama_cross_attn.gate",
    "decoder_sync.branches.#.query_norm.": "mm_decoder.layers.#.llama_cross_attn.norm1.",
    "decoder_sync.branches.#.feat_norm.": "mm_decoder.layers.#.llama_cross_attn.norm2.",
    "decoder_sync.branches.#.mmfs.": "mm_decoder.layers.#.llama_cross_attn.attn.",
    "head.": "text_decoder.head.",
    "head_new.": "text_decoder.head_new.",
    "eye.": "visual_tokenizer.",
    "eye.encoder.trunk.": f"{_ENCODER}.",
    "eye.encoder.adapter.": f"{_ENCODER}.adapter_",
    "eye.encoder.adapter.interactions.#.extractor.ffn.dwconv.": (
        f"{_ENCODER}.adapter_interactions.#.extractor.ffn.dwconv.dwconv."
    ),
    "eye.encoder.adapter.interactions.#.extra_extractors.#.ffn.dwconv.": (
        f"{_ENCODER}.adapter_interactions.#.extra_extractors.#.ffn.dwconv.dwconv."
    ),
    "context_proj.": "context_feat_proj.",
    "blank": "image_decoder.neg_prompt_embeds",
    "unet.": "image_decoder.decoder.unet.",
    "vae.": "image_decoder.decoder.vae.",
    "unet_sync.branches.#.": f"{_UNET_SYNC}.mmfs_down_blocks.#.",
    f"unet_sync.branches.{MIDDLE}.": f"{_UNET_SYNC}.mmfs_mid_block.",
} | {
    f"{part}.{ours}": f"{home}.perceiver_resampler.{released}"
    for part, home in (("eye.resampler", "visual_tokenizer"), ("condition", "image_decoder"))
    for ours, released in _RESAMPLER.items()
}
"""How a key begins, ours -> released; the longest that fits counts. # is a number."""
_PATTERNS = [
    (re.compile(re.escape(ours).replace(re.escape("#"), r"(\d+)")), _KEYS[ours])
    for ours in sorted(_KEYS, key=len, reverse=True)
]


def released_key(key: str) -> str:
    """The released name of one of our tensors.

    Raises:
        KeyError: an MM-Interleaved has no such tensor.
    """
    for pattern, released in _PATTERNS:
        if match := pattern.match(key):
            return released.replace("#", "{}").format(*match.groups()) + key[match.end() :]
    raise KeyError(key)


def key_map(module: nn.Module) -> dict[str, str]:
    """Released name -> ours, of every tensor that our model stores."""
    keys = {released_key(key): key for key in module.state_dict()}
    assert len(keys) == len(module.state_dict()), "two of our tensors have the same released name"
    return keys


def tables(model: nn.Module) -> Mapping[str, Callable[[], Tensor]]:
    """Released name -> what our model computes instead: positions, the mean and the spread of colours."""
    config = cast(MMInterleavedConfig, model.config)
    vision, side = config.eye.vision, config.unet_sync.side
    found: dict[str, Callable[[], Tensor]] = {
        "visual_tokenizer.clip_mean": lambda: torch.tensor(MEAN).view(1, 3, 1, 1),
        "visual_tokenizer.clip_std": lambda: torch.tensor(STD).view(1, 3, 1, 1),
        # the class token has no position
        "visual_tokenizer.pos_embed": lambda: F.pad(grid_sin_cos(vision.grid, vision.grid, vision.width), (0, 0, 1, 0)),
        f"{_ENCODER}.embeddings.position_ids": lambda: torch.arange(vision.grid**2 + 1).unsqueeze(0),
    }
    for key, bias in model.state_dict().items():
        if key.startswith("unet_sync.") and key.endswith(".conv.bias"):
            table = released_key(key.removesuffix("conv.bias") + "pos_embed")
            found[table] = partial(grid_sin_cos, side, side, len(bias))
    return found
