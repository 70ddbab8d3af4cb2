"""A build that is killed, at any moment, has lost at most one unit a worker; run again, it ends with the same bytes."""

import os
import random
import signal
import time

import psutil
import pytest

from tests.data.running import config, contents, start, write_documents
from weft.atomic import verify_folder
from weft.data import open_dataset
from weft.data.build import build
from weft.data.worker import Worker

WORKERS, RECORDS, DOCUMENTS = 2, 64, 640
SLOW = """
import weft.data.filters.decode as decode
import weft.data.commit as committing
real = decode._problem
def problem(image, max_pixels):
    time.sleep(0.001)
    return real(image, max_pixels)
decode._problem = problem
real_close = committing.ShardWriter.close
def close(self):
    time.sleep(0.1)
    return real_close(self)
committing.ShardWriter.close = close
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What every build here reads, and the dataset that it must make."""
    folder = tmp_path_factory.mktemp("source")
    made = config({"kind": "chat_jsonl", "path": str(write_documents(folder / "in", DOCUMENTS))})
    build(made, folder / "wanted")
    assert len(open_dataset(folder / "wanted")) == DOCUMENTS * 9 // 10
    return folder / "in" / "documents.jsonl", contents(folder / "wanted")


def made_of(file, kind):
    executor = {"kind": kind, "workers": WORKERS, "records": RECORDS}
    return config({"kind": "chat_jsonl", "path": str(file)}, executor=executor)


def start_build(tmp_path, file, kind, patch=SLOW):
    executor = {"kind": kind, "workers": WORKERS, "records": RECORDS}
    body = (
        f"made = config({{'kind': 'chat_jsonl', 'path': {str(file)!r}}}, executor={executor!r})\n"
        f"building.build(made, Path({str(tmp_path / 'out')!r}))"
    )
    return start(tmp_path / "script.py", body, patch)


def wait_for_parts(tmp_path, number, running):
    parts = tmp_path / ".out.building" / "parts"
    until = time.monotonic() + 60
    while time.monotonic() < until and running.poll() is None:
        if parts.is_dir() and sum(not entry.startswith(".") for entry in os.listdir(parts)) >= number:
            return
        time.sleep(0.002)
    assert running.poll() is not None, "no progress in a minute"


def wait_for_workers(tmp_path):
    """Until all are at work: each keeps a file that says where it is, and one for a traceback."""
    until = time.monotonic() + 60
    while len(list((tmp_path / ".out.building").glob("running/*"))) < 2 * WORKERS:
        assert time.monotonic() < until, "no work in a minute"
        time.sleep(0.01)


def kill_and_rerun(tmp_path, monkeypatch, source, kind, seed):
    file, wanted = source
    rng = random.Random(seed)
    running = start_build(tmp_path, file, kind)
    children = []
    try:
        wait_for_parts(tmp_path, rng.randint(0, DOCUMENTS // RECORDS), running)
        time.sleep(rng.uniform(0, 0.12))
        children = psutil.Process(running.pid).children(recursive=True) if running.poll() is None else []
    finally:
        running.kill()
    running.wait()

    # workers end with the process that asked for their work
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive

    if (tmp_path / "out").exists():
        verify_folder(tmp_path / "out")
    parts, begun = set(), set()
    if (tmp_path / ".out.building").exists():
        parts = {entry.name for entry in (tmp_path / ".out.building" / "parts").glob("[!.]*")}
        begun = {entry.name for entry in (tmp_path / ".out.building" / "running").glob("*") if not entry.suffix}
    given, real = [], Worker.__call__

    def noted(self, job):
        given.append(job.chunk.identity)
        return real(self, job)

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "__call__", noted)
        build(made_of(file, "serial"), tmp_path / "out")
    assert parts.isdisjoint(given)
    assert len(begun - parts) <= (WORKERS if kind == "processes" else 1)
    assert len(given) == DOCUMENTS // RECORDS - len(parts)
    assert contents(tmp_path / "out") == wanted
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".out.times.json", "out", "script.py"]
    return len(parts), len(begun - parts)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_a_killed_build_goes_on_where_it_was(tmp_path, monkeypatch, source, seed):
    kill_and_rerun(tmp_path, monkeypatch, source, ["processes", "serial"][seed % 2], seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_thirty_moments(tmp_path, monkeypatch, source, capsys):
    found = []
    for seed in range(100, 130):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found.append(kill_and_rerun(folder, monkeypatch, source, ["processes", "serial"][seed % 2], seed))
    with capsys.disabled():
        print(f"\nunits done, and begun but not done, of {DOCUMENTS // RECORDS}: {found}")
    assert len({done for done, _ in found}) > 5, "the moments were all alike"


@pytest.mark.slow
def test_killed_again_and_again_it_still_ends(tmp_path, source):
    file, wanted = source
    for number in (2, 5, 8):
        running = start_build(tmp_path, file, "serial")
        wait_for_parts(tmp_path, number, running)
        running.kill()
        running.communicate()
    build(made_of(file, "serial"), tmp_path / "out")
    assert contents(tmp_path / "out") == wanted


@pytest.mark.slow
def test_workers_end_with_their_build_in_the_middle_of_a_record(tmp_path, source):
    running = start_build(tmp_path, source[0], "processes", SLOW.replace("0.001", "100"))
    wait_for_workers(tmp_path)
    children = psutil.Process(running.pid).children(recursive=True)
    assert len(children) >= WORKERS
    running.kill()
    running.wait()  # and not for the ends of its pipes, which workers hold too
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    assert not alive


def test_an_interrupt_is_the_builds_to_answer_not_the_workers(tmp_path, source):
    file, wanted = source
    running = start_build(tmp_path, file, "processes", SLOW.replace("0.001", "0.01"))
    wait_for_workers(tmp_path)
    for child in psutil.Process(running.pid).children(recursive=True):
        child.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    assert contents(tmp_path / "out") == wanted


def test_an_interrupted_build_stops_its_workers_and_leaves_no_dataset(tmp_path, source):
    file, wanted = source
    running = start_build(tmp_path, file, "processes")
    wait_for_parts(tmp_path, 2, running)
    children = psutil.Process(running.pid).children(recursive=True)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, err = running.communicate(timeout=20)
    assert err.count("KeyboardInterrupt") == 1
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not (tmp_path / "out").exists()
    build(made_of(file, "serial"), tmp_path / "out")
    assert contents(tmp_path / "out") == wanted


def test_the_lock_of_a_dead_build_holds_nobody_up_and_that_of_a_living_one_does(tmp_path, source):
    from weft.errors import UsageError

    file, wanted = source
    running = start_build(tmp_path, file, "serial")
    wait_for_parts(tmp_path, 1, running)
    with pytest.raises(UsageError, match="another build is writing"):
        build(made_of(file, "serial"), tmp_path / "out")
    running.kill()
    running.communicate()
    build(made_of(file, "serial"), tmp_path / "out")
    assert contents(tmp_path / "out") == wanted
