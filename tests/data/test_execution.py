"""Who does the work changes nothing; what was done is not done again; what fails costs itself and is named."""

import json
import os
import random
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest

from tests.data.corpus import MIXED, chat, encoded, line, picture, png, write, write_mixed
from tests.data.running import config, contents, ledger, start, write_documents
from weft.atomic import verify_folder
from weft.cli import main
from weft.data import open_dataset
from weft.data.build import build, commit, process, work_share
from weft.data.commit import duplicates
from weft.data.executor import Died, ExecutorConfig
from weft.data.executors import open_executor
from weft.data.filters import FILTERS
from weft.data.sources.base import Source
from weft.data.stage import Count, Loss, Record, Together, count, run_stages, run_window
from weft.data.units import Share
from weft.data.worker import Worker
from weft.document import Document, Text, assistant
from weft.errors import CheckpointError, UsageError, WeftError


@pytest.fixture
def done_again(monkeypatch):
    """The identities of the units that workers are given."""
    given, real = [], Worker.__call__

    def noted(self, job):
        given.append(job.chunk.identity)
        return real(self, job)

    monkeypatch.setattr(Worker, "__call__", noted)
    return given


def stop_before_the_end(monkeypatch, made, out):
    """A build that does all its work and dies when it merges it."""

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("weft.data.commit.ShardWriter.close", fail)
        with pytest.raises(KeyboardInterrupt):
            build(made, out)


def failing(monkeypatch, problem):
    """Put `problem` where pictures are decoded; it gets a picture's path and may raise."""
    import weft.data.filters.decode as decode

    real = decode._problem

    def wrapped(image, max_pixels):
        problem(image.path)
        return real(image, max_pixels)

    monkeypatch.setattr(decode, "_problem", wrapped)


# who does the work


def test_the_bytes_do_not_tell_who_worked_nor_in_what_pieces(tmp_path):
    write_mixed(tmp_path / "in", MIXED * 8)
    write_documents(tmp_path / "in" / "more", 60)
    sources = ({"kind": "auto", "path": str(tmp_path / "in")}, {"kind": "picturebook", "n": 150, "seed": 3})
    ways = {
        "serial": {},
        "pieces": {"records": 1},
        "one": {"kind": "processes", "workers": 1, "records": 30},
        "four": {"kind": "processes", "workers": 4, "records": 70},
    }
    for name, executor in ways.items():
        build(config(*sources, executor=executor), tmp_path / name)
    wanted = contents(tmp_path / "serial")
    assert len(open_dataset(tmp_path / "serial")) > 200
    assert {name for name in ways if contents(tmp_path / name) != wanted} == set()
    build(config(*sources), tmp_path / "four")  # replaces it
    assert contents(tmp_path / "four") == wanted
    assert not list(tmp_path.glob(".*.building"))


def test_pages_of_large_pictures_do_not_tell_the_pieces_either(tmp_path):
    large = {f"{i}.png": encoded(picture(i, (100, 100))) for i in range(8)}
    lines = [line(chat(f"d{i}", f"{i % 8}.png")) for i in range(250)]
    write(tmp_path / "in", {**large, "documents.jsonl": b"".join(lines)})
    for records in (64, 128, 250):
        source = {"kind": "chat_jsonl", "path": str(tmp_path / "in")}
        build(config(source, executor={"records": records}), tmp_path / str(records))
    assert contents(tmp_path / "64") == contents(tmp_path / "128") == contents(tmp_path / "250")


def test_row_groups_are_bounded_and_have_a_page_index(tmp_path, monkeypatch):
    monkeypatch.setattr("weft.data.shards.ROW_BYTES", 3000)
    summary = build(config({"kind": "picturebook", "n": 40}), tmp_path / "out")
    sizes = [sum(len(image.data) for image in document.images) for document in open_dataset(tmp_path / "out")]
    assert max(sizes) > 500
    metadata = pq.read_metadata(tmp_path / "out" / summary.files[0])
    at = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        assert rows == 1 or sum(sizes[at : at + rows]) <= 3000
        at += rows
        assert metadata.row_group(group).column(0).has_offset_index
    assert at == 40

    monkeypatch.undo()
    build(config({"kind": "picturebook", "n": 250, "task": "caption"}), tmp_path / "small")
    metadata = pq.read_metadata(next((tmp_path / "small").glob("*.parquet")))
    assert [metadata.row_group(i).num_rows for i in range(3)] == [100, 100, 50]


def _square(job):
    if job == "die":
        os._exit(7)
    if job == "raise":
        raise WeftError("as asked", where="here", fix="do not ask")
    return job * job


@pytest.mark.parametrize("kind", ["serial", "processes"])
def test_an_executor_does_every_job_once_and_raises_what_is_raised(kind):
    with open_executor(ExecutorConfig(kind=kind, workers=2), _square) as executor:
        waiting, found = list(range(9)), Counter()
        running = 0
        while waiting or running:
            while waiting and running < executor.slots:
                executor.submit(waiting.pop())
                running += 1
            found.update([executor.next()])
            running -= 1
        assert found == Counter((i, i * i) for i in range(9))
        executor.submit("raise")
        with pytest.raises(WeftError, match="as asked") as error:
            executor.next()
        assert (error.value.where, error.value.fix) == ("here", "do not ask")


def test_a_worker_that_dies_costs_its_job_alone():
    with open_executor(ExecutorConfig(kind="processes", workers=2), _square) as executor:
        for job in ("die", 3):
            executor.submit(job)
        found = dict(executor.next() for _ in range(2))
        assert found == {"die": Died("exit code 7"), 3: 9}
        executor.submit(4)
        executor.submit(5)
        assert dict(executor.next() for _ in range(2)) == {4: 16, 5: 25}


def test_a_script_without_a_guard_is_told_so(tmp_path):
    patch = (
        "building.build(config({'kind': 'picturebook', 'n': 3}, executor={'kind': 'processes', 'workers': 1}), "
        f"Path({str(tmp_path / 'out')!r}))"
    )
    ended = start(tmp_path / "script.py", "pass", patch)
    _, err = ended.communicate(timeout=60)
    assert "could not be started" in err
    assert "__name__ == '__main__'" in err
    assert not (tmp_path / ".out.building").exists()


# stages


def _documents(rng: random.Random, number: int) -> list[Record]:
    records = []
    for i in range(number):
        document = Document((assistant(*(f"{i}.{j}" for j in range(rng.randint(1, 4)))),), f"d{i}")
        lost = (Loss("text", "blank", "lost"),) if rng.random() < 0.3 else ()
        records.append(Record("f", i, document, count(document) + Count(0, len(lost), 0), lost))
    return records


def _drop_odd(document):
    if int(document.id[1:]) % 2:
        return None, (Loss("record", "odd", "is odd"),)
    return document, ()


def _shorten(document):
    (turn,) = document.turns
    if len(turn.parts) == 1:
        return document, ()
    return Document((assistant(*turn.parts[1:]),), document.id), (Loss("text", "first", "the first goes"),)


@pytest.mark.parametrize("seed", range(5))
def test_together_gives_what_each_alone_gives(seed):
    rng = random.Random(seed)
    seen = []

    def together(documents):
        seen.append(len(documents))
        return [_shorten(document) for document in documents]

    stages = [("shorten", Together(together)), ("odd", _drop_odd), ("again", Together(together))]
    records = _documents(rng, rng.randint(0, 20))
    items = run_window(records, stages)
    assert seen == ([len(records), (len(records) + 1) // 2] if records else [])
    assert items == [run_stages(record, stages) for record in records]
    for item in items:
        assert item.kept + sum((drop.count for drop in item.drops), Count()) == item.record.read


def test_a_stage_that_loses_count_is_an_error():
    records = _documents(random.Random(0), 3)
    with pytest.raises(WeftError, match="stage few gave 2 outcomes for 3 documents"):
        run_window(records, [("few", Together(lambda documents: [(d, ()) for d in documents[1:]]))])
    with pytest.raises(WeftError, match="stage thief took parts of document d0 without naming them"):
        run_stages(records[0], [("thief", lambda document: (None, ()))])
    with pytest.raises(WeftError, match="stage liar took"):
        run_stages(records[0], [("liar", lambda document: (document, (Loss("text", "x", "x"),)))])


@pytest.mark.parametrize("seed", range(20))
def test_duplicates_are_found_wherever_they_are(seed):
    rng = random.Random(seed)
    ids = [rng.choice([None, *map(str, range(rng.randint(1, 40)))]) for _ in range(rng.randint(0, 80))]
    first, wanted = {}, {}
    for number, identity in enumerate(ids):
        if identity is not None and first.setdefault(identity, number) != number:
            wanted[number] = first[identity]
    assert duplicates(ids) == wanted


def test_a_look_sees_what_a_build_makes(tmp_path):
    source = {"kind": "chat_jsonl", "path": str(write_documents(tmp_path / "in", 150))}
    summary = build(config(source, executor={"records": 20}), tmp_path / "out")
    items = [item for _, _, several in process(config(source)) for item in several]
    assert [item.document for item in items if item.document] == list(open_dataset(tmp_path / "out"))
    looked = Counter(drop.loss for item in items for drop in item.drops)
    assert looked == Counter(
        Loss(e["what"], e["reason"], e["message"], e["field"], e["image"]) for e in ledger(tmp_path / "out")
    )
    assert summary.total.reasons["unique", "record", "duplicate_id"] == 15


# going on where it was


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch, done_again):
    file = write_documents(tmp_path / "in", 300)
    source = {"kind": "chat_jsonl", "path": str(file)}
    made = config(source, executor={"records": 64})
    build(made, tmp_path / "wanted")
    stop_before_the_end(monkeypatch, made, tmp_path / "out")
    done_again.clear()
    build(made, tmp_path / "out")
    assert done_again == []
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")

    changes = {
        "a setting of the source": config({**source, "on_bad_image": "image"}, executor={"records": 64}),
        "a setting of a stage": config(source, filters=[{"kind": "image_count", "min": 1}], executor={"records": 64}),
        "another number of stages": config(source, filters=[], executor={"records": 64}),
        "fresh": made,
    }
    for name, changed in changes.items():
        stop_before_the_end(monkeypatch, made, tmp_path / "out")
        done_again.clear()
        build(changed, tmp_path / "out", fresh=name == "fresh")
        assert len(done_again) == 5, name
        assert not (tmp_path / ".out.building").exists()

    stop_before_the_end(monkeypatch, made, tmp_path / "out")
    file.write_bytes(file.read_bytes().replace(b"text 298", b"text 300"))  # of the same size
    os.utime(file, ns=(1, 1))
    done_again.clear()
    build(made, tmp_path / "out")
    assert len(done_again) == 5
    assert [*open_dataset(tmp_path / "out")[269].texts][1].text == "text 300"


def test_a_list_that_a_stage_names_is_part_of_what_it_does(tmp_path):
    from weft.data.sources import chat_jsonl
    from weft.data.units import plan_work

    class Listed(chat_jsonl.ChatJsonl):
        hashes: object = None

    file = write_documents(tmp_path / "in", 5)
    (tmp_path / "list.txt").write_text("a")

    def identity():
        work = plan_work([Listed(path=file, hashes=tmp_path / "list.txt")], (), 10, tmp_path)
        return work.chunks[0].identity

    first = identity()
    assert identity() == first
    (tmp_path / "list.txt").write_text("ab")
    assert identity() != first


@pytest.mark.parametrize("harm", ["cut", "changed"])
def test_damaged_work_is_done_again(tmp_path, monkeypatch, done_again, harm):
    made = config({"kind": "picturebook", "n": 30}, executor={"records": 1})
    build(made, tmp_path / "wanted")
    made = config({"kind": "picturebook", "n": 130}, executor={"records": 1})
    build(made, tmp_path / "wanted")
    stop_before_the_end(monkeypatch, made, tmp_path / "out")
    parts = sorted((tmp_path / ".out.building" / "parts").iterdir())
    assert len(parts) == 3
    file = parts[1] / "rows.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if harm == "changed" else data[:-1])
    if harm == "changed":
        with pytest.raises(CheckpointError, match="damaged"):
            build(made, tmp_path / "out")
    done_again.clear()
    build(made, tmp_path / "out")
    assert done_again == [parts[1].name]
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_a_repeated_id_is_dropped_with_what_its_document_holds_and_names_the_first(tmp_path):
    write(tmp_path / "in", {"a.png": png(1), "b.png": png(2)})
    records = [chat("same", "a.png"), chat("other"), chat("same", "a.png", "b.png")]
    (tmp_path / "in/records.jsonl").write_bytes(b"".join(map(line, records)))
    summary = build(config({"kind": "chat_jsonl", "path": str(tmp_path / "in/records.jsonl")}), tmp_path / "out")
    (entry,) = ledger(tmp_path / "out")
    assert (entry["id"], entry["line"], entry["texts"], entry["images"]) == ("same", 3, 2, 2)
    assert entry["message"] == "records.jsonl, line 1 has the same id"
    assert (summary.total.kept, summary.total.lost) == (Count(2, 4, 1), Count(1, 2, 2))


def test_a_build_that_goes_on_inside_its_source_does_not_read_itself(tmp_path, monkeypatch):
    write_documents(tmp_path, 20)
    made = config({"kind": "auto", "path": str(tmp_path)})
    stop_before_the_end(monkeypatch, made, tmp_path / "out")
    assert (tmp_path / ".out.building").is_dir()
    build(made, tmp_path / "out")
    assert {entry["reason"] for entry in ledger(tmp_path / "out")} == {"duplicate_id"}
    build(made, tmp_path / "out")  # beside the times of the last one, and the dataset
    assert {entry["reason"] for entry in ledger(tmp_path / "out")} == {"duplicate_id", "built_dataset"}


def test_a_second_build_on_the_same_folder_refuses(tmp_path):
    made = config({"kind": "picturebook", "n": 100}, executor={"records": 1})
    refused = []

    def second(progress):
        for again in (build, commit):
            with pytest.raises(UsageError, match="another build is writing"):
                again(made, tmp_path / "out")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("weft.data.parts._GRACE", 0.1)
            with pytest.raises(UsageError, match="another build is writing"):
                work_share(made, tmp_path / "out", Share(0, 2))
        refused.append(progress.done)

    build(made, tmp_path / "out", on_progress=second)
    assert refused == [1, 2]
    assert len(open_dataset(tmp_path / "out")) == 100


def test_what_the_dead_left_goes_and_what_others_write_stays(tmp_path, monkeypatch):
    made = config({"kind": "picturebook", "n": 3})
    stop_before_the_end(monkeypatch, made, tmp_path / "out")
    names = (".out.a1b2c3d_.part", ".out.a1b2c3d4.old", ".out.building/parts/.c.part", ".out.building/running/d")
    mine = [tmp_path / name for name in names]
    others = [tmp_path / name for name in (".other.a1b2c3d4.part", "out.a1b2c3d4.part", ".out.v2.a1b2c3d4.part")]
    for folder in (*mine, *others):
        folder.mkdir()

    def look(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("weft.data.build._finish", lambda *_: look(_))
        with pytest.raises(KeyboardInterrupt):
            build(made, tmp_path / "out")
    assert [folder for folder in mine if folder.exists()] == []
    assert all(folder.exists() for folder in others)


def test_nothing_stays_of_a_build_that_could_not_begin(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match="nothing to read"):
        build(config({"kind": "auto", "path": str(tmp_path / "in")}), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]


# several machines


def test_ranks_share_the_work_and_one_commits(tmp_path, done_again, capsys):
    file = write_documents(tmp_path / "in", 300)
    made = config({"kind": "chat_jsonl", "path": str(file)}, executor={"records": 64})
    build(made, tmp_path / "wanted")
    done_again.clear()
    shares = [work_share(made, tmp_path / "out", Share(rank, 3)) for rank in (0, 2)]
    with pytest.raises(UsageError, match="was not done"):
        commit(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    refused = []

    def same_rank(progress):
        with pytest.raises(UsageError, match="another build is writing"):
            work_share(made, tmp_path / "out", Share(1, 3))
        with pytest.raises(UsageError, match="another build is writing"):
            commit(made, tmp_path / "out")
        refused.append(progress.done)

    shares.append(work_share(made, tmp_path / "out", Share(1, 3), on_progress=same_rank))
    assert [share.units for share in shares] == [2, 1, 2]
    assert refused == [1, 2]
    assert len(done_again) == len(set(done_again)) == 5
    commit(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    assert not (tmp_path / ".out.building").exists()

    command = ["data", "build", str(file), "--executor.records", "64", "--out", str(tmp_path / "cli")]
    for options in (["--rank", "0", "--world", "2"], ["--rank", "1", "--world", "2"], ["--commit"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *options])
        assert not stopped.value.code
    data = [file.read_bytes() for file in sorted((tmp_path / "cli").glob("*.parquet"))]
    assert data == [file.read_bytes() for file in sorted((tmp_path / "wanted").glob("*.parquet"))]
    for options in (["--rank", "0"], ["--rank", "2", "--world", "2"], ["--rank", "0", "--world", "2", "--commit"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *options])
        assert stopped.value.code == 2
    capsys.readouterr()


# what fails


def test_a_record_that_cannot_be_worked_on_is_set_aside_and_tried_again_later(tmp_path, monkeypatch, capsys):
    file = write_documents(tmp_path / "in", 50, {20: "bad.png"})
    made = config({"kind": "auto", "path": str(file)})
    build(made, tmp_path / "wanted")

    def problem(path):
        if path == "bad.png":
            raise ZeroDivisionError("by nothing")

    with monkeypatch.context() as patched:
        failing(patched, problem)
        with pytest.raises(SystemExit) as stopped:
            main(["data", "build", str(file), "--out", str(tmp_path / "out")])
        assert stopped.value.code == 1
        out, err = capsys.readouterr()
        assert "documents.jsonl, line 21: ZeroDivisionError: by nothing" in err
        assert "raised" in out
        again = build(made, tmp_path / "out")
    (entry,) = again.quarantined
    assert (entry["what"], entry["reason"], entry["line"], entry["id"]) == ("record", "raised", 21, "d20")
    assert entry in ledger(tmp_path / "out")
    again.total.check()
    assert again.total.kept.records == len(open_dataset(tmp_path / "out")) == 44
    stages = again.to_json()["stages"]
    assert [row["stage"] for row in stages[:2]] == ["read", "quarantine"]
    assert stages[1]["dropped"]["records"] == 1
    (note,) = (tmp_path / ".out.building" / "quarantine").iterdir()
    assert "ZeroDivisionError: by nothing" in json.loads(note.read_text())["set_aside"][0]["details"]

    assert build(made, tmp_path / "out").quarantined == ()
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    assert not (tmp_path / ".out.building").exists()


def test_of_documents_taken_together_the_one_at_fault_is_set_aside(tmp_path, monkeypatch):
    file = write_documents(tmp_path / "in", 40, {7: "bad.png", 12: "bad.png"})
    sizes = []

    def together(documents):
        sizes.append(len(documents))
        if any(image.path == "bad.png" for document in documents for image in document.images):
            raise ValueError("no answer")
        return [(document, ()) for document in documents]

    monkeypatch.setitem(FILTERS, "has_answer", lambda config: Together(together))
    summary = build(config({"kind": "chat_jsonl", "path": str(file)}), tmp_path / "out")
    assert sizes[0] == 40
    assert set(sizes[1:]) == {1}
    assert [entry["line"] for entry in summary.quarantined] == [8, 13]
    assert summary.total.kept.records == 40 - 2 - 4


def test_what_fails_for_a_while_costs_nothing(tmp_path, monkeypatch):
    file = write_documents(tmp_path / "in", 30, {5: "bad.png"})
    made = config({"kind": "chat_jsonl", "path": str(file)})
    build(made, tmp_path / "wanted")
    times = []

    def problem(path):
        if path == "bad.png":
            times.append(path)
            if len(times) < 3:
                raise OSError("try later")

    failing(monkeypatch, problem)
    assert build(made, tmp_path / "out").quarantined == ()
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_a_unit_that_cannot_be_read_is_set_aside_and_the_rest_goes_on(tmp_path, monkeypatch):
    import weft.data.worker as worker

    file = write_documents(tmp_path / "in", 300)
    real = worker.SOURCES["chat_jsonl"]
    attempts = Counter()

    def read(source, unit):
        for i, record in enumerate(real.read(source, unit)):
            if unit.first in broken and i == 3:
                attempts[unit.first] += 1
                raise RuntimeError("reader is broken")
            yield record

    monkeypatch.setitem(worker.SOURCES, "chat_jsonl", Source(real.plan, read))
    broken = {65}
    made = config({"kind": "chat_jsonl", "path": str(file)}, executor={"records": 64})
    summary = build(made, tmp_path / "out")
    assert attempts == {65: 3}
    (entry,) = summary.quarantined
    assert (entry["what"], entry["reason"], entry["file"], entry["line"]) == ("unit", "raised", "documents.jsonl", 65)
    assert "reader is broken" in entry["message"]
    assert summary.total.read.records == 300 - 64
    summary.total.check()
    ids = [document.id for document in open_dataset(tmp_path / "out")]
    assert "d63" in ids
    assert "d64" not in ids
    assert "d128" in ids

    broken = {1, 65, 129}
    made = config({"kind": "chat_jsonl", "path": str(file)}, executor={"records": 64, "max_bad_units": 2})
    before = contents(tmp_path / "out")
    with pytest.raises(WeftError, match="in 3 units, more than"):
        build(made, tmp_path / "out", fresh=True)
    assert contents(tmp_path / "out") == before


def test_a_disk_that_is_full_is_nobodys_fault(tmp_path, monkeypatch):
    import errno

    file = write_documents(tmp_path / "in", 30, {5: "bad.png"})

    def problem(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    failing(monkeypatch, problem)
    with pytest.raises(OSError, match="No space"):
        build(config({"kind": "chat_jsonl", "path": str(file)}), tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]


FAULTS = """
import weft.data.filters.decode as decode
real = decode._problem
def problem(image, max_pixels):
    if image.path == "die.png": os.kill(os.getpid(), signal.SIGSEGV)
    if image.path == "raise.png": raise ZeroDivisionError
    if image.path == "hang.png": re.match("(a+)+$", "a" * 60 + "b")  # never lets another thread run
    return real(image, max_pixels)
decode._problem = problem
"""


def test_a_record_that_hangs_or_takes_the_process_with_it_costs_itself(tmp_path):
    bad = {3: "die.png", 150: "hang.png", 152: "raise.png"}
    file = write_documents(tmp_path / "in", 200, bad)
    body = (
        f"made = config({{'kind': 'chat_jsonl', 'path': {str(file)!r}}}, executor={{'kind': 'processes', "
        "'workers': 2, 'records': 64, 'record_seconds': 0.5, 'max_attempts': 1})\n"
        f"building.build(made, Path({str(tmp_path / 'out')!r}))"
    )
    running = start(tmp_path / "script.py", body, FAULTS)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    entries = [entry for entry in ledger(tmp_path / "out") if entry["stage"] == "quarantine"]
    assert {entry["id"]: entry["reason"] for entry in entries} == {"d3": "died", "d150": "timed_out", "d152": "raised"}
    assert len(open_dataset(tmp_path / "out")) == 180 - 3
    notes = [json.loads(note.read_text()) for note in (tmp_path / ".out.building" / "quarantine").iterdir()]
    details = "".join(each["details"] for note in notes for each in note["set_aside"])
    assert "Timeout" in details  # with the place in the code where it hung
    assert "script.py" in details
    assert "SIGSEGV" in " ".join(entry["message"] for entry in entries)


# a look at the result


def test_the_funnel_and_two_of_them(tmp_path, capsys):
    file = write_documents(tmp_path / "in", 30)
    write(tmp_path / "in", {"documents.jsonl": file.read_bytes() + line(chat("bare")) + line(chat("bare too"))})
    source = {"kind": "chat_jsonl", "path": str(file)}
    build(config(source), tmp_path / "a")
    build(config(source, filters=[{"kind": "image_count", "min": 1}]), tmp_path / "b")

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["data", *map(str, arguments)])
        return stopped.value.code or 0, capsys.readouterr()

    code, (out, _) = run("funnel", tmp_path / "a", tmp_path / "b", "--json")
    shown = json.loads(out)
    assert code == 0
    assert [row["stage"] for row in shown["stages"]] == ["read", "has_answer", "decode", "size", "unique"]
    assert shown["stages"][-1]["records_in"] == 32
    assert shown["stages"][-1]["records_dropped"] == 3
    assert shown["stages"][-1]["reasons"] == {"record: duplicate_id": 3}
    assert all(row["seconds"] >= 0 for row in shown["stages"][:-1])
    assert shown["changes"] == [
        {"document": name, "first": "kept", "second": "image_count: too_few_images"} for name in ("bare", "bare too")
    ]
    code, (out, _) = run("funnel", tmp_path / "a", tmp_path / "b")
    assert re.search(r"duplicate_id +3\b", out)
    assert "2 documents changed side" in out
    code, (_, err) = run("funnel", tmp_path / "in")
    assert code == 2
    assert "no dataset" in err

    code, (out, _) = run("stats", tmp_path / "a", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["totals"]["documents"] == 29
    assert found["totals"]["images"] == 27
    assert found["totals"]["different images"] == 1
    assert found["totals"]["texts"] == 58
    assert found["of_a_document"]["images"] == [0, 1, 1, 1, 1]
    size = (tmp_path / "in" / "good.png").stat().st_size
    assert found["of_a_document"]["image bytes"][-1] == size
    assert found["totals"]["image bytes"] == 27 * size
    characters = sum(len(text.text) for d in open_dataset(tmp_path / "a") for text in d.texts)
    assert found["totals"]["characters"] == characters
    code, (out, _) = run("stats", tmp_path / "a")
    assert "documents: 29" in out


def test_a_build_that_keeps_nothing_says_so_and_fails(tmp_path, capsys):
    write(tmp_path / "in", {"a.jsonl": b"{\n"})
    with pytest.raises(SystemExit) as stopped:
        main(["data", "build", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 1
    assert "no document was kept" in capsys.readouterr().err
    assert len(open_dataset(tmp_path / "out")) == 0


def test_a_dataset_is_put_on_a_store_with_its_manifest_last(tmp_path, monkeypatch, capsys):
    fsspec = pytest.importorskip("fsspec")
    from weft.data.remote import put_folder

    monkeypatch.setattr("weft.data.shards.ROWS", 10)
    monkeypatch.setattr("weft.data.shards.FILE_BYTES", 40_000)
    store = fsspec.filesystem("memory")
    with pytest.raises(SystemExit) as stopped:
        main(["data", "build", str(write_documents(tmp_path / "in", 9)), "--out", str(tmp_path / "small")])
    assert not stopped.value.code
    assert len(build(config({"kind": "picturebook", "n": 100}), tmp_path / "out").files) > 1
    put, real = [], type(store).put_file

    def noted(self, here, there, **options):
        put.append(there)
        real(self, here, there, **options)

    monkeypatch.setattr(type(store), "put_file", noted)
    for folder in ("out", "small"):
        put.clear()
        put_folder(tmp_path / folder, "memory://bucket/set")
        assert put[-1] == "/bucket/set/manifest.json"
        store.get("/bucket/set", str(tmp_path / f"back-{folder}"), recursive=True)
        verify_folder(tmp_path / f"back-{folder}")
        assert contents(tmp_path / f"back-{folder}") == contents(tmp_path / folder)
    with pytest.raises(UsageError, match="cannot write there"):
        put_folder(tmp_path / "out", "nowhere://bucket/set")
    store.rm("/bucket", recursive=True)
    capsys.readouterr()


def test_texts_count_for_the_size_of_a_row():
    from weft.data.shards import size_of
    from weft.document import Image

    assert size_of(Document((assistant("abc", Image(b"12345"), Text("d")),))) == 9
    assert len(png()) > 9
