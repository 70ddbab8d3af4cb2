"""`weft doctor`: what is installed, what fits on this machine, and what to do about it. Never imports transformers."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from weft.errors import WeftError

GIB = 2**30
Status = Literal["ok", "note", "failed"]

FITS = (
    ("tiny: demo, training and generation", 3 * GIB),
    ("7B in 4 bits, generation", 7 * GIB),
    ("7B in 8 bits, generation", 10 * GIB),
    ("7B in bf16, generation", 18 * GIB),
    ("7B in bf16, training an adapter", 30 * GIB),
)
"""A job and the bytes it needs, with the weights, caches and some room; on a GPU the GPU's memory counts."""


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    found: str
    fix: str | None = None


def doctor(
    *, json_output: Annotated[bool, Parameter(name="--json", negative=())] = False, out: Path = Path("runs")
) -> None:
    """Check this installation and this machine. Exits 1 if something is missing that Weft cannot do without.

    Parameters
    ----------
    json_output: bool
        Print one JSON object for programs.
    out: Path
        The folder that runs will be written to.
    """
    checks = [*_packages(), *_machine(), *_folder(out)]
    failed = [check for check in checks if check.status == "failed"]
    if json_output:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks)
    if failed:
        first = failed[0]
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise WeftError(f"{first.name}: {first.found}{more}", where="weft doctor", fix=first.fix)


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("ok", "green"), "note": ("note", "yellow"), "failed": ("FAILED", "bold red")}
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        mark, style = marks[check.status]
        # Text, not a string: names such as weft[dev] are no markup
        table.add_row(
            Text(mark, style), Text(check.name), Text(check.found + (f"\n-> {check.fix}" if check.fix else ""))
        )
    Console().print(table)


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    version = platform.python_version()
    yield Check("python", "ok" if sys.version_info >= (3, 11) else "failed", version, _unless(
        sys.version_info >= (3, 11), "install Python 3.11 or newer"))  # fmt: skip
    absent: dict[str, list[str]] = {}
    extras: list[str] = importlib.metadata.metadata("weft").get_all("Provides-Extra") or []
    for line in importlib.metadata.requires("weft") or []:
        requirement = Requirement(line)
        extra = next((e for e in extras if re.search(rf"extra == ['\"]{e}['\"]", str(requirement.marker))), None)
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        fits = found is not None and requirement.specifier.contains(found.partition("+")[0], prereleases=True)
        if extra is not None:
            absent.setdefault(extra, [])
            if not fits:
                absent[extra].append(wanted)
        elif fits:
            yield Check(requirement.name, "ok", str(found))
        else:
            yield Check(requirement.name, "failed", found or "not installed", f"pip install '{wanted}'")
    for extra, missing in absent.items():
        if missing:
            yield Check(f"weft[{extra}]", "note", f"without {', '.join(missing)}", f"pip install 'weft[{extra}]'")
        else:
            yield Check(f"weft[{extra}]", "ok", "installed")


def _machine() -> Iterator[Check]:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    yield Check("cpu", "ok", f"{platform.machine()}, {cores} cores for this process, OMP_NUM_THREADS {threads}")
    memory = psutil.virtual_memory()
    tight = memory.available < FITS[0][1]
    yield Check(
        "memory",
        "note" if tight else "ok",
        f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        "close other programs: the demo may need 3 GiB" if tight else None,
    )
    gpu = 0
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check(
            "torch loads", "failed", str(error).partition("\n")[0], "pip install --force-reinstall torch==2.13.0"
        )
    else:
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            gpu = max(gpu, device.total_memory)
            yield Check(f"gpu {i}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB")
        if not gpu:
            yield Check("gpu", "note", "none that torch can use; everything runs on the CPU, larger models slowly")
    for job, needed in FITS:
        room, place = (gpu, "GPU") if gpu else (memory.available, "memory")
        fits = room >= needed
        yield Check(
            job, "ok" if fits else "note", f"needs about {needed // GIB} GiB of {place}" + ("" if fits else ": no room")
        )


def _folder(out: Path) -> Iterator[Check]:
    folder = out.resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Check("runs folder", "failed", f"{folder} cannot be written to", "choose another one with --out")
        return
    free = shutil.disk_usage(folder).free
    low = free < GIB
    fix = "free some disk space: a run keeps checkpoints, samples and a report" if low else None
    yield Check("runs folder", "note" if low else "ok", f"{folder}, {free / GIB:.1f} GiB free", fix)


def _unless(fine: bool, fix: str) -> str | None:
    return None if fine else fix
