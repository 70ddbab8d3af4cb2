"""Train the tiny MM-Interleaved on single skills and on stories, all of its parts but the autoencoder.

    torchrun --nproc-per-node 2 -m pretraining.mm_interleaved.train --vae DIR --tokenizer DIR --out DIR [--resume]

    draw    caption -> picture
    tell    picture -> caption
    story   caption -> picture, then (sentence, picture) twice, the sentences of the model's own choice

Held-out scenes (`is_held_out`) are never shown. A step's documents and noise follow from the seed and its number, so a
killed run goes on from its checkpoint as if nothing had happened. Two processes of one thread each share a step: on a
busy machine two threads of one process wait for each other thousands of times a step. The rate is constant and falls
over the last quarter of the steps. Writes `checkpoint/`, `log.jsonl` and, at the end, `model/`, which `weft` loads.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from pretraining.mm_interleaved.check import check, image
from pretraining.mm_interleaved.model import config_of, read_tokenizer, start
from weft.atomic import write_folder, write_text
from weft.backbones.base import encode_document
from weft.backbones.mm_interleaved import MMInterleavedBackbone
from weft.data.collate import Batch, collate
from weft.data.sources.picturebook import Reader, is_held_out, random_scene, random_story
from weft.document import Document, assistant, user
from weft.training.objective import LossConfig, Objective, count_targets

STORIES, PAIRS = 5, 10
"""Documents in a step, of each process: every third step learns from stories, the others from pairs, so that short
documents are not padded to the length of stories."""
TOLD = 0.4
"""Share of pairs that are to be told; the others are to be drawn."""
WARM_UP, DECAY = 100, 0.25
"""Steps until the full rate; the share of all steps over which it falls."""
SLOWER = {"sampling_offsets": 0.2, "resampler": 0.3, "condition": 0.5, "eye": 0.5, "decoder": 0.4}
"""Shares of the full rate, the first that fits. A point that has left the picture has no gradient to come back; norms
behind each part make resamplers sensitive: at the full rate their attention hardens before it knows what to look at."""
LOSS = LossConfig(image_weight=1.0)


def story(rng: random.Random) -> Document:
    made = random_story(rng, held_out=False)
    parts = [image(made.scenes[0])]
    for sentence, scene in zip(made.edits, made.scenes[1:], strict=True):
        parts += [sentence, image(scene)]
    return Document((user(made.scenes[0].caption()), assistant(*parts)))


def pair(rng: random.Random) -> Document:
    scene = random_scene(rng)
    while is_held_out(scene):
        scene = random_scene(rng)
    if rng.random() < TOLD:
        return Document((user(image(scene)), assistant(scene.caption())))
    return Document((user(scene.caption()), assistant(image(scene))))


def batch_of(model: MMInterleavedBackbone, seed: int, step: int, rank: int) -> Batch:
    """What a process learns in a step; also seeds torch, for its noise."""
    rng = random.Random(f"{seed}, {step}, {rank}")
    torch.manual_seed(rng.getrandbits(63))
    documents = [story(rng) for _ in range(STORIES)] if step % 3 == 0 else [pair(rng) for _ in range(PAIRS)]
    return collate([encode_document(model, document) for document in documents], model.tokens.pad)


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.AdamW:
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = next((share for part, share in SLOWER.items() if part in name), 1.0)
            groups.setdefault((share, 0.02 if parameter.dim() > 1 else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": of, "lr": rate * share, "full": rate * share, "weight_decay": decay}
            for (share, decay), of in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def average_gradients(parameters: list[Tensor]) -> None:
    """Over all processes."""
    if distributed.get_world_size() == 1:
        return
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def rate_at(step: int, steps: int) -> float:
    """Of the full one: 1 step is taken at the end of the warm-up, none at zero."""
    return min(1.0, (step + 1) / WARM_UP, max(0.01, (steps - step) / (DECAY * steps)))


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, step: int) -> None:
    """All that a run needs to go on; on the disk whole or not at all."""
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{name}": value for i, of in state.items() for name, value in of.items()}
    with write_folder(folder) as into:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, into / "model.safetensors")
        save_file({name: t.contiguous() for name, t in moments.items()}, into / "optimizer.safetensors")
        (into / "step.json").write_text(json.dumps({"step": step}))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> int:
    model.load_state_dict(load_file(folder / "model.safetensors"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        i, which = name.split(".")
        state.setdefault(int(i), {})[which] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(json.loads((folder / "step.json").read_text())["step"])


def build(vae: Path, tokenizer: Path, seed: int) -> MMInterleavedBackbone:
    words = read_tokenizer(tokenizer)
    torch.manual_seed(seed)
    model = MMInterleavedBackbone(config_of(json.loads((vae / "vae.json").read_text()), words), words, "tiny-mm")
    start(model)
    model.requires_grad_(True)
    model.vae.load_state_dict(load_file(vae / "vae.safetensors"))
    model.vae.requires_grad_(False)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--init", type=Path, help="a run before, whose U-Net and eye are taken on")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    else:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    rank = distributed.get_rank()
    args.out.mkdir(parents=True, exist_ok=True)
    model, reader = build(args.vae, args.tokenizer, args.seed), Reader()
    optimizer, objective = optimizer_of(model, args.rate), Objective(model, config=LOSS)
    trained = [p for p in model.parameters() if p.requires_grad]
    if args.init and not args.resume:
        earlier = load_file(args.init / "checkpoint" / "model.safetensors")
        kept = {name: t for name, t in earlier.items() if name.startswith(("unet", "eye.encoder."))}
        model.load_state_dict(kept, strict=False)
    step = load_checkpoint(args.out / "checkpoint", model, optimizer) if args.resume else 0
    log_file = args.out / "log.jsonl"
    log = [json.loads(line) for line in log_file.read_text().splitlines()] if args.resume and log_file.exists() else []
    log = [row for row in log if row["step"] <= step]
    sums, counts, since = torch.zeros(2), torch.zeros(2), time.time()
    while step < args.steps:
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * rate_at(step, args.steps)
        model.train()
        batch = batch_of(model, args.seed, step, rank)
        losses, targets = objective(batch), count_targets(batch)
        optimizer.zero_grad()
        (losses * objective.weights(targets)).sum().backward()
        average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        sums, counts = sums + losses.detach(), counts + targets
        if step % 50:
            continue
        row = {"step": step, "seconds_per_step": round((time.time() - since) / 50, 3)}
        means = (sums / counts.clamp_min(1)).tolist()
        row |= {name: round(mean, 4) for name, mean in zip(("text_loss", "image_loss"), means, strict=True)}
        if rank == 0:
            if step % 250 == 0 or step == args.steps:
                row |= check(model.eval(), reader)
                save_checkpoint(args.out / "checkpoint", model, optimizer, step)
            log.append(row)
            print(json.dumps(row), flush=True)
            write_text(log_file, "".join(json.dumps(each) + "\n" for each in log))
        sums, counts, since = torch.zeros(2), torch.zeros(2), time.time()


if __name__ == "__main__":
    main()
