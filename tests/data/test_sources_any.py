"""Whatever stands in a record, and whatever bytes are damaged, nothing raises; all executors give the same bytes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.data.records.reading import CASES, kept, read


def free(name: str) -> bool:
    """Whether a record's file holds values of any type; columns and archives do not."""
    case = CASES[name]
    columns = case.write.__qualname__.startswith(("parquet", "tar", "tfrecord"))
    return isinstance(case.record(2), dict | list) and not columns


@pytest.mark.parametrize("name", filter(free, CASES))
def test_whatever_stands_in_a_field_nothing_raises(name, tmp_path):
    """One value of a record after the other replaced by values of every type; neighbours are kept."""
    case = CASES[name]
    values = (None, True, -1, 1e9, "", "x", "../x", [], ["x"], [[]], {}, {"x": [None]}, [None])
    first = case.record(2)
    places = list(paths(first))
    changed = [at(first, place, value) for place in places for value in values]
    case.lay(tmp_path, [case.record(1), *changed, case.record(3)])
    items = read(case, tmp_path)
    found = kept(items)
    assert case.document(1) in found
    assert case.document(3) in found
    assert all(drop.loss.message for item in items for drop in item.drops)


def paths(value: Any, here: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([here] if here else []), *(path for key, each in inner for path in paths(each, (*here, key)))]


def at(record: Any, place: tuple, value: Any) -> Any:
    changed = inner = json.loads(json.dumps(record))
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


@pytest.mark.parametrize("name", CASES)
def test_whatever_bytes_are_damaged_nothing_raises(name, tmp_path):
    case, rng = CASES[name], random.Random(name)
    case.lay(tmp_path, [case.record(n) for n in range(1, 6)])
    pictures = {Path(file).name for n in range(1, 6) for file in case.pictures(n)}
    files = [f for f in sorted(tmp_path.rglob("*")) if f.is_file() and f.name not in pictures and f.suffix != ".npy"]
    for _ in range(25):
        file = rng.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(1, 4) if damaged else 0):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        items = read(case, tmp_path)
        assert all(drop.loss.message for item in items for drop in item.drops)
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["mmc4", "mmdialog", "laion, webdataset", "obelics"])
def test_processes_give_the_bytes_of_serial(name, tmp_path):
    from weft.data.build import BuildConfig, build

    case = CASES[name]
    records = [case.record(1), case.damages[next(iter(case.damages))].change(case.record(2)), case.record(3)]
    case.lay(tmp_path / "in", records)
    made = {}
    for kind in ("serial", "processes"):
        source = {"kind": case.kind, "path": str(tmp_path / "in"), **case.config}
        config = BuildConfig.model_validate({"sources": [source], "executor": {"kind": kind, "workers": 2}})
        summary = build(config, tmp_path / kind)
        assert summary.total.kept.records == 2
        made[kind] = {f.name: f.read_bytes() for f in (tmp_path / kind).iterdir()}
    assert made["serial"] == made["processes"]
