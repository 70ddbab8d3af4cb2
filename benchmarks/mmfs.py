"""What the synchroniser costs, beside the released formulation and beside no synchroniser.

    python -m benchmarks.mmfs [--quick]

The last line is JSON; every figure's quartiles go to `--out FILE`. Both sides of a figure share their weights, are
checked against each other, and take turns in one run. As many threads as OMP_NUM_THREADS says.

    train    forward and backward of one synchroniser of a language model, with all gradients, against the released
             formulation in torch: queries expanded picture by picture, `grid_sample`; memory: the peak of the same
             above what the process held before, in a process of its own
    read     one query of one token: values cached, against the released formulation, which projects them per call
    decode   one token of a LLaMA with a synchroniser in every 4 layers and values cached, against the same without
    denoise  one step of a U-Net with 13 synchronisers and values cached, one previous picture, against the same without

Sizes are the released model's: decoder 5120 wide, U-Net 320 to 1280 as in Stable Diffusion 2.1 (its blocks, as many
heads, latents 64x64), features and values 1024, 16 heads, 8 points; scales 32, 16, 8 in the decoder and 64, 32, 16, 8
in the U-Net, which paints two at once, for guidance. All widths are divided by one number where it says so: by none in
the figure of training, by 4 in reading and decoding, by 2 in denoising (its norms allow no more). Narrow models look
worse than the released one: their products shrink with the square of the widths, the reading of samples with the first
power, and finding their places not at all. The full run also has training from 1 to 8 pictures and 256 to 2048 queries,
and the U-Net that is released.
"""

import argparse
import copy
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaModel

from weft.synchronizer.attach import Insertion, select
from weft.synchronizer.attach_llm import DecoderSyncConfig, attach_to_decoder
from weft.synchronizer.attach_unet import UNetSyncConfig, attach_to_unet
from weft.synchronizer.mmfs import FeatureBank, FeatureSynchronizer, MMFSConfig
from weft.synchronizer.visibility import nearest_first

SIDES = (32, 16, 8)
IMAGES, QUERIES = 4, 512
TOLERANCE = 1e-4
"""Of the largest element: sums of some thousand float32 products in another order."""


NARROW = 4
"""What the widths of the language model are divided by, other than in training."""

TrainCell = tuple[int, int, int]
"""What widths are divided by, pictures, queries."""


@dataclass(frozen=True)
class Size:
    train: tuple[TrainCell, ...]
    layers: int
    unets: tuple[tuple[int, int], ...]
    """(what widths are divided by, side of the latents)"""
    repeats: int


GRID = tuple((NARROW, images, queries) for images in (1, 2, 4, 8) for queries in (256, 512, 1024, 2048))
FULL = Size(((1, IMAGES, QUERIES), (2, IMAGES, QUERIES), *GRID), 16, ((2, 64), (2, 32), (1, 64)), 7)
QUICK = Size(((1, IMAGES, QUERIES),), 8, ((2, 64),), 5)


@dataclass(frozen=True)
class Case:
    module: FeatureSynchronizer
    queries: Tensor
    bank: FeatureBank
    visible: Tensor
    points: Tensor

    @property
    def learnt(self) -> tuple[Tensor, ...]:
        return (self.queries, self.bank.features, *self.module.parameters())


def make_case(divided: int, images: int, queries: int) -> Case:
    """A document after its pictures: every token sees all of them, from the middle."""
    torch.manual_seed(0)
    width, values = 5120 // divided, 1024 // divided
    config = MMFSConfig(width, values, values, width, 16, 8, SIDES, 16, 50, 3.0)
    module = FeatureSynchronizer(config)
    nn.init.normal_(module.sampling_offsets.weight, std=0.5 * width**-0.5)  # as after some training
    features = torch.randn(1, images, sum(side * side for side in SIDES), values, requires_grad=True)
    bank = FeatureBank(features, tuple((side, side) for side in SIDES))
    asked = torch.randn(1, queries, width, requires_grad=True)
    return Case(module, asked, bank, torch.ones(1, queries, images, dtype=torch.bool), torch.full((1, 1, 2), 0.5))


def ours(case: Case) -> Tensor:
    found: Tensor = case.module(case.queries, case.bank, case.visible, case.points)
    return found


def released(case: Case) -> Tensor:
    """Every query goes through every product once for each picture, and values are projected anew."""
    module, c = case.module, case.module.config
    (batch, queries, _), images, scales = case.queries.shape, case.visible.shape[2], len(c.sides)
    place = case.visible * case.visible.flip(2).cumsum(2).flip(2)
    value = module.value_proj(case.bank.features.flatten(1, 2)).unflatten(2, (c.heads, -1))
    z = module.dynamic_offset_mask(case.queries.unsqueeze(2).repeat(1, 1, images, 1)) + module.query_relpos(place)
    offsets = module.sampling_offsets(z).view(batch, queries, images, c.heads, 1, c.points, 2)
    logits = module.attention_weights(z).view(batch, queries, images, c.heads, scales, c.points + 1)
    null = torch.full_like(logits[..., -1:], -math.log(images * scales))
    logits = logits[..., :-1] + (~case.visible)[..., None, None, None] * -10000.0
    logits = torch.cat((logits, null), -1).transpose(2, 3)
    weights = logits.flatten(3).softmax(-1).view(batch, queries, c.heads, images * scales, c.points + 1)
    units = torch.tensor([side / c.base for side in c.sides], dtype=offsets.dtype)
    sizes = torch.tensor([(cols, rows) for rows, cols in case.bank.shapes], dtype=offsets.dtype)
    at = case.points[:, :, None, None, None, None] + offsets * units[:, None, None] / sizes[:, None]
    at = at.transpose(2, 3).flatten(3, 4)
    shapes = case.bank.shapes * images
    maps = value.split([rows * cols for rows, cols in shapes], 1)
    found = torch.stack(
        [
            F.grid_sample(
                part.permute(0, 2, 3, 1).reshape(batch * c.heads, -1, *shape),
                2 * at[:, :, :, i].transpose(1, 2).flatten(0, 1) - 1,
                align_corners=False,
            )
            for i, (part, shape) in enumerate(zip(maps, shapes, strict=True))
        ],
        -2,
    )
    shares = weights[..., :-1].transpose(1, 2).reshape(batch * c.heads, 1, queries, -1)
    out = (found.flatten(-2) * shares).sum(-1).unflatten(0, (batch, c.heads)).permute(0, 3, 1, 2)
    return module.output_proj((out + weights[..., -1].sum(3, keepdim=True) * ignored(module)).flatten(2))


def ignored(module: FeatureSynchronizer) -> Tensor:
    return module.ignore_token.view(module.config.heads, -1)


FORMS: dict[str, Callable[[Case], Tensor]] = {"ours": ours, "released": released}


def train_step(case: Case, form: str) -> None:
    for tensor in case.learnt:
        tensor.grad = None
    FORMS[form](case).square().mean().backward()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max().clamp_min(1e-30))


def check_training(case: Case) -> float:
    """Largest difference from the released formulation: of outputs, and in float64 of gradients.

    In float32 those towards places are no measure: one that is rounded to the other side of a cell's middle has
    another slope.
    """
    with torch.no_grad():
        worst = error(ours(case), released(case))
    case, found = exact(case), {}
    weight = torch.randn(case.queries.shape, dtype=torch.float64)
    for name, form in FORMS.items():
        found[name] = torch.autograd.grad(form(case), case.learnt, weight)
    pairs = zip(found["ours"], found["released"], strict=True)
    return refuse(max(worst, *(error(a, b) for a, b in pairs)), "the synchroniser")


def exact(case: Case) -> Case:
    def double(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    bank = FeatureBank(double(case.bank.features), case.bank.shapes)
    return Case(copy.deepcopy(case.module).double(), double(case.queries), bank, case.visible, double(case.points))


def refuse(worst: float, what: str) -> float:
    if not worst <= TOLERANCE:
        raise SystemExit(f"{what} is wrong by {worst:.1e}; nothing was timed")
    return worst


def race(arms: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each arm; arms take turns, so that a noisy neighbour hits all of them."""
    for arm in arms.values():
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            gc.collect()
            start = time.perf_counter()
            arms[name]()
            times[name].append(time.perf_counter() - start)
    return {name: quartiles(of) for name, of in times.items()}


def quartiles(times: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(times, n=4)
    return {"median": median, "q1": q1, "q3": q3, "least": min(times), "n": len(times)}


def resident(peak: bool) -> int:
    """Bytes of this process, now or at most so far."""
    field = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(form: str, cell: TrainCell) -> int:
    """Bytes of two training steps above what was held before them."""
    case = make_case(*cell)
    before = resident(peak=False)
    for _ in range(2):
        train_step(case, form)
    return resident(peak=True) - before


def peak_apart(form: str, cell: TrainCell) -> int:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.mmfs", "--peak-of", form, *map(str, cell)]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.splitlines()[-1])


def train(size: Size) -> list[dict[str, Any]]:
    cells = []
    for cell in size.train:
        case, (divided, images, queries) = make_case(*cell), cell
        worst = check_training(case)
        arms: dict[str, Callable[[], object]] = {
            name: lambda case=case, name=name: train_step(case, name) for name in FORMS
        }
        times = race(arms, size.repeats)
        peaks = {name: peak_apart(name, cell) for name in FORMS}
        cells.append(
            {
                "divided": divided, "images": images, "queries": queries, "error": worst, "seconds": times,
                "peak_bytes": peaks, "speedup": times["released"]["median"] / times["ours"]["median"],
                "memory_ratio": peaks["ours"] / peaks["released"],
            }
        )  # fmt: skip
    return cells


@torch.no_grad()
def read(size: Size) -> list[dict[str, Any]]:
    cells = []
    for images in sorted({images for _, images, _ in size.train}):
        case = make_case(NARROW, images, 1)
        projected, seen = case.module.project(case.bank), nearest_first(case.visible)

        def cached(case: Case = case, projected: Any = projected, seen: Tensor = seen) -> Tensor:
            found: Tensor = case.module(case.queries, projected, seen, case.points)
            return found

        worst = refuse(error(cached(), released(case)), "a cached read")
        times = race({"ours": cached, "released": lambda case=case: released(case)}, 5 * size.repeats)
        speedup = times["released"]["median"] / times["ours"]["median"]
        cells.append({"images": images, "error": worst, "seconds": times, "speedup": speedup})
    return cells


def sharing(model: nn.Module) -> Any:
    """A second model over the same weights."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def draw_bank(batch: int, images: int, width: int, sides: tuple[int, ...]) -> FeatureBank:
    features = torch.randn(batch, images, sum(side * side for side in sides), width)
    return FeatureBank(features, tuple((side, side) for side in sides))


def open_up(insertion: Insertion) -> None:
    """Gates and convolutions away from zero, as after some training."""
    for branch in insertion.branches.values():
        for name, parameter in branch.named_parameters():
            if name in ("gate", "conv.weight"):
                nn.init.normal_(parameter, std=0.02)


def step_of(decoder: Any, token: Tensor, past: int) -> Callable[[], Tensor]:
    """One token after a context, always the same place, so that steps compare."""
    config, cache = decoder.config, DynamicCache(config=decoder.config)
    heads, each = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(1)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(1, heads, past, each, generator=generator) for _ in range(2)), layer)

    def step() -> Tensor:
        found: Tensor = decoder(inputs_embeds=token, past_key_values=cache, use_cache=True).last_hidden_state
        cache.crop(-1)
        return found

    return step


@torch.no_grad()
def decode(size: Size) -> dict[str, Any]:
    torch.manual_seed(0)
    width, values = 5120 // NARROW, 1024 // NARROW
    config = LlamaConfig(
        hidden_size=width, intermediate_size=13824 // NARROW, num_hidden_layers=size.layers, vocab_size=8,
        num_attention_heads=40 // NARROW, max_position_embeddings=2048, attn_implementation="sdpa",
    )  # fmt: skip
    plain = LlamaModel(config).eval().requires_grad_(False)
    synchronised = sharing(plain)
    insertion = attach_to_decoder(synchronised, DecoderSyncConfig(feature_width=values, value_width=values))
    open_up(insertion)
    bank, visible = draw_bank(1, IMAGES, values, SIDES), torch.ones(1, 1, IMAGES, dtype=torch.bool)
    token = torch.randn(1, 1, width)
    steps = {
        name: step_of(model, token, past=IMAGES * 128) for name, model in (("with", synchronised), ("without", plain))
    }
    insertion.set(bank, visible)
    wanted = steps["with"]()
    insertion.set(insertion.project(bank), visible)
    worst = refuse(error(steps["with"](), wanted), "cached decoding")
    times = race(dict(steps), 5 * size.repeats)
    overhead = times["with"]["median"] / times["without"]["median"]
    return {"layers": size.layers, "images": IMAGES, "error": worst, "seconds": times, "overhead": overhead}


@torch.no_grad()
def denoise(size: Size) -> list[dict[str, Any]]:
    cells = []
    for divided, side in size.unets:
        torch.manual_seed(0)
        context, values = 1024 // divided, 1024 // divided
        plain = UNet2DConditionModel(
            sample_size=side, block_out_channels=tuple(width // divided for width in (320, 640, 1280, 1280)),
            attention_head_dim=(5, 10, 20, 20), cross_attention_dim=context, use_linear_projection=True,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        ).eval().requires_grad_(False)  # fmt: skip
        synchronised = sharing(plain)
        sides = (side, side // 2, side // 4, side // 8)
        own = UNetSyncConfig(side=side, feature_width=values, value_width=values, sides=sides)
        insertion = attach_to_unet(synchronised, own)
        open_up(insertion)
        # guidance: with the prompt and without, the same picture for both
        inputs = (torch.randn(1, 4, side, side).expand(2, -1, -1, -1), 500, torch.randn(2, 77, context))
        bank, both = draw_bank(1, 1, values, sides), torch.tensor([0, 0])
        visible = torch.ones(2, 1, dtype=torch.bool)
        steps = {
            name: lambda unet=unet, inputs=inputs: unet(*inputs).sample
            for name, unet in (("with", synchronised), ("without", plain))
        }
        insertion.set(FeatureBank(bank.features[both], bank.shapes), visible)
        wanted = steps["with"]()
        insertion.set(select(insertion.project(bank), both), visible)
        worst = refuse(error(steps["with"](), wanted), "a cached denoising step")
        times = race(steps, size.repeats if side < 64 else 3)
        overhead = times["with"]["median"] / times["without"]["median"]
        cells.append({"divided": divided, "side": side, "error": worst, "seconds": times, "overhead": overhead})
        del plain, synchronised, insertion, steps
    return cells


def show(results: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table("what", "size", "ours ms [quartiles]", "beside ms [quartiles]", "ratio", "memory")

    def milliseconds(of: dict[str, float]) -> str:
        return f"{of['median'] * 1e3:.4g} [{of['q1'] * 1e3:.4g}, {of['q3'] * 1e3:.4g}]"

    def add(what: str, size: str, times: dict[str, dict[str, float]], ratio: float, memory: str = "") -> None:
        table.add_row(what, size, *map(milliseconds, times.values()), f"{ratio:.3f}", memory)

    for cell in results["train"]:
        peaks = " / ".join(f"{peak / 2**20:.0f}" for peak in cell["peak_bytes"].values())
        place = f"widths / {cell['divided']}, {cell['images']} images, {cell['queries']} queries"
        add("train", place, cell["seconds"], cell["speedup"], f"{peaks} MiB = {cell['memory_ratio']:.2f}")
    for cell in results["read"]:
        add("read", f"{cell['images']} images", cell["seconds"], cell["speedup"])
    cell = results["decode"]
    add("decode", f"{cell['layers']} layers, {cell['images']} images", cell["seconds"], cell["overhead"])
    for cell in results["denoise"]:
        add("denoise", f"widths / {cell['divided']}, side {cell['side']}", cell["seconds"], cell["overhead"])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size of each, the same keys")
    parser.add_argument("--out", type=Path, help="write all figures to this file")
    parser.add_argument("--peak-of", nargs=4, metavar=("FORM", "DIVIDED", "IMAGES", "QUERIES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        form, divided, images, queries = args.peak_of
        print(peak_of(form, (int(divided), int(images), int(queries))))
        return
    size = QUICK if args.quick else FULL
    results = {"train": train(size), "read": read(size), "decode": decode(size), "denoise": denoise(size)}
    show(results)
    cell = results["train"][0]
    found = {
        "train_speedup_4img": cell["speedup"], "train_memory_ratio_4img": cell["memory_ratio"],
        "decode_overhead_4img": results["decode"]["overhead"],
        "denoise_overhead": results["denoise"][0]["overhead"],
    }  # fmt: skip
    found = {name: round(value, 3) for name, value in found.items()}
    if args.out:
        machine = {"device": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.out.write_text(json.dumps({"ratios": found, "machine": machine, **results}, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
