"""Train the picture codec of `weft/tiny` on picturebook scenes.    python -m pretraining.codec --out DIR

About 8 minutes on 2 CPU threads. Writes `codec.safetensors` and `codec_log.jsonl`.
"""

import argparse
import dataclasses
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from weft.codecs.vq import VQCodec, VQConfig
from weft.data.sources.picturebook import Scene, _pixels, draw, is_held_out, random_scene


def pictures(scenes: list[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(draw(scene)) for scene in scenes]))


def to_float(batch: torch.Tensor) -> torch.Tensor:
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(codec: VQCodec, batch: torch.Tensor) -> float:
    with torch.no_grad():
        pixels = to_float(batch)
        error = (codec.decode(codec.encode(pixels)) - pixels).square().mean().item()
    return 10 * math.log10(4 / error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--polish", type=Path, help="folder of a codec whose decoder alone is trained on; codes stay")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    scenes: list[Scene] = []
    while len(scenes) < 8000:
        scene = random_scene(rng)
        if not is_held_out(scene):
            scenes.append(scene)
    train = pictures(scenes)
    empty = torch.from_numpy(np.stack([_pixels(s.setting, s.time, ()) for s in scenes]))
    drawn = (train != empty).any(-1)
    held = [s for s in (random_scene(rng) for _ in range(6000)) if is_held_out(s)][:256]
    valid = pictures(held)

    config = VQConfig(codes=args.codes)
    codec = VQCodec(config)
    if args.polish:
        codec.load_state_dict(load_file(args.polish / "codec.safetensors"))
        codec.encoder.requires_grad_(False)
    weights = [p for name, p in codec.named_parameters() if name != "codebook.weight" and p.requires_grad]
    highest = 1e-3 if args.polish else 2e-3
    optimizer = torch.optim.AdamW(weights, lr=highest, betas=(0.9, 0.95), weight_decay=0.01)
    book = codec.codebook.weight.detach()
    count, total = torch.ones(config.codes), book.clone()

    def update_codebook(step: int, features: torch.Tensor, codes: torch.Tensor) -> None:
        flat, index = features.reshape(-1, config.code_width), codes.reshape(-1)
        # exponential moving averages of use and of the features that chose each entry
        count.mul_(0.97).index_add_(0, index, torch.full_like(index, 0.03, dtype=torch.float))
        total.mul_(0.97).index_add_(0, index, flat * 0.03)
        book.copy_(total / count.clamp_min(1e-5).unsqueeze(1))
        if step % 20 == 19 and step < 0.7 * args.steps:
            dead = (count < 0.05 * 0.03 * 20).nonzero().flatten()
            chosen = flat[torch.randint(len(flat), (len(dead),))]
            book[dead], total[dead], count[dead] = chosen, chosen, 1.0

    log, start = [], time.time()
    for step in range(args.steps):
        rate = highest * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pick = torch.tensor(rng.sample(range(len(scenes)), 32))
        pixels, weight = to_float(train[pick]), 1 + (0 if args.polish else 3) * drawn[pick].unsqueeze(1).float()
        features = codec.features(pixels)
        with torch.no_grad():
            codes = codec.nearest(features)
            if not args.polish:
                update_codebook(step, features, codes)
        quantised = codec.codebook.weight[codes].detach()
        out = codec.render(features + (quantised - features).detach())
        error = out - pixels
        loss = (weight * (0.5 * error.abs() + error.square())).mean() + 0.25 * (features - quantised).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99 or step == args.steps - 1:
            row = {
                "step": step + 1,
                "loss": round(loss.item(), 5),
                "psnr_db": round(psnr(codec, valid), 2),
                "codes_used": int((count > 1e-3).sum()),
                "seconds": round(time.time() - start, 1),
            }
            log.append(row)
            print(json.dumps(row), flush=True)
    metadata = {"config": json.dumps(dataclasses.asdict(config)), "seed": str(args.seed), "steps": str(args.steps)}
    save_file(
        {name: t.contiguous() for name, t in codec.state_dict().items()}, args.out / "codec.safetensors", metadata
    )
    (args.out / "codec_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


if __name__ == "__main__":
    main()
