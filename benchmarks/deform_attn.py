"""Time every form of deformable attention, forward and backward, and beside the released formulation.

    python -m benchmarks.deform_attn [--quick]

    cell    what one synchroniser reads: queries, pictures, scales, channels of a head; 16 heads, 8 points
    loop    the released formulation: `grid_sample` of every map of every picture, samples kept until the end

A form is held against the loop in each cell before it is timed there: outputs and, in float64, gradients. Forms take
turns, repeat by repeat. Memory is the peak of a forward and backward above what was held before, each in a process of
its own. The last line is JSON: ratios to the loop; `--out FILE` also gets quartiles. As many threads as
OMP_NUM_THREADS says.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.mmfs import error, race, refuse, resident
from weft.ops.deform_attn import Shapes, deform_attn

HEADS, POINTS = 16, 8
FEW = 1 << 20
"""Samples times corners up to which writing them down, the form "rows", is in question."""


@dataclass(frozen=True)
class Size:
    name: str
    queries: int
    images: int
    sides: tuple[int, ...]
    channels: int


DECODER, UNET = (32, 16, 8), (64, 32, 16, 8)
FULL = (
    Size("decoder", 512, 1, DECODER, 16), Size("decoder", 512, 4, DECODER, 16), Size("decoder", 512, 4, DECODER, 64),
    Size("decoder", 2048, 4, DECODER, 16), Size("decoder", 512, 8, DECODER, 16), Size("token", 1, 4, DECODER, 64),
    Size("u-net", 4096, 1, UNET, 32), Size("u-net", 1024, 1, UNET, 32), Size("u-net", 64, 1, UNET, 32),
)  # fmt: skip
QUICK = (FULL[1], FULL[5], FULL[7])


def forms(size: Size) -> tuple[str, ...]:
    corners = 4 * size.queries * HEADS * size.images * len(size.sides) * POINTS
    return ("bags", *(["rows"] if corners <= FEW else []), "reference", "loop")


class Case(NamedTuple):
    value: Tensor
    shapes: Shapes
    points: Tensor
    weights: Tensor

    def run(self, form: str) -> Tensor:
        return loop(*self) if form == "loop" else deform_attn(*self, impl=form)  # type: ignore[arg-type]

    @property
    def learnt(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.points, self.weights

    def exact(self) -> "Case":
        """In float64, and no place halfway between two cells, where either slope is right."""
        value, points, weights = (of.detach().double() for of in self.learnt)
        points += 1e-9 * torch.rand_like(points)
        for of in (value, points, weights):
            of.requires_grad_()
        return Case(value, self.shapes, points, weights)


def loop(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    (batch, images, _, heads, channels), queries = value.shape, weights.shape[1]
    found = []
    for image in range(images):
        parts = value[:, image].split([rows * cols for rows, cols in shapes], 1)
        grid = 2 * points[:, :, :, image, 0].transpose(1, 2).flatten(0, 1) - 1
        for part, shape in zip(parts, shapes, strict=True):
            maps = part.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shape)
            found.append(F.grid_sample(maps, grid, align_corners=False))
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.stack(found, -2).flatten(-2) * shares).sum(-1)
    return out.unflatten(0, (batch, heads)).permute(0, 3, 1, 2)


def make_case(size: Size) -> Case:
    """Queries of a decoder look from the middle, cells of a U-Net from where they are."""
    torch.manual_seed(0)
    cells = sum(side * side for side in size.sides)
    value = torch.randn(1, size.images, cells, HEADS, size.channels, requires_grad=True)
    side = round(size.queries**0.5)
    if size.name == "u-net":
        centres = (torch.arange(side) + 0.5) / side
        at = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), 2).view(1, -1, 1, 1, 1, 1, 2)
        reach = 1.0 / side
    else:
        at, reach = torch.full((1, 1, 1, 1, 1, 1, 2), 0.5), 3.0 / 16
    around = torch.rand(1, size.queries, HEADS, size.images, 1, POINTS, 2) * 2 - 1
    logits = torch.randn(1, size.queries, HEADS, size.images, len(size.sides), POINTS)
    weights = logits.flatten(3).softmax(3).view_as(logits)
    shapes = tuple((side, side) for side in size.sides)
    return Case(value, shapes, (at + around * reach).requires_grad_(), weights.requires_grad_())


def check(case: Case, form: str) -> float:
    """Largest difference, relative; of gradients in float64, see `Case.exact`."""
    with torch.no_grad():
        worst = error(case.run(form), case.run("loop"))
    wide = case.exact()
    out = wide.run("loop")
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    wanted = torch.autograd.grad(out, wide.learnt, weight)
    found = torch.autograd.grad(wide.run(form), wide.learnt, weight)
    return refuse(max(worst, *(error(a, b) for a, b in zip(found, wanted, strict=True))), form)


def step(case: Case, form: str) -> None:
    for tensor in case.learnt:
        tensor.grad = None
    case.run(form).sum().backward()


def look(case: Case, form: str) -> None:
    with torch.no_grad():
        case.run(form)


def peak_of(size: Size, form: str) -> int:
    case = make_case(size)
    before = resident(peak=False)
    for _ in range(2):
        step(case, form)
    return resident(peak=True) - before


def peak_apart(size: Size, form: str) -> int:
    command = [sys.executable, "-m", "benchmarks.deform_attn", "--peak-of", str(FULL.index(size)), form]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.splitlines()[-1])


def measure(size: Size, repeats: int) -> dict[str, Any]:
    case, compared = make_case(size), forms(size)
    errors = {form: check(case, form) for form in compared[:-1]}
    forward = race({form: lambda form=form: look(case, form) for form in compared}, repeats)
    both = race({form: lambda form=form: step(case, form) for form in compared}, repeats)
    peaks = {form: peak_apart(size, form) for form in compared}
    return {"size": vars(size), "errors": errors, "forward": forward, "both": both, "peak_bytes": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three sizes, fewer repeats")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", nargs=2, metavar=("SIZE", "FORM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(peak_of(FULL[int(args.peak_of[0])], args.peak_of[1]))
        return
    table = Table("size", "form", "forward ms", "and backward ms [quartiles]", "faster than the loop", "MiB")
    cells, found = [], {}
    for size in QUICK if args.quick else FULL:
        cell = measure(size, 3 if args.quick else 9)
        cells.append(cell)
        name = f"{size.name} Q{size.queries} N{size.images} C{size.channels}"
        for form in forms(size):
            forward, both = cell["forward"][form], cell["both"][form]
            faster = [cell[of]["loop"]["median"] / cell[of][form]["median"] for of in ("forward", "both")]
            memory = cell["peak_bytes"][form] / 2**20
            spread = f"{both['median'] * 1e3:.3g} [{both['q1'] * 1e3:.3g}, {both['q3'] * 1e3:.3g}]"
            ratios = " / ".join(f"{ratio:.2f}" for ratio in faster)
            table.add_row(name, form, f"{forward['median'] * 1e3:.3g}", spread, ratios, f"{memory:.0f}")
            if form != "loop":
                found[f"{name} {form}"] = [round(ratio, 3) for ratio in faster]
        table.add_section()
    Console(width=120).print(table)
    if args.out:
        machine = {"device": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.out.write_text(json.dumps({"machine": machine, "faster": found, "cells": cells}, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
