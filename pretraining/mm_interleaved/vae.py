"""Train the autoencoder of the tiny MM-Interleaved on picturebook scenes.

    python -m pretraining.mm_interleaved.vae --out DIR
    python -m pretraining.mm_interleaved.vae --polish DIR --out DIR      its decoder alone, for cleaner pictures

diffusers' `AutoencoderKL`: 64 x 64 pixels to 8 x 8 cells of 8 numbers. Writes `vae.safetensors`, `vae.json` (its
config, with the scaling factor that was measured) and `vae_log.jsonl`.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from weft.codecs.pixels import to_picture
from weft.data.sources.picturebook import Reader, Scene, _pixels, is_held_out, random_scene

CONFIG = {
    "sample_size": 64,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
BATCH = 16
KL_WEIGHT = 2e-3
"""Of nats per colour value; pixels count 1 per unit of error."""
POLISH_NOISE = 0.05
"""Standard deviation, where that of latents is 1."""


def training_scene(rng: random.Random) -> Scene:
    while True:
        scene = random_scene(rng)
        if not is_held_out(scene):
            return scene


def pictures(scenes: list[Scene]) -> torch.Tensor:
    """(n, 3, 64, 64) uint8."""
    drawn = np.stack([_pixels(scene.setting, scene.time, scene.things) for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def backgrounds(scenes: list[Scene]) -> torch.Tensor:
    drawn = np.stack([_pixels(scene.setting, scene.time, ()) for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2)


def to_values(drawn: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return drawn.float() / 127.5 - 1


@torch.no_grad()
def check(vae: AutoencoderKL, scenes: list[Scene], reader: Reader) -> dict[str, float]:
    """Of reconstructions through the mean: PSNR in dB, share of pictures that the reader reads right."""
    drawn = to_values(pictures(scenes))
    again = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in drawn.split(64)])
    error = (again.clamp(-1, 1) - drawn).square().mean().item()
    right = [reader.read(to_picture((one + 1) * 127.5)) == scene for one, scene in zip(again, scenes, strict=True)]
    return {"psnr_db": round(10 * math.log10(4 / error), 2), "reader": sum(right) / len(right)}


@torch.no_grad()
def measured_scale(vae: AutoencoderKL, rng: random.Random) -> float:
    """What latents are multiplied by to have unit variance."""
    latents = vae.encode(to_values(pictures([training_scene(rng) for _ in range(512)]))).latent_dist.sample()
    return round(1 / latents.std().item(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--polish", type=Path, help="folder of one whose decoder alone is trained on: latents stay")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng, reader = random.Random(args.seed), Reader()
    held = [scene for scene in (random_scene(rng) for _ in range(6000)) if is_held_out(scene)][:256]
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    if args.polish:
        vae.load_state_dict(load_file(args.polish / "vae.safetensors"))
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    scale = json.loads((args.polish / "vae.json").read_text())["scaling_factor"] if args.polish else None
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01)

    log, start = [], time.time()
    for step in range(args.steps):
        rate = args.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        scenes = [training_scene(rng) for _ in range(BATCH)]
        drawn = pictures(scenes)
        weight = 1 + 3 * (drawn != backgrounds(scenes)).any(1, keepdim=True).float()
        pixels = to_values(drawn).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.sample()
        if args.polish:
            # as the U-Net makes them: nearly right
            latents = latents + POLISH_NOISE / scale * torch.randn_like(latents)
        error = vae.decode(latents).sample - pixels
        divergence = posterior.kl().mean() / pixels[0].numel()
        loss = (weight * (0.5 * error.abs() + error.square())).mean() + KL_WEIGHT * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 100 == 99 or step == args.steps - 1:
            row = {"step": step + 1, "loss": round(loss.item(), 5), "nats": round(posterior.kl().mean().item(), 1)}
            row |= check(vae, held, reader) | {"seconds": round(time.time() - start, 1)}
            log.append(row)
            print(json.dumps(row), flush=True)
            (args.out / "vae_log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in log))
            config = CONFIG | {"scaling_factor": scale or measured_scale(vae, random.Random(1))}
            (args.out / "vae.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file({name: t.contiguous() for name, t in vae.state_dict().items()}, args.out / "vae.safetensors")


if __name__ == "__main__":
    main()
