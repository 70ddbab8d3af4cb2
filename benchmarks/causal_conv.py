"""Time every form of the causal convolution, forward and backward.    python -m benchmarks.causal_conv [--quick]

    cell   C channels, R rank, kernel, grid; always as many patches, in pictures of that grid

A form is held against the definition in each cell before it is timed there: outputs directly, gradients by what a
bilinear map promises, <dx, v> = <dz, z(v, taps)> and <dtaps, w> = <dz, z(x, w)> for random v and w. Forms take turns,
repeat by repeat, beside the plain product of a LoRA of the same rank. The last line is JSON: quartiles in milliseconds;
`--out FILE` also writes it as a result file. As many threads as OMP_NUM_THREADS says.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from weft.ops.causal_conv import FORMS, FormName, choose, reference
from weft.ops.grid import Patches, Tables, Window

PASSES = ("forward", "backward")
COMPARED: tuple[FormName, ...] = ("conv2d", "shifts", "table")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the largest element: sums of up to 9 * 4096 products, rounded to 24 and 8 bits."""


@dataclass(frozen=True)
class Sizes:
    channels: tuple[int, ...]
    ranks: tuple[int, ...]
    kernels: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    patches: int
    repeats: int


FULL = Sizes((512, 2048, 4096), (8, 64, 256), (2, 3), ((8, 8), (16, 16)), patches=1024, repeats=9)
QUICK = Sizes((512, 2048), (8, 64), (2, 3), ((8, 8), (16, 16)), patches=512, repeats=5)


@dataclass(frozen=True)
class Case:
    x: Tensor
    taps: Tensor
    dz: Tensor
    window: Window
    patches: Patches


def make_case(size: Sizes, channels: int, rank: int, kernel: int, grid: tuple[int, int], like: Tensor) -> Case:
    window, n = Window.of(kernel), size.patches
    patches = Patches.dense(((grid, n // (grid[0] * grid[1])),), (window,))
    moved = {k: Tables(t.reads.to(like.device), t.read_by.to(like.device)) for k, t in patches.tables.items()}
    x, dz = torch.randn(n, channels).to(like), torch.randn(n, rank).to(like)
    taps = (torch.randn(len(window.taps) * rank, channels) / channels**0.5).to(like)
    return Case(x, taps, dz, window, Patches(patches.groups, moved))


def errors(case: Case, names: tuple[FormName, ...]) -> dict[FormName, float]:
    """Each form's largest error: of outputs, and of both gradients in a random direction, as shares of the largest."""
    dz, v, w = case.dz.double(), torch.randn_like(case.x), torch.randn_like(case.taps)
    wanted = reference(case.x, case.taps, case.window, case.patches)
    moved_x = reference(v, case.taps, case.window, case.patches).double()
    moved_taps = reference(case.x, w, case.window, case.patches).double()
    found = {}
    for name in names:
        z = FORMS[name].forward(case.x, case.taps, case.window, case.patches)
        dx, dtaps = FORMS[name].backward(case.x, case.taps, case.dz, case.window, case.patches)
        found[name] = max(
            float((z - wanted).abs().max() / wanted.abs().max()),
            float(((dx.double() * v).sum() - (dz * moved_x).sum()).abs() / (dz.norm() * moved_x.norm())),
            float(((dtaps.double() * w).sum() - (dz * moved_taps).sum()).abs() / (dz.norm() * moved_taps.norm())),
        )
    return found


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) * 1e3


def time_in_turns(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Quartiles of each call; every round runs all of them, so that a slow moment of the machine meets all."""
    rounds = [{name: milliseconds(call, device) for name, call in calls.items()} for _ in range(repeats + 1)]
    return {name: statistics.quantiles([r[name] for r in rounds[1:]], n=4) for name in calls}  # the first one warms up


def measure(case: Case, repeats: int) -> dict[str, list[float]]:
    plain = case.taps[: case.dz.shape[1]].contiguous()
    calls: dict[str, Callable[[], object]] = {}
    for name in ("linear", *COMPARED):
        form, taps = FORMS[name], plain if name == "linear" else case.taps
        window = Window.of(1) if name == "linear" else case.window
        calls[f"{name} forward"] = lambda f=form, t=taps, w=window: f.forward(case.x, t, w, case.patches)
        calls[f"{name} backward"] = lambda f=form, t=taps, w=window: f.backward(case.x, t, case.dz, w, case.patches)
    return time_in_turns(calls, repeats, case.x.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cells, in less than a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in TOLERANCE], default="float32"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    size, dtype = (QUICK if args.quick else FULL), getattr(torch, args.dtype)
    like, console = torch.empty(0, device=args.device, dtype=dtype), Console(width=120)
    machine = {
        "device": torch.cuda.get_device_name() if like.is_cuda else platform.machine(), "dtype": args.dtype,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "patches": size.patches, "repeats": size.repeats,
    }  # fmt: skip
    table = Table(
        *("C", "R", "kernel", "grid", "form", "forward ms [quartiles]", "backward ms [quartiles]", "x plain", ""),
        title=", ".join(f"{name} {value}" for name, value in machine.items()),
    )
    cells = []
    for channels, rank, kernel, grid in itertools.product(size.channels, size.ranks, size.kernels, size.grids):
        case = make_case(size, channels, rank, kernel, grid, like)
        for name, error in errors(case, COMPARED).items():
            if not error <= TOLERANCE[dtype]:
                raise SystemExit(
                    f"C {channels}, R {rank}, kernel {kernel}, grid {grid}: {name} is wrong by {error:.1e}"
                )
        times, chosen = measure(case, size.repeats), choose(case.x, case.taps, case.window, case.patches)
        both = {name: times[f"{name} forward"][1] + times[f"{name} backward"][1] for name in ("linear", *COMPARED)}
        fastest = min(COMPARED, key=both.__getitem__)
        for name in both:
            spread = [f"{m:.3g} [{q1:.3g}, {q3:.3g}]" for q1, m, q3 in (times[f"{name} {p}"] for p in PASSES)]
            marks = [mark for mark, which in (("fastest", fastest), ("chosen", chosen)) if which == name]
            place = (channels, rank, kernel, f"{grid[0]}x{grid[1]}")
            table.add_row(*map(str, place), name, *spread, f"{both[name] / both['linear']:.2f}", ", ".join(marks))
        table.add_section()
        cells.append(
            {
                "channels": channels, "rank": rank, "kernel": kernel, "grid": grid,
                "fastest": fastest, "chosen": chosen, "chosen_to_fastest": round(both[chosen] / both[fastest], 3),
                "ms": {name: [round(value, 4) for value in quartiles] for name, quartiles in times.items()},
            }
        )  # fmt: skip
    console.print(table)
    result = {"machine": machine, "worst_choice": max(cell["chosen_to_fastest"] for cell in cells), "cells": cells}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
