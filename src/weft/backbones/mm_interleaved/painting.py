"""How MM-Interleaved paints: from the states of what stands before a picture, by diffusion in the latents of a VAE.

    <s> a cat [IMG]   --contexts_of-->   [IMG] cat a <s>    nearest first, from the begin of the picture's document
                                         --resampler-->     what the U-Net attends to (M, Q, E)

    learning   latents (T, C, h, w) + noise --U-Net--> the noise;  of each picture, mean (predicted - noise)^2
    painting   noise --steps of a scheduler, guided--> latents --VAE--> pixels

Knows no weights: the parts are handed in. Source: Tian et al. 2024 (arXiv:2401.10208), and the released model.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from weft.errors import UsageError
from weft.synchronizer.mmfs import FeatureBank
from weft.synchronizer.visibility import nearest_first

SHORTEST = 3
"""Tokens of a context from which a picture is learnt; before a document's first picture there may be fewer."""
ENCODED_AT_ONCE = 32
"""Pictures, by the VAE."""
SCHEDULERS = (
    "DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DDIMScheduler", "PNDMScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
)  # fmt: skip
"""Of diffusers, those that draw from a model of noise like this one and need no other package."""


# --- what stands before a picture -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contexts:
    """What stands before each of T pictures: their begin token first, then backwards."""

    states: Tensor
    """(T, n, D), zero after the end."""
    keep: Tensor
    """(T, n) bool."""

    @property
    def lengths(self) -> Tensor:
        """(T,)"""
        return self.keep.sum(1)


def contexts_of(hidden: Tensor, is_start: Tensor, begins: Tensor, chosen: Tensor) -> Contexts:
    """The contexts of some pictures of a batch.

    Args:
        hidden: (B, L, D).
        is_start: (B, L) bool, True where a document starts. Before the first one, contexts reach back to position 0.
        begins: (B, N) the begin token of each picture.
        chosen: (B, N) bool, T in all.
    """
    rows, ends = chosen.nonzero()[:, 0], begins[chosen]
    places = torch.arange(hidden.shape[1], device=hidden.device)
    starts = torch.where(is_start[rows] & (places <= ends.unsqueeze(1)), places, 0).amax(1)
    lengths = ends - starts + 1
    distances = torch.arange(int(lengths.max()), device=hidden.device)
    keep = distances < lengths.unsqueeze(1)
    states = hidden[rows.unsqueeze(1), (ends.unsqueeze(1) - distances).clamp_min(0)]
    return Contexts(states.masked_fill(~keep.unsqueeze(2), 0.0), keep)


def earlier_pictures(bank: FeatureBank, is_there: Tensor, seen: Tensor, chosen: Tensor) -> tuple[FeatureBank, Tensor]:
    """The pictures that some pictures see, for each its own.

    Args:
        bank: (M, 1, V, F), all pictures of the batch.
        is_there: (B, N) bool, M in all.
        seen: (B, N, N) bool: [b, i, n] is True where picture i sees picture n.
        chosen: (B, N) bool, T in all.

    Returns:
        (T, K, V, F), the nearest last, and (T, K) bool which of them is seen; K is 0 where nothing is.
    """
    nearest = nearest_first(seen)[chosen].flip(1)  # (T, K) numbers within the sequence
    visible = nearest >= 0
    number = is_there.flatten().cumsum(0).view(is_there.shape) - 1
    rows = chosen.nonzero()[:, :1]
    features = bank.features[number[rows, nearest.clamp_min(0)], 0]
    return FeatureBank(features.masked_fill(~visible[..., None, None], 0.0), bank.shapes), visible


# --- learning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """All that is random where T pictures are learnt."""

    posterior: Tensor
    """(T, C, h, w) normal: which latents of a picture."""
    noise: Tensor
    """(T, C, h, w) normal."""
    times: Tensor
    """(T,) int64: of how much noise."""
    uniform: Tensor
    """(T,) in [0, 1): the condition is dropped where it is low."""

    @classmethod
    def make(cls, shape: tuple[int, int, int, int], times: int, device: torch.device) -> Self:
        """From torch's own generator."""
        posterior, noise = (torch.randn(shape, device=device) for _ in range(2))
        return cls(
            posterior, noise, torch.randint(times, shape[:1], device=device), torch.rand(shape[0], device=device)
        )


@dataclass(frozen=True)
class Denoised:
    """Pictures with noise, and what was made of them."""

    contexts: Contexts
    condition: Tensor
    """(T, Q, E) what the U-Net attended to."""
    noisy: Tensor
    """(T, C, h, w)"""
    predicted: Tensor
    """(T, C, h, w)"""
    wanted: Tensor
    """(T, C, h, w): the noise, or the velocity where the U-Net predicts that."""

    @property
    def errors(self) -> Tensor:
        """(T,) mean squared."""
        return (self.predicted.float() - self.wanted).square().flatten(1).mean(1)


@torch.no_grad()
def latents_of(vae: Any, painted: Tensor, posterior: Tensor) -> Tensor:
    """Pictures (T, 3, side, side) in [0, 255] -> latents (T, C, h, w) float32, drawn by `posterior`."""
    found = []
    with torch.autocast(painted.device.type, enabled=False):
        for pixels, draw in zip(painted.split(ENCODED_AT_ONCE), posterior.split(ENCODED_AT_ONCE), strict=True):
            latents = vae.encode(pixels.to(vae.dtype) / 127.5 - 1).latent_dist
            found.append(latents.mean.float() + latents.std.float() * draw)
    return torch.cat(found) * vae.config.scaling_factor


def add_noise(scheduler: Any, latents: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Latents -> the same with noise, and what the U-Net is to predict."""
    noisy = scheduler.add_noise(latents, draws.noise, draws.times)
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(latents, draws.noise, draws.times)
    return noisy, draws.noise


# --- painting ---------------------------------------------------------------------------------------------------------


def make_scheduler(name: str, values: Mapping[str, Any]) -> Any:
    """One of `SCHEDULERS`, for the noise that `values` describes.

    Raises:
        UsageError: there is none of that name; or diffusers is not installed.
    """
    if name not in SCHEDULERS:
        near = difflib.get_close_matches(name, SCHEDULERS, n=1, cutoff=0.6)
        known = f"use one of {', '.join(SCHEDULERS)}"
        raise UsageError(
            f"there is no scheduler {name!r} to paint with", fix=f"did you mean {near[0]}?" if near else known
        )
    return getattr(diffusers(), name).from_config(dict(values))


@torch.no_grad()
def denoise(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, noise: Tensor, guidance: float,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Noise -> latents (B, C, h, w), float32.

    Args:
        predict: noisy latents and a time -> what the U-Net predicts. With guidance the latents come twice: first to be
            painted without a condition, then with it.
        scheduler: with its steps set.
        guidance: 1 is off.
        generator: on the CPU, so that pictures are the same on every device.
    """
    drawn = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = noise * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents if guidance == 1 else torch.cat((latents, latents)), time)
        predicted = predict(noisy, time).float()
        if guidance != 1:
            without, given = predicted.chunk(2)
            predicted = without + guidance * (given - without)
        latents = scheduler.step(predicted, time, latents, **drawn).prev_sample
    return latents


@torch.no_grad()
def pixels_of(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> pixels (B, 3, side, side) float32 in [0, 1]."""
    with torch.autocast(latents.device.type, enabled=False):
        decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def make_unet(values: Mapping[str, Any]) -> nn.Module:
    return diffusers().UNet2DConditionModel.from_config(dict(values))


def make_vae(values: Mapping[str, Any]) -> nn.Module:
    return diffusers().AutoencoderKL.from_config(dict(values))


def diffusers() -> Any:
    """The package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import diffusers as package
    except ImportError as error:
        raise UsageError(
            "pictures of this model are painted by a diffusion model, for which diffusers is not installed",
            fix="pip install 'weft[diffusion]'",
        ) from error
    return package
