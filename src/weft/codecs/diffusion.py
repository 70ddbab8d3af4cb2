"""Vectors -> pixels by a latent diffusion model: diffusers' U-Net, autoencoder and Euler steps, driven by our loop.

    noise (B, C, h, w) --Euler steps, guided--> latents --decoder of the autoencoder--> pixels (B, 3, side, side)

The U-Net attends to the vectors; one that is shaped like SDXL's also takes their mean and the size of the picture.
U-Net and autoencoder run in their weights' dtype, as Emu2's makers run them; the latents between steps stay float32.
There is no safety checker: whoever shows these pictures to others decides what to check.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import UsageError


@dataclass(frozen=True)
class DiffusionConfig:
    unet: dict[str, Any]
    """What diffusers writes to the U-Net's folder."""
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    """Of the noise the U-Net was trained on, whichever sampler it names: the steps are Euler's."""
    steps: int = 50
    """Unless asked for another number; so is `guidance`."""
    guidance: float = 3.0


class DiffusionDecoder(nn.Module):
    """A U-Net and an autoencoder; see the module's docstring."""

    def __init__(self, config: DiffusionConfig) -> None:
        """
        Raises:
            UsageError: diffusers is not installed.
        """
        diffusers = _diffusers()
        super().__init__()
        self.config = config
        self.unet = diffusers.UNet2DConditionModel.from_config(config.unet)
        self.vae = diffusers.AutoencoderKL.from_config(config.vae)

    @property
    def side(self) -> int:
        """Pixels along one side of a picture."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def forward(self, embeddings: Tensor, negative: Tensor | None, *, steps: int, guidance: float, seed: int) -> Tensor:
        """Draw one picture for each row.

        Args:
            embeddings: (B, P, F), what the pictures should show.
            negative: (B, P, F), what guidance leads away from; not read where `guidance` is 1.
            guidance: noise is predicted as that of `negative` + guidance * (that of `embeddings` - that of `negative`).
            seed: of the first noise, which is drawn on the CPU: the same on every device.

        Returns:
            (B, 3, side, side) float32 in [0, 1].

        Raises:
            UsageError: no steps, or guidance without a negative.
        """
        if steps < 1:
            raise UsageError(f"a picture cannot be made in {steps} steps", fix="use 1 or more; 50 is usual")
        guided = guidance != 1
        if guided and negative is None:
            raise UsageError("guidance needs something to lead away from", fix="give `negative`, or use guidance 1")
        weight = next(self.unet.parameters())
        condition = (torch.cat((embeddings, negative)) if negative is not None and guided else embeddings).to(weight)
        added = self._added(condition)
        scheduler = _diffusers().EulerDiscreteScheduler.from_config(self.config.scheduler)
        scheduler.set_timesteps(steps, device=weight.device)
        size = self.unet.config.sample_size
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(len(embeddings), self.unet.config.in_channels, size, size, generator=generator)
        latents = noise.to(weight.device) * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            noisy = scheduler.scale_model_input(torch.cat((latents, latents)) if guided else latents, time)
            out = self.unet(noisy.to(weight.dtype), time, encoder_hidden_states=condition, added_cond_kwargs=added)
            predicted = out.sample.float()
            if guided:
                wanted, unwanted = predicted.chunk(2)
                predicted = unwanted + guidance * (wanted - unwanted)
            latents = scheduler.step(predicted, time, latents).prev_sample
        return self._pixels(latents)

    def _added(self, condition: Tensor) -> dict[str, Tensor] | None:
        if self.unet.config.addition_embed_type != "text_time":
            return None
        # height and width of the original, rows and columns cut off above and left, height and width wanted
        size = torch.tensor((self.side, self.side, 0, 0, self.side, self.side), device=condition.device)
        return {"text_embeds": condition.mean(1), "time_ids": size.expand(len(condition), -1)}

    def _pixels(self, latents: Tensor) -> Tensor:
        latents = (latents / self.vae.config.scaling_factor).to(next(self.vae.parameters()))
        return (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(
            "pictures of this model are drawn by a diffusion model, for which diffusers is not installed",
            fix="pip install 'weft[diffusion]'",
        ) from error
    return diffusers
