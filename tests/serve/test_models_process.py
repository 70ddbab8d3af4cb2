"""Models in a process of their own answer as those of this one do, and nothing that befalls either is silent."""

import asyncio
import gc
import os
import signal

import psutil
import pytest

from tests.serve.apart import Forked
from tests.serve.nonce import NonceBackbone, Shown, new_nonce, nonce_process, picture
from tests.serve.running import PATIENCE
from tests.serve.test_scheduler import all_of, prompt
from weft import cli
from weft.document import Document, Image, user
from weft.errors import UsageError, WeftError
from weft.generation import SamplingConfig, collect
from weft.serve import models_process, page
from weft.serve.hosts import in_thread
from weft.serve.models import load_models
from weft.serve.models_process import ModelsConfig, in_process
from weft.serve.scheduler import EngineDown, Scheduler

CONFIG = SamplingConfig()


@pytest.fixture
def started(monkeypatch):
    """Processes of this test, which are there at once."""
    made = []

    def start(command, **named):
        made.append(Forked(command, **named))
        return made[-1]

    monkeypatch.setattr(models_process.subprocess, "Popen", start)
    return made


async def answer_of(scheduler, document, model="nonce", config=CONFIG):
    return collect([event async for event in scheduler.answer(model, document, config)])


def test_it_answers_as_models_of_this_process_do(started):
    """A picture in, text and pictures out, byte for byte; whatever the models print, and whoever signals."""
    asked = prompt("tsdptp")
    document = Document((user(Image(picture(Shown(new_nonce(), 1)))), *asked.turns))
    found = []
    for host in (nonce_process(), in_thread({"nonce": NonceBackbone()}, slots=2)):
        scheduler = Scheduler(host)
        scheduler.start()
        for sent in (signal.SIGINT, signal.SIGTERM):
            if not found:
                os.kill(started[0].pid, sent)

        async def run(scheduler=scheduler):
            found.append(await answer_of(scheduler, document))
            await scheduler.drain(0)

        asyncio.run(asyncio.wait_for(run(), PATIENCE))
        assert scheduler.failure is None
    assert len(found[0].parts) == 4
    assert found[0] == found[1]
    assert [each.wait(PATIENCE) for each in started] == [0]


def test_what_cannot_be_loaded_is_said_as_it_would_be_here(started):
    with pytest.raises(UsageError) as caught:
        nonce_process(steps=0)
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("no steps", "steps", "more of them")
    with pytest.raises(WeftError, match="their process ended with 3"):
        nonce_process(dies=True)
    with pytest.raises(WeftError, match="could not be loaded: ValueError: a pause"):
        nonce_process(pause=-1.0)
    assert not [each for each in started if psutil.pid_exists(each.pid) and each.wait(0) is None]


def test_who_waits_for_models_that_are_killed_is_told(started):
    scheduler = Scheduler(nonce_process(pause=0.05))
    scheduler.start()

    async def run():
        asked = [asyncio.create_task(answer_of(scheduler, prompt("t" * 9))) for _ in range(4)]
        while scheduler.load.running < 2:
            await asyncio.sleep(0.01)
        os.kill(started[0].pid, signal.SIGKILL)
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert [type(each) for each in found] == [EngineDown] * 4
    assert scheduler.failure == "their process was ended by SIGKILL"
    assert (scheduler.load.running, scheduler.load.waiting) == (0, 0)
    assert isinstance(all_of(scheduler, [prompt("t")])[0], EngineDown)
    asyncio.run(scheduler.drain(0))


def test_models_that_do_not_end_are_ended(started, monkeypatch):
    monkeypatch.setattr(models_process, "END_SECONDS", 0.2)
    scheduler = Scheduler(nonce_process(pause=1000.0))
    scheduler.start()

    async def run():
        asked = asyncio.create_task(answer_of(scheduler, prompt("t")))
        while scheduler.load.running < 1:
            await asyncio.sleep(0.01)
        await scheduler.drain(0)
        with pytest.raises(WeftError, match="the server ended"):
            await asked

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert started[0].wait(PATIENCE) == -signal.SIGKILL
    assert scheduler.failure is None


def test_models_end_with_their_server(started):
    host = nonce_process()
    host._wire.close()  # as if it were gone
    assert started[0].wait(PATIENCE) == 1
    host.stop()


def test_a_host_that_nobody_has_any_more_leaves_no_process(started):
    nonce_process(pause=1000.0)
    gc.collect()
    assert started[0].wait(PATIENCE) != 0


def test_a_real_process_serves_a_model_by_its_name(tmp_path):
    """Started as `weft serve` starts it, in a folder that holds a module of the same name as one of Python's."""
    (tmp_path / "queue.py").write_text("raise SystemExit('a stranger')")
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        host = in_process(ModelsConfig(model="nano", slots=2, threads=1))
        host.wait_until_loaded()
    finally:
        os.chdir(before)
    assert (host.models, host.slots) == (("nano",), 2)
    scheduler, config = Scheduler(host), SamplingConfig(max_text_tokens=5, min_images=1, max_images=1)
    scheduler.start()

    async def run(scheduler):
        found = await answer_of(scheduler, Document((user("a"),)), "nano", config)
        await scheduler.drain(0)
        return found

    here = Scheduler(in_thread(load_models("nano", {}), slots=2))
    here.start()
    assert asyncio.run(run(scheduler)) == asyncio.run(run(here))


def test_an_adapter_that_is_not_there_is_named_by_the_command(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(page, "load_gradio", lambda: None)  # seconds
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "nano", "--adapter", str(tmp_path / "nothing")])
    said = capfd.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("error: ") and str(tmp_path / "nothing") in said
    assert "Traceback" not in said
