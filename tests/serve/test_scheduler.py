"""Every request has one outcome, whatever happens to it, to its neighbours, or to the thread that runs them."""

import asyncio
import logging
import threading
from contextlib import aclosing, contextmanager
from functools import partial

import pytest

from tests.serve.apart import pipe
from tests.serve.nonce import NonceBackbone, ask, new_nonce
from tests.serve.running import PATIENCE, until
from weft.document import Document, Text, user
from weft.errors import UsageError, WeftError
from weft.generation import Finished, SamplingConfig, TextDelta
from weft.serve import models_main, models_process
from weft.serve import scheduler as scheduling
from weft.serve.hosts import in_thread
from weft.serve.models_main import work_on
from weft.serve.models_process import ModelsProcess
from weft.serve.scheduler import Busy, Closing, EngineDown, Overdue, Scheduler
from weft.serve.wire import Wire
from weft.serve.worker import Unexpected, Worker

CONFIG = SamplingConfig()


def prompt(plan, nonce=None):
    return Document((user(Text(ask(nonce or new_nonce(), plan))),))


class Piped:
    """In the place of `subprocess.Popen`: a thread of this process, with the other ends of its pipes."""

    def __init__(self, load):
        (reads, self.stdin), (self.stdout, writes) = pipe(), pipe()
        work = partial(work_on, Wire(reads, writes), load, on_loss=lambda: None)
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def wait(self, timeout=None):
        self._thread.join(PATIENCE)
        return 0

    def kill(self):
        pass


def over_pipes(models, *, slots, context=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_main, "make_quick", lambda: None)  # of this process
        worker = Worker(models, slots=slots, context=context)
        patch.setattr(models_process.subprocess, "Popen", lambda *_, **__: Piped(lambda: worker))
        process = ModelsProcess([])
        process.wait_until_loaded()
        return process


@pytest.fixture(params=[in_thread, over_pipes])
def working(request):
    """A scheduler over either host, as a block."""

    @contextmanager
    def working(*, slots=2, model=None, models=None, **given):
        host = request.param(models or {"nonce": model or NonceBackbone()}, slots=slots)
        made = Scheduler(host, **given)
        made.start()
        try:
            yield made
        finally:
            asyncio.run(made.drain(0))

    return working


async def text_of(scheduler, document, model="nonce"):
    """The text of an answer, or the error."""
    text = ""
    try:
        async for event in scheduler.answer(model, document, CONFIG):
            assert not isinstance(event, Finished) or event.reason == "stop"
            text += event.text if isinstance(event, TextDelta) else ""
    except WeftError as error:
        return error
    return text


def all_of(scheduler, documents):
    async def run():
        return await asyncio.wait_for(asyncio.gather(*(text_of(scheduler, each) for each in documents)), PATIENCE)

    return asyncio.run(run())


def test_more_than_there_is_room_for_are_answered_one_after_the_other(working):
    nonces = [new_nonce() for _ in range(7)]
    with working() as scheduler:
        assert all_of(scheduler, [prompt("t", nonce) for nonce in nonces]) == [f"{nonce} " for nonce in nonces]
        assert (scheduler.load.waiting, scheduler.load.running, scheduler.load.slots) == (0, 0, 2)


def test_a_full_line_takes_nobody_and_says_when_to_ask_again(working):
    with working(queue=3) as scheduler:
        found = all_of(scheduler, [prompt("t") for _ in range(5)])
        assert [isinstance(each, Busy) for each in found] == [False] * 3 + [True] * 2
        assert all(isinstance(each.retry_after, int) and each.retry_after >= 1 for each in found[3:])
        assert isinstance(all_of(scheduler, [prompt("t")])[0], str)  # there is room again


def test_the_line_is_four_for_each_slot_by_default():
    assert Scheduler(in_thread({"nonce": NonceBackbone()}, slots=3)).queue == 12


def test_who_waits_too_long_for_a_slot_is_told_so(working):
    lasts = threading.Event()
    with working(
        slots=1, model=NonceBackbone(before_step=lambda: lasts.wait(0.02) and None), queue_seconds=0.2
    ) as made:
        found = all_of(made, [prompt("tt"), prompt("t")])
        assert isinstance(found[0], str)
        assert isinstance(found[1], Overdue)


def test_a_prompt_that_cannot_be_answered_is_refused_alone(working):
    with working() as scheduler:
        found = all_of(scheduler, [prompt("t"), prompt("t " + "words " * 3000), prompt("t")])
        assert isinstance(found[1], WeftError)
        assert [type(each) for each in (found[0], found[2])] == [str, str]


def test_an_error_nobody_thought_of_in_one_prompt_ends_no_other(working, caplog):
    class Fragile(NonceBackbone):
        def tokenize(self, text):
            if "plan=s" in text:
                raise MemoryError(text)
            return super().tokenize(text)

    with working(model=Fragile()) as scheduler, caplog.at_level(logging.ERROR):
        found = all_of(scheduler, [prompt("t"), prompt("s"), prompt("t")])
        assert isinstance(found[1], Unexpected)
        assert [type(each) for each in (found[0], found[2])] == [str, str]
    assert "MemoryError" in caplog.text
    assert "nonce=" not in caplog.text + str(found[1])


def test_where_a_step_fails_everybody_is_told(working):
    steps = 0

    def fail():
        nonlocal steps
        steps += 1
        if steps > 6:
            raise RuntimeError

    with working(model=NonceBackbone(before_step=fail), slots=2) as scheduler:
        found = all_of(scheduler, [prompt("t") for _ in range(5)])
        assert all(isinstance(each, EngineDown) for each in found)
        assert scheduler.load.waiting == 0
        assert scheduler.failure == "RuntimeError"
        assert isinstance(all_of(scheduler, [prompt("t")])[0], EngineDown)


def test_whoever_comes_while_the_thread_ends_is_told_too(working):
    """Between the check at the door and the line, the thread may end: nobody waits for ever."""

    def fail():
        raise RuntimeError

    for _ in range(20):
        with working(model=NonceBackbone(before_step=fail)) as scheduler:

            async def run(scheduler=scheduler):
                found = []
                while not found or scheduler.failure is None:
                    found += await asyncio.gather(*(text_of(scheduler, prompt("t")) for _ in range(3)))
                return found

            found = asyncio.run(asyncio.wait_for(run(), PATIENCE))
            assert all(isinstance(each, EngineDown) for each in found)


def test_a_caller_who_stops_listening_frees_his_slot(working):
    lasts = threading.Event()
    model = NonceBackbone(before_step=lambda: lasts.wait(0.01) and None)

    async def listen_once(scheduler):
        async with aclosing(scheduler.answer("nonce", prompt("t" * 50), CONFIG)) as events:
            async for _ in events:
                break

    with working(model=model, slots=1) as scheduler:
        asyncio.run(listen_once(scheduler))
        until(lambda: scheduler.load.running == 0)
        assert scheduler.most_late_steps <= 1
        lasts.set()
        assert isinstance(all_of(scheduler, [prompt("t")])[0], str)


def test_two_models_are_answered_side_by_side(working):
    with working(models={"one": NonceBackbone(), "two": NonceBackbone()}, slots=1) as scheduler:

        async def run():
            nonces = [new_nonce() for _ in range(6)]
            asked = [text_of(scheduler, prompt("t", each), ("one", "two")[i % 2]) for i, each in enumerate(nonces)]
            assert await asyncio.gather(*asked) == [f"{nonce} " for nonce in nonces]

        asyncio.run(asyncio.wait_for(run(), PATIENCE))


def test_a_model_that_is_not_there_is_refused_alone(working):
    with working() as scheduler:

        async def run():
            wrong, right = await asyncio.gather(
                text_of(scheduler, prompt("t"), "other"), text_of(scheduler, prompt("t"))
            )
            assert isinstance(wrong, UsageError) and "'other'" in wrong.what
            assert isinstance(right, str)

        asyncio.run(asyncio.wait_for(run(), PATIENCE))


def test_an_error_of_the_callers_side_is_told_to_all_who_wait(working, monkeypatch):
    hand_over, failed = scheduling._hand_over, []

    def fail_once(handed):
        if not failed:
            failed.append(handed)
            raise LookupError
        hand_over(handed)

    monkeypatch.setattr(scheduling, "_hand_over", fail_once)
    with working() as scheduler:
        found = all_of(scheduler, [prompt("t") for _ in range(3)])
        assert all(isinstance(each, EngineDown) for each in found)
        assert scheduler.failure == "LookupError"


def test_a_server_that_ends_lets_its_requests_end_first(working):
    with working(slots=1) as scheduler:

        async def run():
            asked = [asyncio.create_task(text_of(scheduler, prompt("t"))) for _ in range(3)]
            await asyncio.sleep(0)
            ending = asyncio.create_task(scheduler.drain(PATIENCE))
            await asyncio.sleep(0)
            assert isinstance(await text_of(scheduler, prompt("t")), Closing)
            assert [type(await each) for each in asked] == [str] * 3
            await ending

        asyncio.run(asyncio.wait_for(run(), PATIENCE))


@pytest.mark.parametrize("waiting", [0, 1, 7])
def test_the_time_to_wait_grows_with_the_line(waiting):
    scheduler = Scheduler(in_thread({"nonce": NonceBackbone()}, slots=2))
    assert scheduler.retry_after() == 1
    scheduler._durations.extend([3.0, 5.0])
    scheduler._waiting = waiting
    assert scheduler.retry_after() == {0: 1, 1: 2, 7: 14}[waiting]
