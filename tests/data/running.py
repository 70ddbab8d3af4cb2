"""Builds in other processes, with stages that are slow or fail where a test wants it, and what tests look at after."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.data.corpus import chat, encoded, line, picture, write
from weft.data.build import BuildConfig

ROOT = Path(__file__).parents[2]


def config(*sources: dict, **others) -> BuildConfig:
    return BuildConfig.model_validate({"sources": sources, **others})


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def ledger(folder: Path) -> list[dict]:
    return [json.loads(entry) for entry in (folder / "ledger.jsonl").read_text().splitlines()]


def write_documents(folder: Path, number: int, bad: dict[int, str] | None = None) -> Path:
    """A JSONL file of documents `d0`, `d1`, ... each with a picture; the picture of a bad one has the given name.

    Every tenth document has the id of the one before.
    """
    data = encoded(picture(1, (8, 8)))
    names = ["good.png", *(bad or {}).values()]
    write(folder, dict.fromkeys(names, data))
    lines = []
    for i in range(number):
        identity = f"d{i - 1}" if i % 10 == 9 else f"d{i}"
        lines.append(line(chat(identity, (bad or {}).get(i, "good.png"), text=f"text {i}")))
    write(folder, {"documents.jsonl": b"".join(lines)})
    return folder / "documents.jsonl"


def start(script: Path, body: str, patch: str = "") -> subprocess.Popen:
    """A Python process that runs `body` with `patch` in force in itself and in the workers that it starts.

    Spawned workers import the script of their parent, under another name.
    """
    script.write_text(
        "import os, re, signal, sys, time\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.data.running import config\n"
        "from weft.data import build as building\n"
        # what is started in the background of a shell has SIGINT ignored, and hands that down
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{patch}\n"
        "if __name__ == '__main__':\n" + "".join(f"    {row}\n" for row in body.splitlines())
    )
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
