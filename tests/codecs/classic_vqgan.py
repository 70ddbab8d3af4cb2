"""The VQGAN of taming-transformers in functions of its state dict, with its original key names: a second computation.

No part of the package is used here. `SMALL` is a size at which every kind of block occurs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = {
    "embed_dim": 8, "num_embeddings": 16, "latent_channels": 6, "base_channels": 32, "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 2, "resolution": 8, "attn_resolutions": [], "in_channels": 3, "out_channels": 3,
}  # fmt: skip


def random_state(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of a released `vqgan.ckpt`, from the architecture alone."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def conv(name, width_in, width_out, kernel):
        std = 1.5 / (width_in * kernel**2) ** 0.5
        state[f"{name}.weight"] = torch.randn(width_out, width_in, kernel, kernel, generator=generator) * std
        state[f"{name}.bias"] = torch.randn(width_out, generator=generator) * 0.1

    def norm(name, width):
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) * 0.1
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1

    def block(name, width_in, width_out):
        norm(f"{name}.norm1", width_in)
        conv(f"{name}.conv1", width_in, width_out, 3)
        norm(f"{name}.norm2", width_out)
        conv(f"{name}.conv2", width_out, width_out, 3)
        if width_in != width_out:
            conv(f"{name}.nin_shortcut", width_in, width_out, 1)

    def middle(name, width):
        block(f"{name}.block_1", width, width)
        norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", width, width, 1)
        block(f"{name}.block_2", width, width)

    widths = [config["base_channels"] * times for times in config["channel_multiplier"]]
    latent, blocks, top = config["latent_channels"], config["num_res_blocks"], len(widths) - 1
    conv("encoder.conv_in", 3, config["base_channels"], 3)
    width = config["base_channels"]
    for level, wide in enumerate(widths):
        for i in range(blocks):
            block(f"encoder.down.{level}.block.{i}", width, wide)
            width = wide
        if level != top:
            conv(f"encoder.down.{level}.downsample.conv", wide, wide, 3)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, latent, 3)

    conv("decoder.conv_in", latent, width, 3)
    middle("decoder.mid", width)
    for level in reversed(range(len(widths))):
        for i in range(blocks + 1):
            block(f"decoder.up.{level}.block.{i}", width, widths[level])
            width = widths[level]
        if level != 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)

    state["quantize.embedding.weight"] = torch.randn(config["num_embeddings"], config["embed_dim"], generator=generator)
    conv("quant_conv", latent, config["embed_dim"], 1)
    conv("post_quant_conv", config["embed_dim"], latent, 1)
    return state


def encode(state: dict[str, Tensor], pixels: Tensor, config: dict) -> Tensor:
    """(M, 3, side, side) -> (M, P) codes."""
    x = _conv(state, "encoder.conv_in", pixels)
    top = len(config["channel_multiplier"]) - 1
    for level in range(top + 1):
        for i in range(config["num_res_blocks"]):
            x = _block(state, f"encoder.down.{level}.block.{i}", x)
        if level != top:
            name = f"encoder.down.{level}.downsample.conv"
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), state[f"{name}.weight"], state[f"{name}.bias"], stride=2)
    x = _middle(state, "encoder.mid", x)
    x = _conv(state, "encoder.conv_out", _swish(_norm(state, "encoder.norm_out", x)))
    x = _conv(state, "quant_conv", x).flatten(2).transpose(1, 2)  # (M, P, embed_dim)
    return torch.cdist(x, state["quantize.embedding.weight"][None]).argmin(-1)


def decode(state: dict[str, Tensor], codes: Tensor, config: dict) -> Tensor:
    """(M, P) codes -> (M, 3, side, side), not clamped."""
    rows = config["resolution"] // 2 ** (len(config["channel_multiplier"]) - 1)
    latent = state["quantize.embedding.weight"][codes].reshape(len(codes), rows, rows, -1).permute(0, 3, 1, 2)
    x = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", latent))
    x = _middle(state, "decoder.mid", x)
    for level in reversed(range(len(config["channel_multiplier"]))):
        for i in range(config["num_res_blocks"] + 1):
            x = _block(state, f"decoder.up.{level}.block.{i}", x)
        if level != 0:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = _conv(state, f"decoder.up.{level}.upsample.conv", x)
    return _conv(state, "decoder.conv_out", _swish(_norm(state, "decoder.norm_out", x)))


def _swish(x):
    return x * torch.sigmoid(x)


def _norm(state, name, x):
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def _conv(state, name, x):
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _block(state, name, x):
    h = _conv(state, f"{name}.conv1", _swish(_norm(state, f"{name}.norm1", x)))
    h = _conv(state, f"{name}.conv2", _swish(_norm(state, f"{name}.norm2", h)))
    return h + (_conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def _middle(state, name, x):
    x = _block(state, f"{name}.block_1", x)
    h = _norm(state, f"{name}.attn_1.norm", x)
    q, k, v = (_conv(state, f"{name}.attn_1.{part}", h).flatten(2).transpose(1, 2)[:, None] for part in "qkv")
    h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
    return _block(state, f"{name}.block_2", x + _conv(state, f"{name}.attn_1.proj_out", h))
