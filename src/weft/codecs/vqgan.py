"""Chameleon's picture codec: the VQGAN encoder and quantiser of transformers, and the pixel decoder that it leaves out.

    picture --prepare--> pixels (M, 3, side, side) --encode--> codes (M, P) --decode--> pixels in [-1, 1]

Knows pictures and codes. Which tokens stand for codes is the backbone's business (`backbones/chameleon.py`).
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from weft.codecs.pixels import to_values
from weft.errors import CheckpointError

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from transformers import ChameleonVQVAEConfig

RESCALE = 0.0078
"""Takes 8-bit values to [-1, 0.989], as transformers' processor of this model does. Meta's own code divides by 127.5
instead, up to 1: the largest difference is 0.011, one and a half grey levels."""
LEVEL = re.compile(r"^(decoder\.up\.)(\d+)(\..+)$")


class VQGAN(nn.Module):
    """Frozen: always in eval mode, whatever the model around it is in.

    `vq` is transformers' `ChameleonVQVAE`; `decoder` is None where the checkpoint holds no pixel decoder.
    """

    def __init__(self, config: "ChameleonVQVAEConfig", *, decoder: bool) -> None:
        """
        Args:
            config: may also have `out_channels`; `base_channels` is a multiple of 32, which the norms need.
            decoder: build the pixel decoder.
        """
        from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

        super().__init__()
        self.side = config.resolution
        self.levels = len(config.channel_multiplier)
        self.vq = ChameleonVQVAE(config)
        self.decoder = _decoder(config) if decoder else None
        self.requires_grad_(False).eval()

    @property
    def grid(self) -> tuple[int, int]:
        rows = self.side // 2 ** (self.levels - 1)
        return rows, rows

    def train(self, mode: bool = True) -> "VQGAN":
        return super().train(False)

    def prepare(self, picture: "PILImage.Image") -> Tensor:
        """An RGB picture of any size -> (3, side, side): the shorter edge to `side` by Lanczos, the centre cut out."""
        from PIL import Image as PILImage

        width, height = picture.size
        shorter = min(width, height)
        if shorter != self.side:
            size = (self.side * width // shorter, self.side * height // shorter)
            picture = picture.resize(size, PILImage.Resampling.LANCZOS)
        left, top = (picture.width - self.side) // 2, (picture.height - self.side) // 2
        picture = picture.crop((left, top, left + self.side, top + self.side))
        return to_values(picture) * RESCALE - 1

    def encode(self, pixels: Tensor) -> Tensor:
        """(M, 3, side, side) -> (M, P) int64 codes, row by row."""
        weight = self.vq.quantize.embedding.weight
        codes = self.vq.encode(pixels.to(weight.device, weight.dtype)).image_tokens
        return codes.view(len(pixels), -1)

    def decode(self, codes: Tensor) -> Tensor:
        """(M, P) codes -> (M, 3, side, side) float32 in [-1, 1].

        Raises:
            CheckpointError: the checkpoint holds no pixel decoder.
        """
        if self.decoder is None:
            raise CheckpointError(
                "this checkpoint reads pictures and cannot draw them: it came without the decoder of its VQGAN",
                fix="convert the original release, which has it (weft models convert), or put a VQGAN that has it, as "
                "leloy/Anole-7b-v0.1-vqvae-hf, into the folder vqgan/ of the checkpoint",
            )
        embedding = self.vq.quantize.embedding
        latent = embedding(codes.to(embedding.weight.device)).unflatten(1, self.grid).permute(0, 3, 1, 2)
        return self.decoder(self.vq.post_quant_conv(latent)).float().clamp(-1, 1)


def _decoder(config: "ChameleonVQVAEConfig") -> nn.Module:
    """The classic VQGAN decoder, from Janus's: that one also has attention at its lowest resolution."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

    decoder = JanusVQVAEDecoder(
        JanusVQVAEConfig(
            latent_channels=config.latent_channels,
            base_channels=config.base_channels,
            channel_multiplier=list(config.channel_multiplier),
            num_res_blocks=config.num_res_blocks,
            dropout=config.dropout,
            out_channels=getattr(config, "out_channels", config.in_channels),
        )
    )
    decoder.up[0].attn = nn.ModuleList()
    return decoder


def module_key(levels: int) -> Callable[[str], str]:
    """How a released VQGAN's keys (`encoder.`, `decoder.`, `quantize.`, ...) become those of `VQGAN`.

    Releases number the decoder's levels from the full resolution down, Janus's class from the lowest up.
    """

    def rename(key: str) -> str:
        return _reversed(key, levels) if key.startswith("decoder.") else f"vq.{key}"

    return rename


def released_key(key: str, levels: int) -> str:
    """The inverse of `module_key`."""
    return _reversed(key, levels) if key.startswith("decoder.") else key.removeprefix("vq.")


def _reversed(key: str, levels: int) -> str:
    return LEVEL.sub(lambda match: f"{match[1]}{levels - 1 - int(match[2])}{match[3]}", key)
