"""The executor on Ray, on a real cluster of this machine: the bytes of the others, and the same answer to failures."""

import os
import time

import pytest

from tests.data.running import ROOT, config, contents, write_documents
from weft.data.build import build
from weft.data.executor import Died, ExecutorConfig
from weft.data.executors import open_executor
from weft.errors import WeftError

ray = pytest.importorskip("ray", reason="needs the extra `ray`")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("RAY_ADDRESS", raising=False)
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
        yield
        ray.shutdown()


def _work(job):
    if job == "die":
        os._exit(7)
    if job == "raise":
        raise WeftError("as asked", where="here", fix="do not ask")
    if job == "break":
        raise ZeroDivisionError
    return job * job, os.getpid()


CONFIG = ExecutorConfig(kind="ray", workers=2)


def test_it_gives_the_bytes_of_serial(tmp_path):
    file = write_documents(tmp_path / "in", 300)
    sources = {"kind": "chat_jsonl", "path": str(file)}, {"kind": "picturebook", "n": 100, "seed": 3}
    build(config(*sources), tmp_path / "serial")
    seen = []
    executor = {"kind": "ray", "workers": 2, "records": 64}
    build(
        config(*sources, executor=executor), tmp_path / "ray", on_progress=lambda progress: seen.append(progress.done)
    )
    assert seen == list(range(1, 8))
    assert contents(tmp_path / "serial") == contents(tmp_path / "ray")
    assert ray.is_initialized()  # a cluster that was there stays


@pytest.mark.slow
def test_workers_stay_and_do_every_job_once():
    with open_executor(CONFIG, _work) as executor:
        running, found, waiting = 0, [], list(range(8))
        while waiting or running:
            while waiting and running < executor.slots:
                executor.submit(waiting.pop())
                running += 1
            found.append(executor.next())
            running -= 1
    assert sorted((job, square) for job, (square, _) in found) == [(i, i * i) for i in range(8)]
    processes = {process for _, (_, process) in found}
    assert len(processes) <= 2
    assert os.getpid() not in processes


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_job_alone_and_errors_come_home():
    with open_executor(CONFIG, _work) as executor:
        executor.submit("die")
        executor.submit(3)
        found = dict(executor.next() for _ in range(2))
        assert isinstance(found["die"], Died)
        assert found[3][0] == 9
        executor.submit("raise")
        with pytest.raises(WeftError, match="as asked") as error:
            executor.next()
        assert (error.value.where, error.value.fix) == ("here", "do not ask")
        executor.submit("break")
        with pytest.raises(WeftError, match="ZeroDivisionError in a worker"):
            executor.next()


def test_a_cluster_that_is_not_there_is_an_error_with_a_way_out(monkeypatch):
    def refuse(**_):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    gone = ExecutorConfig.model_validate({"kind": "ray", "ray": {"address": "10.0.0.1:6379"}})
    with pytest.raises(WeftError, match="nobody answers") as error, open_executor(gone, _work):
        pass
    assert error.value.where == "executor.ray.address"


def test_without_ray_the_extra_is_named(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "ray":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(WeftError, match="needs the package ray") as error, open_executor(CONFIG, _work):
        pass
    assert "weft[ray]" in error.value.fix


def test_the_core_does_not_import_it():
    import subprocess
    import sys

    program = "import sys, weft.data.build, weft.data.executor\nassert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_ray_takes_at_most_a_third_longer_than_a_pool():
    def seconds(kind):
        with open_executor(ExecutorConfig(kind=kind, workers=2), _sleep) as executor:
            for _ in range(2):
                executor.submit(0.1)
            for _ in range(2):
                executor.next()
            begin = time.perf_counter()
            for i in range(8):
                executor.submit(1.0)
                if i:
                    executor.next()
            executor.next()
            return time.perf_counter() - begin

    assert seconds("ray") <= 1.3 * seconds("processes")


def _sleep(seconds):
    time.sleep(seconds)
