"""`weft demo`: the whole job on this machine, from data to a report."""

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def demo(
    *,
    out: Path = Path("runs/demo"),
    steps: Annotated[int, Parameter(help="Training steps of each adapter.")] = 200,
    stories: Annotated[int, Parameter(help="Held-out stories to write and score.")] = 120,
    threads: Annotated[int, Parameter(help="CPU threads.")] = 2,
) -> None:
    """Build story data, tune LoRA and MoSS on the bundled generalist, write held-out stories, and report.

    Needs no download and no GPU. The report is `report.html` (one file, opens anywhere) and `report.json`.
    """
    from rich.console import Console

    from weft.evaluation.demo import run_demo

    console = Console(stderr=True)
    with console.status("starting") as status:
        last = time.monotonic()

        def say(line: str, *, done: bool = False) -> None:
            nonlocal last
            status.update(line)
            # a log gets a sign of life now and then; a terminal has the status line
            if done or (not console.is_terminal and time.monotonic() - last > 15):
                console.print(line)
                last = time.monotonic()

        result = run_demo(out, steps=steps, stories=stories, threads=threads, say=say)
    console.print(f"took {result['seconds']:.0f} s, at most {result['peak_rss_mb']:.0f} MB of memory")
    print(out / "report.html")
