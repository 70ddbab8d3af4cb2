"""What a dataset holds, in numbers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from weft.atomic import verify_folder

_QUANTILES = {"least": 0.0, "10 %": 0.1, "half": 0.5, "90 %": 0.9, "most": 1.0}


@dataclass(frozen=True)
class Stats:
    totals: dict[str, int]
    quantiles: tuple[str, ...]
    """What the columns of the next are."""
    of_a_document: dict[str, tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_stats(path: Path) -> Stats:
    """Count the dataset folder `path`, one row group at a time.

    Raises:
        CheckpointError: it is no dataset, or not whole.
    """
    verify_folder(path)
    files = sorted(path.glob("*.parquet"))
    by_document: dict[str, list[int]] = {name: [] for name in ("texts", "characters", "images", "image bytes")}
    pictures: set[bytes] = set()
    groups = 0
    for file in files:
        with pq.ParquetFile(file) as shard:
            for group in range(shard.num_row_groups):
                groups += 1
                for name, values in _measure(shard.read_row_group(group), pictures).items():
                    by_document[name] += values
    totals = {
        "documents": len(by_document["texts"]),
        **{name: sum(values) for name, values in by_document.items()},
        "different images": len(pictures),
        "files": len(files),
        "row groups": groups,
    }
    shown = {name: _quantiles(values) for name, values in by_document.items()}
    return Stats(totals, tuple(_QUANTILES), shown)


def _measure(table: pa.Table, pictures: set[bytes]) -> dict[str, list[int]]:
    """Numbers of every document of a row group; adds the hashes of its pictures to `pictures`."""
    for hashes in table.column("sha256").to_pylist():
        pictures.update(bytes.fromhex(each) for each in hashes)
    found: dict[str, list[int]] = {"texts": [], "characters": []}
    for messages in table.column("messages").to_pylist():
        texts = [part["text"] for turn in messages for part in turn["content"] if part["type"] == "text"]
        found["texts"].append(len(texts))
        found["characters"].append(sum(map(len, texts)))
    images = table.column("images").combine_chunks()
    sizes = pc.binary_length(images.flatten().field("bytes")).to_pylist()
    ends = pc.cumulative_sum(pc.list_value_length(images)).to_pylist()
    found["images"] = pc.list_value_length(images).to_pylist()
    found["image bytes"] = [sum(sizes[end - n : end]) for n, end in zip(found["images"], ends, strict=True)]
    return found


def _quantiles(values: Sequence[int]) -> tuple[int, ...]:
    ordered = sorted(values)
    return tuple(ordered[int(q * (len(ordered) - 1))] for q in _QUANTILES.values()) if ordered else ()
