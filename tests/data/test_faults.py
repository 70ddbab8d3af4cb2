"""Each planted fault is dropped for its own reason and nothing else is, by whomever the work is done."""

import hashlib
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.data.faults import FAULTS, ODDITIES, ONCE, Corpus, write_corpus
from tests.data.running import contents, ledger
from weft.data import open_dataset
from weft.data.build import BuildConfig, Summary, build


def check_drops(out: Path, corpus: Corpus, summary: Summary) -> None:
    """Every record that must go went at its stage, for its reason, by its field; all others are there."""
    found, wanted = {}, {}
    for entry in ledger(out):
        assert entry["what"] == "record", entry
        assert entry["message"]
        at = entry["source"], entry["line"]
        assert at not in found, f"{at} was dropped twice"
        found[at] = corpus.names.get(at), entry["stage"], entry["reason"], entry["field"]
    for at, case in corpus.dropped.items():
        wanted[at] = corpus.names[at], case.stage, case.reason, case.field if case.field else found.get(at, (0,))[-1]
    differ = {at: (found.get(at), wanted.get(at)) for at in found.keys() | wanted if found.get(at) != wanted.get(at)}
    assert differ == {}
    assert summary.quarantined == ()
    ids = [document.id for document in open_dataset(out)]
    assert len(ids) == len(set(ids)) == corpus.kept == summary.total.kept.records
    assert summary.total.read.records == corpus.kept + len(corpus.dropped)
    rows = summary.to_json()["stages"]
    left = rows[0]["in"]["records"]
    for row in rows:
        assert row["in"]["records"] == left
        assert sum(row["reasons"].values()) == row["dropped"]["records"]
        left -= row["dropped"]["records"]
    assert left == corpus.kept


def digest(out: Path) -> str:
    joined = "".join(f"{name}\0{hashlib.sha256(data).hexdigest()}\n" for name, data in sorted(contents(out).items()))
    return hashlib.sha256(joined.encode()).hexdigest()


def test_there_are_sixty_kinds_and_more():
    assert len(FAULTS) + len(ONCE) >= 60
    assert len({(case.stage, case.reason, case.field) for case in FAULTS.values()}) > 40
    assert len(ODDITIES) > 10


def test_each_fault_is_dropped_for_its_reason_and_nothing_else(tmp_path):
    corpus = write_corpus(tmp_path / "in", 300, 1)
    hashes = set()
    for records in (7, 1000):
        out = tmp_path / str(records)
        summary = build(BuildConfig.model_validate({**corpus.recipe, "executor": {"records": records}}), out)
        check_drops(out, corpus, summary)
        hashes.add(digest(out))
    assert len(hashes) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_thousand_documents_and_every_executor(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "in", 20_000, 20, seed=1)
    ways = {
        "serial": {},
        "one": {"kind": "processes", "workers": 1},
        "four": {"kind": "processes", "workers": 4},
        "ray": {"kind": "ray", "workers": 2},
    }
    hashes = {}
    for name, executor in ways.items():
        begin = time.perf_counter()
        summary = build(
            BuildConfig.model_validate({**corpus.recipe, "executor": {"records": 1000, **executor}}), tmp_path / name
        )
        seconds = time.perf_counter() - begin
        check_drops(tmp_path / name, corpus, summary)
        hashes[name] = digest(tmp_path / name)
        with capsys.disabled():
            print(
                f"\n{name:7} {seconds:6.1f} s  read {summary.total.read.records}  kept {summary.total.kept.records}",
                end="",
            )
            print(f"  {hashes[name]}", end="")
    reasons = Counter({f"{stage}: {why}": n for (stage, _, why), n in summary.total.reasons.items()})
    with capsys.disabled():
        print("\n" + "\n".join(f"{n:6} {reason}" for reason, n in reasons.most_common()))
    assert len(set(hashes.values())) == 1
