"""All jobs of a budget on several processes of one thread each, then the report. What is done is not done again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from weft.atomic import write_json, write_text
from weft.config import load_config
from weft.errors import UsageError
from weft.evaluation.journal import EvaluationError, fingerprint
from weft.evaluation.miniature.arms import ARMS, BUDGETS, Budget
from weft.evaluation.miniature.jobs import Job, do, jobs_of
from weft.evaluation.task import read_json

Say = Callable[[str], None]
VERSION = 2
"""Of what a run computes: folders of another one are not gone on with."""
_TICK = 0.2


def run_miniature(
    out: Path, budget: str | Budget, *, workers: int | None = None, say: Say = lambda line: None
) -> dict[str, Any]:
    """Run everything into `out`, write `report.html`, `report.json` and `table.md`, and return the second.

    Args:
        workers: processes; None: as many as there are cores; 0: no other than this.
        say: told what is going on, a line at a time.

    Raises:
        UsageError: an unknown budget or a wrong recipe; or the folder holds another one's runs, or is in use.
        EvaluationError: a job failed; those that are done stay.
    """
    chosen, name = find_budget(budget)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            "another process runs here", where=str(out), fix="wait for it, or give another --out"
        ) from error
    with lock:
        _keep_budget(out, chosen)
        left = [job for job in jobs_of(chosen) if not job.result(out).is_file()]
        clock = _Clock(out / "clock.json")
        if left:
            count = (os.cpu_count() or 1) if workers is None else workers
            say(f"{len(left)} of {len(jobs_of(chosen))} jobs to do")
            _do_all(left, out, chosen, count, clock, say)
            clock.stop()
        return _report(out, chosen, name, clock.seconds)


def read_budget(out: Path) -> Budget:
    """Of the runs in a folder."""
    return Budget.model_validate(read_json(out / "budget.json")["budget"])


def read_results(out: Path, budget: Budget) -> dict[str, list[dict[str, Any]]]:
    """Arm -> its runs by seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for job in jobs_of(budget):
        if job.name.startswith("arm/"):
            result = read_json(job.result(out))
            found.setdefault(result["arm"], []).append(result)
    return found


class _Clock:
    """Wall time of all starts together, kept in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._before = float(read_json(file)["seconds"]) if file.is_file() else 0.0
        self._start: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._start is None else time.monotonic() - self._start)

    def tick(self) -> None:
        if self._start is None:
            self._start = time.monotonic()
        write_json(self._file, {"seconds": round(self.seconds, 1)})

    def stop(self) -> None:
        self._before, self._start = round(self.seconds, 1), None
        write_json(self._file, {"seconds": self._before})


def find_budget(budget: str | Budget) -> tuple[Budget, str]:
    """A budget and what it is called.

    Raises:
        ConfigError: neither one of `BUDGETS` nor a readable recipe of one.
    """
    if isinstance(budget, Budget):
        return budget, next((name for name, each in BUDGETS.items() if each == budget), "own")
    if budget in BUDGETS:
        return BUDGETS[budget], budget
    if not Path(budget).is_file():
        known = " or ".join(BUDGETS)
        raise UsageError(f"there is no budget {budget!r}", fix=f"use {known}, or the file of a recipe")
    return load_config(Budget, Path(budget)), budget


def _keep_budget(out: Path, budget: Budget) -> None:
    """A folder holds one budget's runs, of one version of the arms."""
    arms = {name: asdict(ARMS[name]) for name in budget.arms}
    values = {"budget": budget.model_dump(mode="json"), "arms": fingerprint([arms, VERSION])}
    file = out / "budget.json"
    if not file.is_file():
        write_json(file, values)
    elif read_json(file) != values:
        raise UsageError(
            "the folder holds runs of another budget, or of other arms", where=str(file), fix="give another --out"
        )


def _do_all(left: list[Job], out: Path, budget: Budget, workers: int, clock: _Clock, say: Say) -> None:
    clock.tick()
    if workers == 0:
        for job in left:
            do(job, out, budget, lambda line, job=job: say(f"{job.name}: {line}"))  # type: ignore[misc]
            clock.tick()
        return
    waiting, running, done = list(left), dict[str, subprocess.Popen[bytes]](), 0
    try:
        while waiting or running:
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    raise EvaluationError(
                        f"job {name} failed: {_last_line(_log(out, name))}",
                        where=str(_log(out, name)),
                        fix="the same command goes on from here",
                    )
                done += 1
                clock.tick()
                say(f"{done} of {len(left)} jobs done in {clock.seconds:.0f} s, the last one {name}")
            open_jobs = {*running, *(job.name for job in waiting)}
            for job in [job for job in waiting if not open_jobs & set(job.needs)][: workers - len(running)]:
                waiting.remove(job)
                running[job.name] = _start(job, out)
            time.sleep(_TICK)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()


def _start(job: Job, out: Path) -> "subprocess.Popen[bytes]":
    log = _log(out, job.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "weft.evaluation.miniature", str(out), job.name]
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env={**os.environ, **threads}
        )


def _log(out: Path, name: str) -> Path:
    return out / "logs" / f"{name.replace('/', '-')}.log"


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
    return "it said nothing"


def _report(out: Path, budget: Budget, name: str, seconds: float) -> dict[str, Any]:
    from weft.evaluation.miniature.page import make_report

    alphabets = {
        job.name.removeprefix("alphabet/"): read_json(job.result(out))
        for job in jobs_of(budget)
        if job.name.startswith("alphabet/")
    }
    report, page, table = make_report(read_results(out, budget), alphabets, budget, name, seconds)
    write_json(out / "report.json", report)
    write_text(out / "report.html", page)
    write_text(out / "table.md", table)
    return report
