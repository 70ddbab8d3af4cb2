"""`weft models list | show | convert`: the released generalists, what a checkpoint holds, pickled ones made safe."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from weft.errors import UsageError

if TYPE_CHECKING:
    from weft.backbones.catalogue import Known, Shape

app = App(name="models", help="List released models and their cost, look into a checkpoint, convert a pickled one.")

Json = Annotated[bool, Parameter(name="--json", negative=())]
GIB = 2**30
PICKLES = (".pth", ".bin", ".pt", ".ckpt")


@app.default
@app.command(name="list")
def list_models(*, json_output: Json = False) -> None:
    """List the released models that can be loaded, with their licences and the memory they need.

    Parameters
    ----------
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.backbones.catalogue import KNOWN, LONGEST, RANK

    if json_output:
        print(json.dumps({"models": [_facts(known) for known in KNOWN]}, ensure_ascii=False))
        return
    _print_table(KNOWN)
    print("pictures: as many as the context holds. run, train: GiB to answer one prompt, and to train a MoSS adapter")
    print(f"of rank {RANK}; with the decoder in bf16, 8 or 4 bits, at full context, but {LONGEST:,} positions at most.")
    print("Computed, not measured. `weft models show NAME` says more of one.")


@app.command
def show(name: str, /, *, json_output: Json = False) -> None:
    """Show what is known of a released model, or what a local folder holds. Nothing is downloaded, no tensor is loaded.

    Parameters
    ----------
    name: str
        A name from the list, or the folder of a checkpoint.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.backbones.catalogue import by_name

    known = by_name(name)
    if Path(name).is_dir():
        facts = _found(Path(name))
    elif known is not None:
        facts = _facts(known)
    elif name.removeprefix("weft/") == "tiny":
        from weft.backbones.tiny import WEIGHTS

        facts = _found(WEIGHTS)
    else:
        raise _unknown(name)
    if json_output:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        _print_facts(facts)


@app.command
def convert(source: Path, out: Path, /) -> None:
    """Write a pickled release (Meta's Chameleon, Anole, Emu2, MM-Interleaved) as safetensors, once.

    Reads tensors only, runs no code.

    Parameters
    ----------
    source: Path
        The folder of the release, or its one file.
    out: Path
        The folder to make; it appears when it is complete.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError("OUT exists and is not an empty folder", where=str(out), fix="name a new folder")
    if not source.exists():
        raise UsageError(
            "there is no such file or folder",
            where=str(source),
            fix=f"fetch a release first: hf download {source} --local-dir SRC",
        )
    files = [source] if source.is_file() else list(source.rglob("*"))
    if not any(path.suffix in PICKLES for path in files):
        ready = any(path.suffix == ".safetensors" for path in files)
        raise UsageError(
            "it holds no pickled weights" + (", but safetensors, which are loaded as they are" if ready else ""),
            where=str(source),
            fix=f"weft generate {source} PROMPT" if ready else f"give a folder with {', '.join(PICKLES)} files",
        )
    if any(path.name.startswith("consolidated") for path in files):
        from weft.backbones import meta

        meta.convert(source.parent if source.is_file() else source, out)
    else:
        from weft.backbones import emu2, mm_interleaved
        from weft.backbones.mm_interleaved import files as mm_files

        (mm_interleaved if mm_files.is_release(source) else emu2).convert(source, out)
    print(f"written to {out}", file=sys.stderr)


def _unknown(name: str) -> UsageError:
    import difflib

    from weft.backbones.catalogue import KNOWN

    names = [known.name for known in KNOWN]
    shorter = {each.rpartition("/")[2].lower(): each for each in names}
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), shorter, n=1)
    return UsageError(
        f"there is no model {name!r} in the list, and no folder of that name",
        where="weft models show",
        fix=f"did you mean {shorter[near[0]]}?" if near else "`weft models` lists them; or give a checkpoint's folder",
    )


def _memory(parameters: int, shape: "Shape", context: int) -> dict[str, dict[str, int]]:
    from weft.backbones.catalogue import PRECISIONS, run_bytes, train_bytes

    kinds = {"run": run_bytes, "train": train_bytes}
    return {
        kind: {precision: needed(parameters, shape, context, precision) for precision in PRECISIONS}
        for kind, needed in kinds.items()
    }


def _facts(known: "Known") -> dict[str, Any]:
    memory = {"memory_bytes": _memory(known.parameters, known.shape, known.context)}
    return asdict(known) | {"pictures": known.pictures} | memory


def _found(folder: Path) -> dict[str, Any]:
    from weft.backbones import family_of
    from weft.backbones.catalogue import examine

    found = examine(folder, family_of(folder) or "tiny")
    return {
        "name": str(folder),
        "family": found.family,
        "layout": found.layout,
        "revision": _revision(folder),
        "tensors": sum(len(part.tensors) for part in found.parts.values()),
        "parameters": found.parameters,
        "bytes": found.bytes,
        "dtypes": found.dtypes,
        "context": found.context,
        "pixels": found.pixels,
        "fingerprint": found.main.fingerprint,
        "memory_bytes": _memory(found.parameters, found.shape, found.context),
    }


def _revision(folder: Path) -> str | None:
    """The commit, of a folder in the hub's cache."""
    inside = folder.resolve()
    return inside.name if inside.parent.name == "snapshots" else None


def _gib(count: int) -> str:
    return f"{count / GIB:.0f}" if count >= 10 * GIB else f"{count / GIB:.2g}"


def _size(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 10**8 else f"{parameters / 1e6:.1f} M"


WIDTH = 100


def _print_table(rows: "tuple[Known, ...]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for column in ("size", "context", "pictures", "run", "train"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("licence")
    for known in rows:
        memory = _memory(known.parameters, known.shape, known.context)
        run, train = ("/".join(f"{count / GIB:.0f}" for count in memory[kind].values()) for kind in ("run", "train"))
        licence = known.licence.partition(":")[0]
        row = (_size(known.parameters), f"{known.context:,}", str(known.pictures), run, train, licence)
        table.add_row(known.name, *row)
    console = Console()
    # a column would be dropped rather than a line be broken
    console.width = max(console.width, WIDTH)
    console.print(table)


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for key, value in _lines(facts):
        table.add_row(Text(key), Text(value))
    Console().print(table)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person is told, in order; facts of a row and of a folder differ in some."""
    lines = [("model", facts["name"]), ("family", facts["family"]), ("layout", facts["layout"])]
    if "licence" in facts:
        lines.append(("licence", facts["licence"]))
    if facts.get("revision"):
        lines.append(("revision", facts["revision"]))
    lines.append(("size", f"{_size(facts['parameters'])} parameters"))
    if "tensors" in facts:
        stored = ", ".join(f"{_size(count)} in {dtype}" for dtype, count in facts["dtypes"].items())
        lines.append(("tensors", f"{facts['tensors']:,}, {facts['bytes'] / GIB:.2f} GiB: {stored}"))
        lines.append(("fingerprint", facts["fingerprint"]))
    lines.append(("context", f"{facts['context']:,} positions"))
    if "elements" in facts:
        around = facts["elements"] + facts["extra"]
        lines.append(("a picture", f"{around:,} positions, so {facts['pictures']} of them and no text"))
        lines.append(("trained to", "read and write pictures" if facts["writes"] else "read pictures"))
    lines.append(("pixel decoder", "is there" if facts["pixels"] else "is not there: it cannot show what it writes"))
    for kind, name in (("run", "GiB to run"), ("train", "GiB to train")):
        needed = facts["memory_bytes"][kind]
        lines.append((name, ", ".join(f"{_gib(count)} in {precision}" for precision, count in needed.items())))
    if facts.get("note"):
        lines.append(("note", facts["note"]))
    return lines
