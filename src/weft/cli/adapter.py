"""`weft adapter inspect | verify | merge | export`: what training wrote, proven and turned to other forms."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from weft.cli.loading import Loading
from weft.errors import UsageError

if TYPE_CHECKING:
    from weft.adapters.config import Branch
    from weft.adapters.inspection import Inspection, Modality
    from weft.synchronizer.inspection import SynchronizerInspection

app = App(name="adapter", help="Inspect, verify, merge and export what training wrote.")

Json = Annotated[bool, Parameter(name="--json", negative=())]
_IDLE = "does nothing: all its up-projections are zero, it was never trained"


@app.command
def inspect(folder: Path, /, *, json_output: Json = False) -> None:
    """Show what training wrote: adapter, synchroniser, parts. Checks an adapter's tensors; needs no base model.

    Parameters
    ----------
    folder: Path
        The folder of an adapter, such as runs/train/adapter.
    json_output: bool
        Print one JSON object for programs, with every layer.
    """
    from weft.adapters.inspection import inspect_adapter
    from weft.backbones.trained import holds_adapter, holds_parts, inspect_parts, synchronizer_folder
    from weft.synchronizer.inspection import inspect_synchronizer

    beside, parts = synchronizer_folder(folder), inspect_parts(folder) if holds_parts(folder) else None
    synchronizer = inspect_synchronizer(beside) if beside else None
    # a folder that holds none of the three is told as one without an adapter
    adapter = inspect_adapter(folder) if holds_adapter(folder) or not (beside or parts) else None
    if json_output:
        found = adapter.to_json() if adapter else {}
        found |= {"synchronizer": synchronizer and synchronizer.to_json(), "parts": parts and asdict(parts)}
        print(json.dumps(found, ensure_ascii=False))
        return
    if adapter:
        _print_adapter(adapter)
    if synchronizer:
        _print_synchronizer(synchronizer)
    if parts:
        print(f"own parameters of {parts.base}: {parts.parameters:,} in {len(parts.names)} tensors")
        print(f"  {', '.join(parts.names)}")


def _print_adapter(found: "Inspection") -> None:
    base = found.base["name"] if found.base else found.config.base_model_name_or_path
    print(f"{found.kind} adapter of {base or 'a base it does not name'}, {found.size:,} bytes")
    names = sorted({layer.rpartition(".")[2] for layer in found.layers})
    print(f"{found.parameters:,} parameters in {len(found.layers)} layers: {', '.join(names)}")
    print(f"routing by {found.config.routing}; pictures in the context take: {found.config.context_images}")
    if found.config.modules_to_save:
        print(f"saved whole: {', '.join(found.config.modules_to_save)} ({found.saved_modules:,} parameters)")
    _print_branches(found)


@app.command
def verify(
    folder: Path, /, *, model: str | None = None, json_output: Json = False, loading: Loading = Loading()
) -> None:
    """Load base and adapter in a fresh process and compare every bit of the logits. Exits 1 if anything is wrong.

    Parameters
    ----------
    folder: Path
        The folder of an adapter.
    model: str | None
        The base model; by default the one that the folder names.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.backbones.reload import verify_adapter

    found = verify_adapter(folder, model, load=loading.config())
    if json_output:
        print(json.dumps({"ok": True, **asdict(found)}))
        return
    print(f"a fresh process reproduces the logits of {found.positions} positions bit by bit")
    print(f"they differ from the base model's by up to {found.from_base:.3g}")
    for modality in found.idle:
        print(f"note: the {modality} branch {_IDLE}", file=sys.stderr)


@app.command
def merge(
    folder: Path,
    /,
    *,
    out: Path,
    text: Annotated[bool, Parameter(negative=())] = False,
    model: str | None = None,
    json_output: Json = False,
    loading: Loading = Loading(),
) -> None:
    """Add the text branch to the base model's weights and write a model that serves text only, without an adapter.

    It is written only if a fresh process loads it and gives the same logits, to 1e-5 of the largest.

    Parameters
    ----------
    folder: Path
        The folder of an adapter.
    out: Path
        The folder to make; `weft generate OUT PROMPT` then reads it.
    text: bool
        Merge the text branch: the one branch of which a single weight can be made. Pictures lose theirs.
    model: str | None
        The base model; by default the one that the folder names.
    json_output: bool
        Print one JSON object for programs.
    """
    from weft.backbones.reload import merge_adapter

    if not text:
        raise UsageError(
            "an adapter that depends on the modality cannot be merged into one weight; its text branch can",
            where="weft adapter merge",
            fix="add --text for a model that serves text only, or keep the adapter in its folder",
        )
    _check_new(out)
    found = merge_adapter(folder, out, model, loading.config())
    if json_output:
        print(json.dumps({"written_to": str(out), **asdict(found)}))
        return
    print(f"on text, logits differ from the adapted model's by at most {found.from_adapted:.1e}")
    print(f"written to {out}, for text only: pictures lost their own branch", file=sys.stderr)


@app.command
def export(folder: Path, /, *, out: Path, model: str | None = None, loading: Loading = Loading()) -> None:
    """Write the text branch as a plain LoRA folder, which PEFT loads without Weft.

    Parameters
    ----------
    folder: Path
        The folder of an adapter.
    out: Path
        The folder to make.
    model: str | None
        The base model; by default the one that the folder names.
    """
    from weft.backbones.reload import export_adapter

    _check_new(out)
    export_adapter(folder, out, model, loading.config())
    print(f"written to {out}", file=sys.stderr)


def _check_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError("--out exists and is not an empty folder", where=str(out), fix="name a new folder")


def _print_synchronizer(found: "SynchronizerInspection") -> None:
    eye, gates = found.config.eye, found.gates
    print(f"synchroniser of {found.base}, {found.eye + found.insertion:,} parameters")
    print(f"  eye: {found.eye:,}, pictures of {eye.side} x {eye.side}, maps of sides {', '.join(map(str, eye.sides))}")
    print(f"  branches: {found.insertion:,} in {len(gates)} layers, one in {found.config.every}")
    print(f"  gates: {', '.join(f'{gate:.3g}' for gate in gates)}")
    if not any(gates):
        print("note: the synchroniser does nothing: all its gates are zero, it was never trained")


def _print_branches(found: "Inspection") -> None:
    """One row for each kind of branch that layers have; where patterns differ there are several of a modality."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("branch", "rank", "window", "scale", "layers", "parameters", "up-projections"):
        table.add_column(column, overflow="fold")
    modalities: tuple[Modality, ...] = ("text", "image")
    notes = []
    for modality in modalities:
        layers = found.of(modality)
        for branch in dict.fromkeys(layer.branch for layer in layers):
            mine = [layer for layer in layers if layer.branch == branch]
            norms = [layer.norm for layer in mine]
            parameters = sum(layer.parameters for layer in mine)
            row: tuple[Any, ...] = (modality, branch.rank, _window(branch), f"{branch.scale:g}", len(mine))
            table.add_row(*map(str, row), f"{parameters:,}", f"norm {min(norms):.3g} to {max(norms):.3g}")
        if found.idle(modality):
            notes.append(f"note: the {modality} branch {_IDLE}")
        elif zero := sum(layer.norm == 0 for layer in layers):
            notes.append(f"note: the {modality} branch does nothing in {zero} of {len(layers)} layers")
    if found.config.branches.image == "text":
        notes.append("the text branch serves pictures too")
    Console().print(table)
    for note in notes:
        print(note)


def _window(branch: "Branch") -> str:
    if branch.experts:
        return "experts " + ", ".join(f"{k} x {k}" for k in branch.experts) + (", gated" if branch.gate else "")
    return f"{branch.kernel} x {branch.kernel} {branch.window}" if branch.kernel > 1 else "-"
