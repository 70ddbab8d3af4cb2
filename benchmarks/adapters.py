"""What the adapters cost beside PEFT's own LoRA of the same rank.    python -m benchmarks.adapters [--quick]

A LLaMA-like stack (C = 2048, no head), 2 x 1024 positions, half of them patches of 8x8 and 16x16 pictures. Both sides
share one set of frozen weights and take turns, step by step, in one run; outputs are checked against the definition
before anything is timed. The last line is JSON: ratios to PEFT LoRA, medians; every figure's quartiles, bytes and FLOPs
go to `--out FILE`.

    train    forward and backward of one batch          memory   peak of the same, in a process of its own
    decode   one token per sequence from a warm cache, averaged over a document: half text, half patches;
             the stack is too large for the caches of a CPU, so weights come from memory
    text     the same on text alone                     moe      two linear branches (kernel 1)
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from weft.adapters import Branch, MossConfig, RingCache, routing_of
from weft.adapters.layer import MossLinear
from weft.adapters.routing import Routes
from weft.layout import ImageSpan, ModalityLayout, TextSpan, lay_out
from weft.ops.causal_conv import reference

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GRID = (8, 8)


@dataclass(frozen=True)
class Size:
    channels: int
    hidden: int
    layers: int
    batch: int
    length: int
    decode_layers: int
    repeats: int
    tokens: int
    """Decoding steps per kind."""
    batches: tuple[int, ...]


FULL = Size(2048, 5632, 4, 2, 1024, 32, 5, 12, (1, 8, 32))
QUICK = Size(2048, 5632, 1, 2, 1024, 5, 4, 12, (1, 8))


def document(size: Size) -> ModalityLayout:
    """Half text, half patches: for each 16x16 picture four of 8x8, which is as many patches again."""
    unit = [TextSpan(64), ImageSpan(8, 8)] * 4 + [TextSpan(256), ImageSpan(16, 16)]
    return lay_out([unit * (size.length // 1024)] * size.batch)


def text(batch: int, length: int) -> ModalityLayout:
    return lay_out([[TextSpan(length)]] * batch)


def stack(size: Size, layers: int, seed: int = 0) -> LlamaModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=size.channels, intermediate_size=size.hidden, num_hidden_layers=layers, vocab_size=8,
        num_attention_heads=size.channels // 128, max_position_embeddings=4096, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaModel(config).requires_grad_(False)


def sharing(base: LlamaModel) -> LlamaModel:
    """A second model over the same weights."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, memo)


def adapted(base: LlamaModel, kind: str, rank: int) -> nn.Module:
    model = sharing(base)
    torch.manual_seed(1)
    if kind == "lora":
        config: Any = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    else:
        linear = Branch(rank, 2.0 * rank)
        image = Branch(rank, 2.0 * rank, kernel={"moss": 2, "moe": 1}[kind])
        config = MossConfig(text=linear, image=image, target_modules=TARGETS)
    found = get_peft_model(model, config)
    for name, parameter in found.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "_B." in name):
            nn.init.normal_(parameter, std=0.02)  # as after some training: nothing multiplies by zero
    return found.train()


def check(model: nn.Module, layout: ModalityLayout, channels: int) -> float:
    """Largest difference, relative, of one adapted layer's output and input gradient from the definition."""
    layer = next(module for module in model.modules() if isinstance(module, MossLinear))
    routing = routing_of(model)
    routing.set(layout)
    routes = routing.of("default", torch.Size((*layout.shape, channels)))
    assert isinstance(routes, Routes)
    x = torch.randn(*layout.shape, channels, requires_grad=True)
    branches = layer.moss_branches["default"]
    assert branches.text is not None and branches.own_image is not None
    flat = x.view(-1, channels)
    wanted = layer.base_layer(flat)
    words = flat[routes.text] @ layer.moss_text_A["default"].T @ layer.moss_text_B["default"].T
    z = reference(flat[routes.image], layer.moss_image_A["default"], branches.own_image.taps, routes.patches)
    wanted = wanted.index_add(0, routes.text, words * branches.text.scale)
    wanted = wanted.index_add(0, routes.image, z @ layer.moss_image_B["default"].T * branches.own_image.scale)
    found = layer(x).view_as(wanted)
    g = torch.randn_like(found)
    pairs = [(found, wanted), (torch.autograd.grad(found, x, g)[0], torch.autograd.grad(wanted, x, g)[0])]
    error = max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)
    if error > 1e-4:
        raise SystemExit(f"the fast form is wrong by {error:.1e}; nothing was timed")
    return error


@torch.no_grad()
def check_decoding(model: nn.Module, channels: int) -> float:
    """Largest difference, relative, of one adapted layer's pictures written patch by patch from the whole pass."""
    layer = next(module for module in model.modules() if isinstance(module, MossLinear))
    layout, routing, rings = (
        lay_out([[TextSpan(2), ImageSpan(*GRID), TextSpan(2)]] * 2),
        routing_of(model),
        RingCache(2, 8),
    )
    x = torch.randn(*layout.shape, channels)
    routing.set(layout)
    wanted, steps = layer(x), []
    for t in range(layout.shape[1]):
        routing.set(layout[t : t + 1], rings)
        steps.append(layer(x[:, t : t + 1]))
    error = float((torch.cat(steps, 1) - wanted).abs().max() / wanted.abs().max())
    if error > 1e-5:
        raise SystemExit(f"cached decoding is wrong by {error:.1e}; nothing was timed")
    return error


def race(arms: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm; arms take turns, so that a noisy neighbour hits all of them."""
    for arm in arms.values():
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats):
        names = list(arms) if turn % 2 == 0 else list(arms)[::-1]
        for name in names:
            gc.collect()
            start = time.perf_counter()
            arms[name]()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": middle, "q1": low, "q3": high, "n": len(times)}


def train_step(model: nn.Module, embeds: Tensor, layout: ModalityLayout) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    moss = any(isinstance(module, MossLinear) for module in model.modules())
    out = model(inputs_embeds=embeds, use_cache=False, **({"layout": layout} if moss else {}))
    out.last_hidden_state.square().mean().backward()


def train(size: Size, results: dict[str, Any]) -> None:
    base = stack(size, size.layers)
    layout, words = document(size), text(size.batch, size.length)
    embeds = torch.randn(*layout.shape, size.channels)
    for rank in (64, 256):
        models = {kind: adapted(base, kind, rank) for kind in ("lora", "moss", *(["moe"] if rank == 64 else []))}
        results[f"check_r{rank}"] = check(models["moss"], layout, size.channels)
        arms: dict[str, Callable[[], None]] = {
            kind: lambda model=model: train_step(model, embeds, layout) for kind, model in models.items()
        }
        if rank == 64:
            arms["text"] = lambda model=models["moss"]: train_step(model, embeds, words)
        for name, times in race(arms, size.repeats).items():
            results[f"train_r{rank}_{name}"] = summary(times)


class Decoder:
    """Feeds one position per sequence after `past` cached ones, always the same place, so that steps compare."""

    def __init__(self, model: nn.Module, batch: int, channels: int, layout: ModalityLayout | None, past: int) -> None:
        self.model, self.layout, self.past = model, layout, past
        self.routing = None if layout is None else routing_of(model)
        self.rings = RingCache(batch, columns=GRID[1])
        self.cache = DynamicCache(config=model.config)
        self.x = torch.randn(batch, 1, channels)
        with torch.no_grad():
            if self.routing is not None:
                self.routing.set(text(batch, past))
            model(inputs_embeds=torch.randn(batch, past, channels), past_key_values=self.cache)

    @torch.no_grad()
    def __call__(self) -> None:
        if self.routing is not None:
            self.routing.set(self.layout, self.rings)
        self.model(inputs_embeds=self.x, past_key_values=self.cache)
        self.cache.crop(-1)


def decode(size: Size, results: dict[str, Any]) -> None:
    base = stack(size, size.decode_layers)
    picture = lay_out([[TextSpan(1), ImageSpan(*GRID)]] * max(size.batches))
    for rank in (64, 256):
        models = {kind: adapted(base, kind, rank).eval() for kind in ("lora", "moss")}
        results[f"check_decoding_r{rank}"] = check_decoding(models["moss"], size.channels)
        for batch in size.batches:
            inside = rows(picture[GRID[1] + 3 : GRID[1] + 4], batch)
            written = text(batch, 1)
            mixed = lay_out(
                [[TextSpan(4)] if row % 2 else [TextSpan(1), ImageSpan(*GRID, present=3)] for row in range(batch)]
            )
            arms: dict[str, Callable[[], None]] = {
                "lora": Decoder(models["lora"], batch, size.channels, None, 32),
                "picture": Decoder(models["moss"], batch, size.channels, inside, 32),
                "text": Decoder(models["moss"], batch, size.channels, written, 32),
            }
            if batch > 1:
                arms["mixed"] = Decoder(models["moss"], batch, size.channels, mixed[3:4], 32)
            for name, times in race(arms, size.tokens).items():
                results[f"decode_r{rank}_b{batch}_{name}"] = summary(times)
            rings = arms["picture"].rings  # type: ignore[attr-defined]
            results[f"state_bytes_r{rank}_b{batch}"] = rings.nbytes
        models.clear()  # before the next rank needs the room


def rows(layout: ModalityLayout, batch: int) -> ModalityLayout:
    return layout.map(lambda tensor: tensor[:batch])


def resident(peak: bool) -> int:
    """Bytes of this process, now or at most so far."""
    field = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory_of(size: Size, kind: str, rank: int) -> dict[str, int]:
    """Peak of a training step above what the process needed before there was a model; weights and gradients apart."""
    before = resident(peak=False)
    model = adapted(stack(size, size.layers), kind, rank)
    layout = document(size)
    embeds = torch.randn(*layout.shape, size.channels)
    for _ in range(2):
        train_step(model, embeds, layout)
    trained = [p for p in model.parameters() if p.requires_grad]
    held = sum(p.nbytes for p in model.parameters()) + sum(p.nbytes for p in trained)
    return {"peak": resident(peak=True) - before, "held": held, "adapter": sum(p.nbytes for p in trained)}


def memory(size: Size, results: dict[str, Any], quick: bool) -> None:
    for rank in (64, 256):
        for kind in ("lora", "moss"):
            command = [sys.executable, "-m", "benchmarks.adapters", "--memory-of", kind, "--rank", str(rank)]
            done = subprocess.run(
                [*command, "--threads", str(torch.get_num_threads()), *(["--quick"] if quick else [])],
                capture_output=True, text=True, check=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"},
            )  # fmt: skip
            results[f"memory_r{rank}_{kind}"] = json.loads(done.stdout.splitlines()[-1])


def roofline(size: Size, rank: int) -> dict[str, float]:
    """Ratios to LoRA that follow from counting alone: FLOPs of a training step, weight bytes of a decoding step."""
    c, f = size.channels, size.hidden
    shapes = [(c, c)] * 4 + [(c, f)] * 2 + [(f, c)]
    base = sum(a * b for a, b in shapes)
    linear = sum(rank * (a + b) for a, b in shapes)
    conv = sum(rank * (4 * a + b) for a, b in shapes)
    # frozen: forward and dx; adapters: forward, dx and dw
    flops = lambda adapter: 4 * base + 6 * adapter  # noqa: E731
    return {
        "train_flops": flops((linear + conv) / 2) / flops(linear),
        "decode_picture_bytes": (base + conv) / (base + linear),
        "decode_document_bytes": (base + (linear + conv) / 2) / (base + linear),
        "decode_mixed_bytes": (base + linear + conv) / (base + linear),
    }


def ratios(results: dict[str, Any], size: Size) -> dict[str, float]:
    def median(name: str) -> float:
        return float(results[name]["median"])

    found: dict[str, float] = {}
    for rank in (64, 256):
        lora = f"train_r{rank}_lora"
        found[f"train_r{rank}"] = median(f"train_r{rank}_moss") / median(lora)
        peaks = {kind: results[f"memory_r{rank}_{kind}"] for kind in ("lora", "moss")}
        found[f"memory_r{rank}"] = peaks["moss"]["peak"] / peaks["lora"]["peak"]
        working = {kind: peak["peak"] - peak["held"] for kind, peak in peaks.items()}
        found[f"memory_working_r{rank}"] = working["moss"] / working["lora"]
        for batch in size.batches:
            at = f"decode_r{rank}_b{batch}"
            picture, words = (median(f"{at}_{kind}") / median(f"{at}_lora") for kind in ("picture", "text"))
            found[at] = (picture + words) / 2
            found[f"{at}_picture"], found[f"{at}_text"] = picture, words
            if batch > 1:
                found[f"{at}_mixed"] = median(f"{at}_mixed") / median(f"{at}_lora")
    found["text_train"] = median("train_r64_text") / median("train_r64_lora")
    found["text_decode"] = statistics.mean(v for k, v in found.items() if k.endswith("_text"))
    found["moe_train"] = median("train_r64_moe") / median("train_r64_lora")
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer layers and repeats, the same keys")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write all figures to this file")
    parser.add_argument("--only", choices=["train", "decode", "memory"], help="for tuning: one part")
    parser.add_argument("--memory-of", choices=["lora", "moss"], help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=64, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    if args.memory_of:
        print(json.dumps(memory_of(size, args.memory_of, args.rank)))
        return
    results: dict[str, Any] = {}
    if args.only in (None, "memory"):
        memory(size, results, args.quick)
    if args.only in (None, "train"):
        train(size, results)
    if args.only in (None, "decode"):
        decode(size, results)
    if args.only:
        print(json.dumps(results, indent=1))
        return
    found = ratios(results, size)
    bounds = {f"r{rank}": {k: round(v, 4) for k, v in roofline(size, rank).items()} for rank in (64, 256)}
    table = Table("figure", "ratio to PEFT LoRA")
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table, bounds)
    if args.out:
        args.out.write_text(
            json.dumps({"ratios": found, "rooflines": bounds, "measured": results, "size": vars(size)}, indent=2) + "\n"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
