"""What was written works: a fresh process loads it and reproduces the logits (docs/guides/adapters.md).

Two short documents that every generalist can read, one of text and one with pictures, go through the model in this
process and in a new one, which knows nothing but the files.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from PIL import Image as PILImage
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.adapters.export import export_text_lora
from weft.adapters.inspection import inspect_adapter
from weft.adapters.merge import merge_text
from weft.atomic import MANIFEST, verify_folder, write_folder
from weft.backbones import load_model, save_backbone
from weft.backbones.base import Backbone, Painter, encode_document
from weft.backbones.loading import LoadConfig
from weft.backbones.trained import (
    holds_adapter,
    holds_parts,
    own_parameters,
    read_base_name,
    read_parts,
    trained_parameters,
)
from weft.document import Document, Image, Text, assistant, user
from weft.errors import AdapterError, UsageError, WeftError
from weft.layout import TokenSequence, lay_out
from weft.synchronizer.adapter import AttachedSynchronizer
from weft.synchronizer.sight import NOTHING, see

NOISE = 1e-6
"""Of the largest logit: what another order of fp32 sums does. An adapter that changes less does nothing."""
MERGED = 1e-5
"""Largest difference that merging may make, of the largest logit and of 1: fp32 rounds large sums more coarsely."""


@dataclass(frozen=True)
class Verified:
    """A fresh process gave the same logits."""

    positions: int
    """Positions compared."""
    from_base: float
    """Largest difference of a logit from the base model's."""
    from_adapted: float
    """Largest difference from the model with its adapter attached: 0 but for merging."""
    idle: tuple[str, ...] = ()
    """Modalities whose branch does nothing: it was never trained."""


def verify_adapter(
    folder: Path, model: str | None = None, trained: Backbone | None = None, load: LoadConfig = LoadConfig()
) -> Verified:
    """Load a base model and an adapter folder in a fresh process and compare every bit of the logits.

    Args:
        model: the base; by default the one that the folder names.
        trained: the model in memory that the folder was just written from; by default what this process loads.
        load: how the base's weights are held, here and there.

    Raises:
        UsageError: neither `model` nor the folder names a base.
        AdapterError: the folder does not fit, its files changed since they were written, the logits differ (names the
            first tensor that does), or it does nothing.
    """
    inspection = inspect_adapter(folder) if holds_adapter(folder) or read_base_name(folder) is None else None
    name = model or _base_name(folder)
    here = trained or load_model(name, folder, load)
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
    sequences = probe(here)
    expected = logits(here, sequences)
    if holds_parts(folder):  # what they replaced is only in the base's own files
        base, _ = _in_fresh_process(name, None, str(here.device), load)
    else:
        base = _base_logits(here, sequences)
    from_base = _changes(expected, base)
    if not from_base:
        branches = () if inspection is None else inspection.branches
        raise AdapterError(
            f"the adapter does nothing: its up-projections are zero, from {branches[0].layer}.moss_"
            f"{branches[0].modality}_B on"
            if branches and all(branch.norm == 0 for branch in branches)
            else "the adapter does nothing: the logits are those of the base model",
            where=str(folder),
            fix="train it",
        )
    there, hashes = _in_fresh_process(name, folder, str(here.device), load)
    for key, value in _hashes(here, folder).items():
        if hashes.get(key) != value:
            raise AdapterError(f"tensor {key} reads back changed", where=str(folder), fix="save the adapter again")
    difference = largest_difference(there, expected)
    if difference != 0:
        raise AdapterError(
            f"a fresh process gives logits that differ by up to {difference:.2e}",
            where=str(folder),
            fix="save the adapter again, and check that the base model is the same",
        )
    idle = tuple(modality for modality in ("text", "image") if inspection is not None and inspection.idle(modality))
    return Verified(sum(map(len, sequences)), from_base, 0.0, idle)


def merge_adapter(folder: Path, out: Path, model: str | None = None, load: LoadConfig = LoadConfig()) -> Verified:
    """Merge the text branch of an adapter folder into its base and write a model that `load_backbone` reads.

    It is there only if a fresh process loads it and gives the adapted model's logits on text, to 1e-5 of the
    largest.

    Raises:
        UsageError: no base is named.
        AdapterError: the text branch cannot be merged, does nothing, or the fresh process disagrees.
    """
    backbone = load_model(model or _base_name(folder), folder, load)
    sequences = probe(backbone)[:1]
    expected = logits(backbone, sequences)
    from_base = _changes(expected, _base_logits(backbone, sequences))
    if not from_base:
        raise AdapterError("the text branch does nothing: there is nothing to merge", where=str(folder), fix="train it")
    backbone.decoder, backbone.routing = merge_text(backbone.decoder), None
    with write_folder(out) as staging:
        save_backbone(backbone, staging)
        there, _ = _in_fresh_process(str(staging), None, str(backbone.device), load)
        difference = largest_difference(expected, there)
        largest = max(1.0, *(float(logits[logits.isfinite()].abs().max()) for logits in expected.values()))
        if not difference <= MERGED * largest:
            raise AdapterError(
                f"merging changes logits by {difference:.1e}, more than {MERGED:.0e} of the largest, {largest:.1f}",
                where=str(folder),
                fix="keep the adapter in its folder",
            )
    return Verified(sum(map(len, sequences)), from_base, difference)


def export_adapter(folder: Path, out: Path, model: str | None = None, load: LoadConfig = LoadConfig()) -> None:
    """Write the text branch of an adapter folder as a plain LoRA folder; see `export_text_lora`.

    Raises:
        UsageError: no base is named.
        AdapterError: the folder does not fit its base, or its text branch is no LoRA.
    """
    backbone = load_model(model or _base_name(folder), folder, load)
    export_text_lora(cast(PeftModel, backbone.decoder), out)


def probe(backbone: Backbone) -> list[TokenSequence]:
    """A document of text, and one that is given a picture and makes another."""
    given, made = (Image(_png(gradient)) for gradient in (PILImage.linear_gradient("L"), PILImage.radial_gradient("L")))
    documents = (
        Document((user("What is a garden?"), assistant("A place where somebody planted something."))),
        Document((user(Text("And this?"), given), assistant(Text("A lamp."), made, Text("It is on.")))),
    )
    return [encode_document(backbone, document) for document in documents]


def _png(picture: PILImage.Image) -> bytes:
    data = BytesIO()
    picture.resize((64, 64)).convert("RGB").save(data, "png")
    return data.getvalue()


@torch.no_grad()
def logits(backbone: Backbone, sequences: Sequence[TokenSequence], *, blind: bool = False) -> dict[str, Tensor]:
    """What either head says of each sequence, (L, V) and (L, K) or (L, F), each alone, on the CPU.

    Of a model that paints, the second is (T,) its errors in painting the sequence's pictures, with always the same
    noise.

    Args:
        blind: without an attached synchroniser.
    """
    found = {}
    stack = backbone.decoder
    training = stack.training
    stack.eval()
    device, synchronizer = backbone.device, backbone.synchronizer
    for number, sequence in enumerate(sequences):
        ids, layout, features = sequence.ids[None].to(device), lay_out([sequence.spans]), sequence.dense_features()
        layout, looks = layout.to(device), None
        features = None if features is None else features[None].to(device)
        if synchronizer is not None:
            pixels = torch.stack([each.seen for each in sequence.pixels]) if sequence.pixels else None
            layout, vectors, looks = see(synchronizer, pixels, ids, layout, backbone.tokens.begin)
            layout = layout.seeing(NOTHING) if blind else layout
            features = features if vectors is None else vectors
        hidden = backbone.forward(backbone.embed(ids, layout, features), layout)
        found[f"{number}.text"] = backbone.text_logits(hidden)[0].float().cpu()
        if backbone.kind != "diffusion":
            of_pictures = backbone.image_logits if backbone.kind == "discrete" else backbone.image_features
            found[f"{number}.image"] = of_pictures(hidden)[0].float().cpu()
        elif looks is not None:
            painted = torch.stack([each.painted for each in sequence.pixels if each.painted is not None]).to(device)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                errors = cast(Painter, backbone).painting_errors(hidden, ids, layout, looks, painted)
            found[f"{number}.image"] = errors.float().cpu()
    stack.train(training)
    return found


def _base_logits(backbone: Backbone, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """Without adapter and attached synchroniser."""
    blind = isinstance(backbone.synchronizer, AttachedSynchronizer)
    stack = backbone.decoder
    with stack.disable_adapter() if isinstance(stack, PeftModel) else nullcontext():
        return logits(backbone, sequences, blind=blind)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Over all elements; what is -inf in both is equal. NaN where one has a NaN."""
    found = [torch.where(value == other[key], 0.0, (value - other[key]).abs()).max() for key, value in one.items()]
    return torch.stack(found).max().item()


def _changes(adapted: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """How much an adapter changes the logits; 0 where it is no more than noise."""
    largest = max(value[value.isfinite()].abs().max().item() for value in base.values())
    difference = largest_difference(adapted, base)
    return difference if difference > NOISE * largest else 0.0


def _base_name(folder: Path) -> str:
    name = read_base_name(folder)
    if name is None:
        raise UsageError("the adapter folder names no base model", where=str(folder), fix="name it: --model NAME")
    return name


def _hashes(backbone: Backbone, folder: Path) -> dict[str, str]:
    """Of every tensor that a folder put on a backbone."""
    tensors = dict[str, Tensor](trained_parameters(backbone))
    if holds_parts(folder):
        own = dict(own_parameters(backbone))
        tensors |= {f"parts.{name}": own[name] for name, _ in read_parts(folder)}
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


def _in_fresh_process(
    model: str, adapter: Path | None, device: str, load: LoadConfig
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The logits, and the hashes of the adapter's tensors, as another process finds them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.safetensors"
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            model,
            str(adapter or ""),
            device,
            load.model_dump_json(),
            str(out),
        ]
        # products may differ in their last bits with the number of threads
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
        if done.returncode != 0:
            said = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
            raise AdapterError(f"a fresh process cannot load it: {said}", where=str(adapter or model))
        with safe_open(out, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def main(model: str, adapter: str, device: str, load: str, out: str) -> None:
    """What the fresh process does."""
    try:
        backbone = load_model(model, adapter or None, LoadConfig.model_validate_json(load), device=device)
    except WeftError as error:
        sys.exit(error.what)
    save_file(logits(backbone, probe(backbone)), out, metadata=_hashes(backbone, Path(adapter)) if adapter else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
