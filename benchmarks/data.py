"""How fast documents become data.    python -m benchmarks.data [--quick] [--data-juicer PYTHON]

The last line is JSON; every figure's spread goes to `--out FILE`. Both sides of a ratio do the same to the same input,
are compared before anything is timed, and take turns in one run. As many threads as OMP_NUM_THREADS says.

    decode_512, decode_3mp   decoding and resizing a JPEG to 224 pixels as the pipeline does, scaled in the decoder,
                             against Pillow: open, convert, resize
    lpips_once               LPIPS (AlexNet, 224 pixels) between all pairs of 6 pictures, features once for each,
                             against two passes for each pair
    ray_over_pool            wall clock of jobs of a second or more, on Ray against a pool of processes, both started
    docs_per_s_core          documents without pictures through a whole build: read, four predicates, written, merged
    packing_...              share of the positions of rows of 2048 that hold a token, best fit among 1000 documents
    rss_growth_10x           peak memory of a build of ten times as many documents with pictures, by that of one tenth
    vs_data_juicer           documents per second of a core, ours over Data-Juicer's: those of 3 to 6 pictures and 200
                             characters or more, none twice by its hash, in Parquet with their pictures, from one file

Seconds are CPU seconds, children's too, so that a busy machine changes little; those of Ray and the pool are of the
clock. Data-Juicer is not installed here: PYTHON is an interpreter that has it (`pip install py-data-juicer aiohttp ray
torch`), and without one its figure is null. It runs operators of its own, offline; its start-up is left out, as ours.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from weft.data.build import BuildConfig, build
from weft.data.dataset import open_dataset
from weft.data.executor import Executor, ExecutorConfig
from weft.data.executors import open_executor
from weft.data.rows import Extent, Row, RowsConfig, planned, utilisation
from weft.errors import ImageError
from weft.images import decode_image
from weft.scorers import EPS, LPIPS, SCALE, SHIFT

SIDE, ROW, WINDOW = 224, 2048, 1000
SIZES = {"decode_512": (512, 512), "decode_3mp": (2048, 1536)}
MAX_DIFFERENCE = 3.0
"""Mean difference of 8-bit values between a picture that was scaled in the decoder and one that was not."""
LENGTHS = {"packing_instruction": (528, (3, 6)), "packing_mmc4": (606, (1, 4))}
"""Mean tokens of a document, and how many pictures of 65 tokens it has."""
PICTURE = 65
LEAST_TEXT, IMAGES = 200, (3, 6)


@dataclass(frozen=True)
class Size:
    repeats: int
    pictures: int
    """Of each size to decode."""
    documents: int
    """Without pictures."""
    rounds: int
    """Of jobs."""
    jobs: int
    """Of a round, for each of two workers."""
    packed: int
    grown: int
    """Documents of the larger build of two."""
    compared: int
    """Documents that Data-Juicer is given too."""
    turns: int
    """Of it."""


FULL = Size(11, 6, 20_000, 5, 5, 100_000, 10_000, 20_000, 3)
QUICK = Size(5, 4, 10_000, 2, 3, 20_000, 3_000, 20_000, 1)
TINY = Size(2, 2, 300, 0, 0, 2_000, 100, 300, 1)


# --- decoding ---------------------------------------------------------------------------------------------------------


def photograph(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG of smooth shapes with some grain."""
    rng, (width, height) = np.random.default_rng(seed), size
    shapes = PILImage.fromarray(rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize(size, PILImage.Resampling.BICUBIC)) + rng.normal(0, 6, (height, width, 3))
    buffer = io.BytesIO()
    PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def naive_picture(data: bytes) -> PILImage.Image:
    picture = PILImage.open(io.BytesIO(data)).convert("RGB")
    return picture.resize((SIDE, SIDE), PILImage.Resampling.BICUBIC)


def our_picture(data: bytes) -> PILImage.Image:
    return decode_image(data, least=SIDE).resize((SIDE, SIDE), PILImage.Resampling.BICUBIC)


def decode(size: Size) -> dict[str, Any]:
    found = {}
    for name, sides in SIZES.items():
        files = [photograph(sides, seed) for seed in range(size.pictures)]
        worst = max(difference(our_picture(data), naive_picture(data)) for data in files)
        if worst > MAX_DIFFERENCE or not all(refuses(data[: len(data) * cut // 8]) for data in files for cut in (1, 7)):
            raise SystemExit(f"{name}: pictures differ by {worst:.2f}, or half of one was taken; nothing was timed")

        def naively(files: Sequence[bytes] = files) -> None:
            for data in files:
                naive_picture(data)

        def ours(files: Sequence[bytes] = files) -> None:
            for data in files:
                our_picture(data)

        times = race({"ours": ours, "naive": naively}, size.repeats)
        found[name] = {"difference": worst, "bytes": len(files[0]), "seconds": times, "ratio": ratio(times, "naive")}
    return found


def difference(a: PILImage.Image, b: PILImage.Image) -> float:
    return float(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean())


def refuses(data: bytes) -> bool:
    try:
        our_picture(data)
    except ImageError:
        return True
    return False


# --- LPIPS ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pairwise(network: LPIPS, pictures: Sequence[PILImage.Image]) -> Tensor:
    """Equation 1 of the paper, for one pair after the other."""
    shift, scale = (torch.tensor(each).view(3, 1, 1) for each in (SHIFT, SCALE))
    pixels = [
        (torch.from_numpy(np.array(each)).permute(2, 0, 1)[None] / 127.5 - 1 - shift) / scale for each in pictures
    ]
    found = torch.zeros(len(pixels), len(pixels))
    for i in range(len(pixels)):
        for j in range(i):
            total = 0.0
            for a, b, weight in zip(*(tapped(network, pixels[k]) for k in (i, j)), network.weights, strict=True):
                a, b = (each / (each.square().sum(1, keepdim=True).sqrt() + EPS) for each in (a, b))
                total += float(F.conv2d((a - b).square(), weight.view(1, -1, 1, 1)).mean())
            found[i, j] = found[j, i] = total
    return found


def tapped(network: LPIPS, x: Tensor) -> list[Tensor]:
    found = []
    for i, layer in enumerate(network.features):
        x = layer(x)
        if i in network.taps:
            found.append(x)
    return found


def lpips(size: Size) -> dict[str, Any]:
    torch.manual_seed(0)
    network = LPIPS("alex")
    pictures = [naive_picture(photograph((256, 256), seed)) for seed in range(6)]
    worst = float((network.of_pictures(pictures, SIDE) - pairwise(network, pictures)).abs().max())
    if worst > 1e-5:
        raise SystemExit(f"LPIPS is wrong by {worst:.1e}; nothing was timed")
    arms: dict[str, Callable[[], object]] = {
        "ours": lambda: network.of_pictures(pictures, SIDE),
        "pairwise": lambda: pairwise(network, pictures),
    }
    times = race(arms, size.repeats)
    return {"error": worst, "seconds": times, "ratio": ratio(times, "pairwise")}


# --- executors --------------------------------------------------------------------------------------------------------


def busy(job: tuple[bytes, int]) -> str:
    """Decodes a picture so many times."""
    data, times = job
    for _ in range(times):
        picture = decode_image(data)
    return str(picture.size)


def executors(size: Size) -> dict[str, Any]:
    data, workers = photograph(SIZES["decode_3mp"], 0), 2
    alone = clock(lambda: busy((data, 4))) / 4
    job = (data, math.ceil(1.2 / alone))  # a second or more of each
    starts: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        opened: dict[str, Executor[tuple[bytes, int], str]] = {}
        for kind in ("processes", "ray"):
            begin = time.perf_counter()
            opened[kind] = stack.enter_context(open_executor(ExecutorConfig(kind=kind, workers=workers), busy))
            work_off(opened[kind], [(data, 1)] * workers)
            starts[kind] = time.perf_counter() - begin
        arms = {kind: lambda kind=kind: work_off(opened[kind], [job] * workers * size.jobs) for kind in opened}
        times = race(arms, size.rounds, time.perf_counter)
    result = times["ray"]["median"] / times["processes"]["median"]
    shares = {"job_seconds": alone * job[1], "workers": workers, "jobs": workers * size.jobs, "start_seconds": starts}
    return {**shares, "seconds": times, "ratio": result}


def work_off(executor: Executor[tuple[bytes, int], str], jobs: Sequence[tuple[bytes, int]]) -> None:
    rest, running = iter(jobs), 0
    for _ in jobs:
        for job in itertools.islice(rest, executor.slots - running):
            executor.submit(job)
            running += 1
        outcome = executor.next()[1]
        running -= 1
        if outcome != str(SIZES["decode_3mp"]):
            raise SystemExit(f"a job came to {outcome}")


# --- builds -----------------------------------------------------------------------------------------------------------


def sentence(rng: random.Random, words: Sequence[str]) -> str:
    return " ".join(rng.choices(words, k=rng.randint(6, 18))).capitalize() + "."


def vocabulary(rng: random.Random) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]


def write_texts(file: Path, number: int) -> int:
    """Documents in the chat form of 6 to 12 sentences; every twentieth has one word. The number of the others."""
    rng = random.Random(0)
    words = vocabulary(rng)
    with open(file, "w") as handle:
        for i in range(number):
            texts = [sentence(rng, words) for _ in range(rng.randint(6, 12))] if i % 20 else ["short"]
            content = [{"type": "text", "text": " ".join(texts[k : k + 3])} for k in range(0, len(texts), 3)]
            turns = [{"role": "user", "content": words[i % 2000]}, {"role": "assistant", "content": content}]
            handle.write(json.dumps({"id": f"document {i}", "messages": turns}) + "\n")
    return number - -(-number // 20)


def throughput(size: Size, folder: Path) -> dict[str, Any]:
    kept = write_texts(folder / "texts.jsonl", size.documents)
    config = BuildConfig.model_validate(
        {
            "sources": [{"kind": "chat_jsonl", "path": folder / "texts.jsonl"}],
            "filters": [
                {"kind": "has_answer"},
                {"kind": "image_count", "min": 0, "max": 6},
                {"kind": "text_length", "min": 100},
                {"kind": "sentence_count", "max": 12},
            ],
            "executor": {"records": 1000},
        }
    )
    out, rates, seconds = folder / "texts", [], dict[str, float]()
    for _ in range(max(3, size.repeats // 2)):
        begin, wall = time.process_time(), time.perf_counter()
        summary = build(config, out)
        rates.append(size.documents / (time.process_time() - begin))
        seconds = {"wall": time.perf_counter() - wall}
        found = open_dataset(out)
        if summary.total.kept.records != kept or len(found) != kept or found[0].id != "document 1":
            raise SystemExit(f"the build kept {summary.total.kept.records} documents of {kept}")
    return {"documents": size.documents, "kept": kept, "per_second": quartiles(rates), "last_seconds": seconds}


PEAK = """
import json, sys
from pathlib import Path
from weft.data.build import BuildConfig, build
config = BuildConfig.model_validate(json.loads(sys.argv[1]))
kept = build(config, Path(sys.argv[2])).total.kept.records
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps([kept, int(line.split()[1]) * 1024]))
"""


def memory(size: Size, folder: Path) -> dict[str, Any]:
    """Peaks of builds in processes of their own, of documents with pictures."""
    (folder / "images").mkdir(parents=True)
    for i in range(8):
        (folder / f"images/{i}.jpg").write_bytes(photograph((384, 256), i))
    peaks: dict[int, int] = {}
    for number in (size.grown // 10, size.grown):
        with open(folder / f"{number}.jsonl", "w") as handle:
            for i in range(number):
                shown = [{"type": "image", "image": f"images/{(i + k) % 8}.jpg"} for k in range(3)]
                said = [{"type": "text", "text": f"document {i} " * 20}, *shown]
                handle.write(json.dumps({"id": f"{i}", "messages": [{"role": "assistant", "content": said}]}) + "\n")
        config = {
            "sources": [{"kind": "chat_jsonl", "path": str(folder / f"{number}.jsonl")}],
            "filters": [{"kind": "has_answer"}, {"kind": "duplicate_images", "max_bits": None}],
        }
        command = [sys.executable, "-c", PEAK, json.dumps(config), str(folder / f"built-{number}")]
        environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        kept, peaks[number] = json.loads(done.stdout.splitlines()[-1])
        if kept != number:
            raise SystemExit(f"the build kept {kept} documents of {number}")
    return {"peak_bytes": peaks, "ratio": peaks[size.grown] / peaks[size.grown // 10]}


# --- packing ----------------------------------------------------------------------------------------------------------


def drawn(mean: float, pictures: tuple[int, int], number: int, seed: int) -> list[Extent]:
    """Documents of pictures and log-normal lengths of text, as long as a row at most."""
    rng, shown = np.random.default_rng(seed), np.random.default_rng(seed + 1).integers(*pictures, number, endpoint=True)
    text = mean - PICTURE * shown.mean()
    spread = 0.8
    lengths = rng.lognormal(math.log(text) - spread**2 / 2, spread, number).astype(int) + 8
    found = []
    for count, length in zip(shown.tolist(), lengths.tolist(), strict=True):
        total = min(length, ROW - PICTURE * count) + PICTURE * count
        found.append(Extent(total, tuple((k * PICTURE, (k + 1) * PICTURE) for k in range(count))))
    return found


def packing(size: Size) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, (mean, pictures) in LENGTHS.items():
        shares, rates = [], []
        for seed in range(3):
            extents = drawn(mean, pictures, size.packed, seed)
            begin = time.process_time()
            packed = one_pass(extents)
            rates.append(size.packed / (time.process_time() - begin))
            pieces = sorted(piece for row in packed for piece in row.pieces)
            if pieces != [(i, 0, extent.length) for i, extent in enumerate(extents)]:
                raise SystemExit(f"{name}: a document was cut, lost or packed twice")
            if any(sum(end - start for _, start, end in row.pieces) > ROW for row in packed):
                raise SystemExit(f"{name}: a row is too long")
            shares.append(utilisation(packed, ROW))
        alone = statistics.fmean(extent.length for extent in extents) / ROW
        results[name] = {"share": quartiles(shares), "one_per_row": alone, "documents_per_second": quartiles(rates)}
    return results


def one_pass(extents: Sequence[Extent]) -> list[Row]:
    """The rows of all documents, planned as training plans them."""
    config = RowsConfig(window=min(WINDOW, len(extents)))
    found = []
    for row, after in planned("best_fit", config, ROW, len(extents), lambda at: [extents[i] for i in at]):
        found.append(row)
        if after.place == len(extents):
            break
    return found


# --- Data-Juicer ------------------------------------------------------------------------------------------------------

JUICER = """
import json, resource, sys, time
from data_juicer.config import init_configs
from data_juicer.core.executor import DefaultExecutor
def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
config = init_configs(["--config", sys.argv[1]])
begin, used = time.perf_counter(), cpu()
DefaultExecutor(config).run(skip_return=True)
with open(sys.argv[2], "w") as file:  # what it prints goes to its log
    json.dump({"wall": time.perf_counter() - begin, "cpu": cpu() - used}, file)
"""


EMBED = "lambda d: {**d, 'image_bytes': [open(path, 'rb').read() for path in d['images']]}"


def write_pictured(folder: Path, number: int) -> list[str]:
    """Records of a text and 1 to 8 pictures, every tenth as one before. Names of those that all filters keep."""
    rng = random.Random(0)
    words = vocabulary(rng)
    (folder / "images").mkdir(parents=True)
    for i in range(64):
        (folder / f"images/{i}.jpg").write_bytes(photograph((64, 64), i))
    records: list[dict[str, Any]] = []
    for i in range(number):
        shown = rng.sample(range(64), rng.randint(1, 8))
        text = " ".join(sentence(rng, words) for _ in range(rng.randint(1, 8)))
        images = [f"images/{k}.jpg" for k in shown]
        fresh = {"name": f"record {i}", "text": text, "images": images, "num_images": len(images)}
        records.append(rng.choice(records) if i % 10 == 9 else fresh)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    low, high = IMAGES
    kept = [
        record["name"]
        for record in records
        if low <= record["num_images"] <= high and len(record["text"]) >= LEAST_TEXT
    ]
    return list(dict.fromkeys(kept))


def juicer(size: Size, python: Path, folder: Path) -> dict[str, Any]:
    wanted, (low, high) = write_pictured(folder, size.compared), IMAGES
    recipe = {
        "project_name": "benchmark", "dataset_path": str(folder / "records.jsonl"), "np": 1, "use_cache": False,
        "export_path": str(folder / "juicer" / "kept.parquet"), "export_type": "parquet", "turbo": True,
        "open_tracer": False,
        "process": [
            {"specified_numeric_field_filter": {"field_key": "num_images", "min_value": low, "max_value": high}},
            {"text_length_filter": {"min_len": LEAST_TEXT}},
            {"document_deduplicator": {}},
            {"python_lambda_mapper": {"lambda_str": EMBED, "batched": False}},
        ],
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    config = BuildConfig.model_validate(
        {
            "sources": [
                {
                    "kind": "mapping", "path": folder / "records.jsonl", "meta": ["name"],
                    "output": [{"text": "text"}, {"image": "images"}],
                }
            ],
            "filters": [
                {"kind": "image_count", "min": low, "max": high},
                {"kind": "text_length", "min": LEAST_TEXT},
            ],
            "executor": {"records": 1000},
        }
    )  # fmt: skip
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "data_juicer": []}
    for turn in range(size.turns):
        wall, cpu = time.perf_counter(), time.process_time()
        build(config, folder / f"ours-{turn}")
        rounds["ours"].append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
        rounds["data_juicer"].append(run_juicer(python, folder, folder / f"home-{turn}"))
        kept = pq.read_table(folder / "juicer" / "kept.parquet", columns=["name"]).column(0).to_pylist()
        found = open_dataset(folder / f"ours-{turn}")
        names = [found[i].meta["name"] for i in range(len(found))]
        if not kept == names == wanted:
            raise SystemExit(f"Data-Juicer kept {len(kept)}, we {len(names)}, planted {len(wanted)}: not the same")
    seconds = {
        clock: {side: quartiles([each[clock] for each in of]) for side, of in rounds.items()}
        for clock in ("cpu", "wall")
    }
    ratios = {clock: ratio(times, "data_juicer") for clock, times in seconds.items()}
    shares = {"documents": size.compared, "kept": len(wanted), "seconds": seconds}
    return {**shares, "ratio": ratios["cpu"], "ratio_wall": ratios["wall"]}


def run_juicer(python: Path, folder: Path, home: Path) -> dict[str, float]:
    """Seconds of one run, with caches of its own."""
    # offline: it would install, by itself, packages that it finds missing
    offline = {"UV_OFFLINE": "1", "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | offline | {"HF_HOME": str(home), "DATA_JUICER_CACHE_HOME": str(home)}
    command = [str(python), "-c", JUICER, str(folder / "recipe.json"), str(folder / "juicer.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise SystemExit(f"Data-Juicer failed:\n{done.stderr[-2000:]}")
    return dict(json.loads((folder / "juicer.json").read_text()))


# --- all of it --------------------------------------------------------------------------------------------------------


def race(
    arms: Mapping[str, Callable[[], object]], repeats: int, now: Callable[[], float] = time.process_time
) -> dict[str, dict[str, float]]:
    """Seconds of each arm, of this process; arms take turns, so that a noisy neighbour hits all of them."""
    for arm in arms.values():
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            begin = now()
            arms[name]()
            times[name].append(now() - begin)
    return {name: quartiles(of) for name, of in times.items()}


def clock(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def quartiles(values: Sequence[float]) -> dict[str, float]:
    values = list(values)
    q1, median, q3 = statistics.quantiles(values * 2 if len(values) == 1 else values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "least": min(values), "most": max(values), "n": len(values)}


def ratio(times: dict[str, dict[str, float]], other: str) -> float:
    return times[other]["median"] / times["ours"]["median"]


def measure(size: Size, python: Path | None) -> dict[str, Any]:
    results: dict[str, Any] = {"decode": decode(size), "lpips": lpips(size), "packing": packing(size)}
    with tempfile.TemporaryDirectory() as folder:
        results["memory"] = memory(size, Path(folder) / "memory")
        results["build"] = throughput(size, Path(folder))
        results["data_juicer"] = None if python is None else juicer(size, python, Path(folder) / "juicer")
    results["executors"] = executors(size) if size.rounds else None
    return results


def figures(results: dict[str, Any]) -> dict[str, float | None]:
    """The last line: what the pipeline is held to."""
    beside = results["data_juicer"]
    found = {
        **{name: cell["ratio"] for name, cell in results["decode"].items()},
        "lpips_once": results["lpips"]["ratio"],
        "ray_over_pool": None if results["executors"] is None else results["executors"]["ratio"],
        "docs_per_s_core": results["build"]["per_second"]["median"],
        **{name: cell["share"]["median"] for name, cell in results["packing"].items()},
        "rss_growth_10x": results["memory"]["ratio"],
        "vs_data_juicer": None if beside is None else beside["ratio"],
    }
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


TARGETS = {
    "decode_512": ">= 1.6", "decode_3mp": ">= 4", "lpips_once": ">= 4", "ray_over_pool": "<= 1.3",
    "docs_per_s_core": ">= 5000", "packing_instruction": ">= 0.95", "packing_mmc4": ">= 0.98",
    "rss_growth_10x": "<= 1.1", "vs_data_juicer": ">= 3",
}  # fmt: skip


def show(found: dict[str, float | None], results: dict[str, Any]) -> None:
    table = Table("figure", "value", "target", "medians and quartiles; seconds where nothing is said")

    def line(values: dict[str, float]) -> str:
        return f"{values['median']:.4g} [{values['q1']:.4g}, {values['q3']:.4g}]"

    def both(times: dict[str, dict[str, float]]) -> str:
        return ", ".join(f"{name} {line(of)}" for name, of in times.items())

    spreads = {name: both(cell["seconds"]) for name, cell in results["decode"].items()}
    spreads["lpips_once"] = both(results["lpips"]["seconds"])
    shared = results["executors"]
    spreads["ray_over_pool"] = "not measured" if shared is None else both(shared["seconds"])
    spreads |= {"docs_per_s_core": line(results["build"]["per_second"]) + " documents per second"}
    spreads |= {name: line(cell["share"]) for name, cell in results["packing"].items()}
    spreads["rss_growth_10x"] = ", ".join(
        f"{number} documents {peak / 2**20:.0f} MiB" for number, peak in results["memory"]["peak_bytes"].items()
    )
    beside = results["data_juicer"]
    spreads["vs_data_juicer"] = "not measured: no --data-juicer" if beside is None else both(beside["seconds"]["cpu"])
    for name, value in found.items():
        table.add_row(name, "-" if value is None else f"{value:g}", TARGETS[name], spreads[name])
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer documents and repeats, the same keys")
    parser.add_argument(
        "--tiny", action="store_true", help="to see that it runs, without Ray: its figures mean nothing"
    )
    parser.add_argument("--data-juicer", type=Path, metavar="PYTHON", help="an interpreter that has py-data-juicer")
    parser.add_argument("--out", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    results = measure(TINY if args.tiny else QUICK if args.quick else FULL, args.data_juicer)
    found = figures(results)
    show(found, results)
    if args.out:
        machine = {
            "device": platform.machine(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
            "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip
        args.out.write_text(json.dumps({"figures": found, "machine": machine, **results}, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
