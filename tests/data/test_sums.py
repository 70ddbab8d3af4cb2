"""What enters a stage is kept or dropped by it, at each stage and in all; to lose count is an error, not a gap."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data.corpus import chat, line, write
from tests.data.running import config, start
from weft.data.build import build
from weft.data.filters import FILTERS
from weft.data.ledger import Tally, check_rows
from weft.data.sources.base import Source
from weft.data.stage import Count, Loss, Record, Together, Writes, count, run_window
from weft.document import Document, Image, Text, Turn, assistant
from weft.errors import WeftError

ACTS = ("keep", "drop", "text", "image", "write")
"""What a stage does to a document, by a draw that goes with the stage and the document."""

records = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2), st.booleans()), min_size=1, max_size=12
)
"""Texts and pictures of each document, how many more the source lost, and whether it lost all."""


def record_of(number, texts, images, lost, is_rejected):
    parts = [*(Text(f"{number}.{i}") for i in range(texts)), *(Image(b"x", f"{i}.png") for i in range(images))]
    if is_rejected:
        return Record("f", number, None, Count(1, texts, images), (Loss("record", "bad", "lost"),))
    document = Document((assistant(*parts),), f"d{number}")
    return Record("f", number, document, count(document) + Count(texts=lost), (Loss("text", "lost", "lost"),) * lost)


def act(document, what):
    (turn,) = document.turns
    parts = list(turn.parts)
    kind = {"text": Text, "image": Image}.get(what)
    if what == "drop":
        return None, (Loss("record", "drawn", "dropped"),)
    if what == "write":
        return Document((Turn(turn.role, (*parts, Text("written"))),), document.id), ()
    at = next((i for i, part in enumerate(parts) if kind is not None and isinstance(part, kind)), None)
    if at is None:
        return document, ()
    return Document((Turn(turn.role, (*parts[:at], *parts[at + 1 :])),), document.id), (Loss(what, "drawn", "dropped"),)


def stage_of(draws, kind):
    def alone(document):
        return act(document, draws[int(document.id[1:]) % len(draws)])

    if kind == "together":
        return Together(lambda documents: [alone(document) for document in documents])
    return Writes(alone) if "write" in draws else alone


stages = st.lists(st.lists(st.sampled_from(ACTS), min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(records, stages, st.integers(1, 12))
@example([(1, 0, 0, False)], [["text"], ["write"], ["text"]], 1)
def test_whatever_stages_do_the_sums_hold_at_each_and_in_all(drawn, draws, window):
    read = [record_of(i, *each) for i, each in enumerate(drawn)]
    named = [(f"stage {i}", stage_of(each, "alone")) for i, each in enumerate(draws)]
    tally, entered = Tally(), {}
    for first in range(0, len(read), window):
        for item in run_window(read[first : first + window], named):
            tally.add(item)
    tally.check(["read", *(name for name, _ in named)])
    assert tally.read == sum((record.read for record in read), Count())
    for row in tally.funnel(["read", *(name for name, _ in named)]):
        entered[row["stage"]] = row["in"]["records"], row["dropped"]["records"]
    # counted by hand: who comes to each stage
    left = [record.document for record in read if record.document is not None]
    for i, each in enumerate(draws):
        gone = [d for d in left if each[int(d.id[1:]) % len(each)] == "drop"]
        assert entered[f"stage {i}"] == (len(left), len(gone))
        left = [d for d in left if d not in gone]
    assert tally.kept.records == len(left)


@settings(max_examples=50, deadline=None)
@given(records, stages, st.data())
def test_a_thief_is_found_wherever_it_stands(drawn, draws, data):
    named = [
        (f"stage {i}", stage_of([a for a in each if a != "drop"] or ["keep"], "alone")) for i, each in enumerate(draws)
    ]
    read = [record_of(i, *each) for i, each in enumerate(drawn)]
    place = data.draw(st.integers(0, len(named)))

    def thief(document):
        turn = document.turns[0]
        return Document((Turn(turn.role, turn.parts[:-1]),), document.id), ()

    named.insert(place, ("thief", thief))
    come = [item.document for item in run_window(read, named[:place]) if item.document is not None]
    if not any(document.turns[0].parts for document in come):
        run_window(read, named)
        return
    with pytest.raises(WeftError, match="stage thief took parts"):
        run_window(read, named)


def test_a_source_that_loses_count_is_found():
    document = Document((assistant("a", "b"),), "d")
    for read, losses, added in (
        (Count(1, 3, 0), (), 0),
        (Count(1, 1, 0), (), 0),
        (Count(1, 2, 0), (Loss("text", "x", "x"),), 0),
        (Count(1, 2, 1), (), 0),
        (Count(1, 2, 0), (), 1),
    ):
        with pytest.raises(WeftError, match="the source counted"):
            run_window([Record("f", 1, document, read, losses, added)], [])
    with pytest.raises(WeftError, match="the source counted"):
        run_window([Record("f", 1, None, Count(1))], [])


def test_a_tally_that_does_not_add_up_is_an_error():
    good = Tally(Count(3, 4, 5), Count(1, 2, 3), 0, {"a": Count(1, 1, 1), "b": Count(1, 1, 1)})
    good.check(["a", "b"])
    check_rows(1, good)
    with pytest.raises(WeftError, match="is no stage"):
        good.check(["a"])
    with pytest.raises(WeftError, match="do not add up: read"):
        Tally(Count(3), Count(1), 0, {"a": Count(1)}).check()
    with pytest.raises(WeftError, match="stage b dropped more than entered it"):
        Tally(Count(3), Count(1), 0, {"a": Count(-1), "b": Count(6), "c": Count(-3)}).check(["a", "b", "c"])
    with pytest.raises(WeftError, match="2 rows were written for 1 kept"):
        check_rows(2, good)


def test_a_build_in_which_a_row_is_lost_makes_no_dataset(tmp_path, monkeypatch):
    write(tmp_path / "in", {"documents.jsonl": b"".join(line(chat(f"d{i}")) for i in range(5))})
    made = config({"kind": "chat_jsonl", "path": str(tmp_path / "in" / "documents.jsonl")})
    with monkeypatch.context() as patched:
        patched.setattr("weft.data.parts.PartWriter._flush", lambda self: self._rows.clear())
        with pytest.raises(WeftError, match="0 rows were written for 5 kept"):
            build(made, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("weft.data.commit.duplicates", lambda ids: {})
        patched.setattr("weft.data.commit._Merge._unique", lambda self, rows, *_: rows.without([0]))
        with pytest.raises(WeftError, match="4 rows were written for 5 kept"):
            build(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_of_which_something_vanishes_is_set_aside_and_named(tmp_path, monkeypatch):
    write(tmp_path / "in", {"documents.jsonl": b"".join(line(chat(f"d{i}")) for i in range(5))})

    def build_thief(config):
        return lambda document: (None, ()) if document.id == "d3" else (document, ())

    monkeypatch.setitem(FILTERS, "has_answer", build_thief)
    summary = build(config({"kind": "chat_jsonl", "path": str(tmp_path / "in" / "documents.jsonl")}), tmp_path / "out")
    (entry,) = summary.quarantined
    assert (entry["id"], entry["reason"]) == ("d3", "raised")
    assert "took parts of document d3 without naming them" in entry["message"]
    assert summary.total.kept.records == 4


def test_a_source_that_forgets_a_text_costs_its_unit_and_says_so(tmp_path, monkeypatch):
    import weft.data.worker as worker

    write(tmp_path / "in", {"documents.jsonl": b"".join(line(chat(f"d{i}")) for i in range(5))})
    real = worker.SOURCES["chat_jsonl"]

    def read(source, unit):
        for record in real.read(source, unit):
            yield Record(record.file, record.line, record.document, record.read + Count(texts=record.line == 3))

    monkeypatch.setitem(worker.SOURCES, "chat_jsonl", Source(real.plan, read))
    summary = build(config({"kind": "chat_jsonl", "path": str(tmp_path / "in" / "documents.jsonl")}), tmp_path / "out")
    (entry,) = summary.quarantined
    assert entry["what"] == "unit"
    assert "documents.jsonl, line 3" in entry["message"] or "the source counted" in entry["message"]


HANGS = """
import weft.data.filters.decode as decode
real = decode._problem
def problem(image, max_pixels):
    if image.path == "hang.png":
        try:
            re.match("(a+)+$", "a" * 60 + "b")
        except Exception:  # as the door for pictures does
            pass
    return real(image, max_pixels)
decode._problem = problem
"""


@pytest.mark.slow
def test_a_record_that_hangs_costs_itself_in_the_same_process_too(tmp_path):
    from tests.data.running import ledger, write_documents

    file = write_documents(tmp_path / "in", 40, {13: "hang.png"})
    body = (
        "before = signal.getsignal(signal.SIGALRM)\n"
        f"made = config({{'kind': 'chat_jsonl', 'path': {str(file)!r}}}, executor={{'record_seconds': 0.2, "
        "'max_attempts': 2})\n"
        f"summary = building.build(made, Path({str(tmp_path / 'out')!r}))\n"
        "assert signal.getsignal(signal.SIGALRM) == before and not any(signal.getitimer(signal.ITIMER_REAL))\n"
        "summary.total.check()\n"
    )
    running = start(tmp_path / "script.py", body, HANGS)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 0, err
    (entry,) = [entry for entry in ledger(tmp_path / "out") if entry["stage"] == "quarantine"]
    assert (entry["id"], entry["reason"]) == ("d13", "timed_out")
    (note,) = (tmp_path / ".out.building" / "quarantine").iterdir()
    assert "in problem" in note.read_text()  # where it hung
