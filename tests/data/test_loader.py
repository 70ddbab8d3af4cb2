"""Steps of rows: the same for any number of processes and workers, and after any interruption."""

import json
import random
import threading
import time
from itertools import islice

import pytest

from weft.data.loader import Loader, Share
from weft.data.rows import Cursor, Extent, RowsConfig, planned
from weft.errors import CheckpointError, UsageError

BATCH, STEPS = 6, 9
RANDOM = random.Random(0)
FOUND = [
    Extent(length, ((2, min(length, 12)),) if length > 4 and RANDOM.random() < 0.7 else ())
    for length in (RANDOM.randint(1, 60) for _ in range(50))
]


ALONE = Share()


def loader(packing="best_fit", share=ALONE, workers=0, read=lambda row: row, order="these"):
    def extents(places):
        return [FOUND[place % len(FOUND)] for place in places]

    def plan(cursor: Cursor):
        return planned(packing, RowsConfig(window=20), 40, len(FOUND), extents, cursor)

    return Loader(plan, read, BATCH, order, share, workers)


def steps(source, count=STEPS):
    return [step.read for step in islice(source, count)]


@pytest.mark.parametrize("packing", ["none", "best_fit", "stream"])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_processes_and_workers_reads_the_same_rows_in_the_same_order(packing, world, workers):
    def slowly(row):
        time.sleep(0.002 * (row.pieces[0].document % 3))  # so that workers finish in another order than they began
        return row

    alone = steps(loader(packing))
    shares = [steps(loader(packing, Share(rank, world), workers, slowly)) for rank in range(world)]
    together = [tuple(row for rows in zip(*each, strict=True) for row in rows) for each in zip(*shares, strict=True)]
    assert together == alone
    assert all(len(step) == BATCH for step in alone)


@pytest.mark.parametrize("packing", ["none", "best_fit", "stream"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 4, 8])
def test_a_state_gives_the_next_step(packing, workers, cut):
    whole = steps(loader(packing))
    first = loader(packing, workers=workers)
    assert steps(first, cut) == whole[:cut]
    state = json.loads(json.dumps(first.state()))
    # what workers read ahead is not lost, and left alone it goes on too
    second = loader(packing, workers=workers)
    second.restore(state)
    assert steps(second, STEPS - cut) == whole[cut:] == steps(first, STEPS - cut)


@pytest.mark.parametrize("before,after", [(1, 2), (2, 3), (3, 1)])
def test_another_number_of_processes_is_refused_or_shares_the_same_steps(before, after):
    whole = steps(loader())
    states = []
    for rank in range(before):
        each = loader(share=Share(rank, before))
        steps(each, 4)
        states.append(each.state())
    assert all(state == states[0] for state in states), "it does not matter which process saved"
    with pytest.raises(UsageError, match=f"{before} processes shared the rows before, now {after}"):
        loader(share=Share(0, after)).restore(states[0])
    shares = []
    for rank in range(after):
        each = loader(share=Share(rank, after))
        each.restore(states[0], reshard=True)
        shares.append(steps(each, STEPS - 4))
    together = [tuple(row for rows in zip(*each, strict=True) for row in rows) for each in zip(*shares, strict=True)]
    assert together == whole[4:]


@pytest.mark.parametrize(
    "state", [{}, {"order": "these", "world": 1}, {"order": "these", "world": 1, "cursor": {"x": 1}}]
)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(CheckpointError, match="not the state"):
        loader().restore(state)


def test_the_state_of_another_order_is_refused():
    with pytest.raises(CheckpointError, match="another order"):
        loader(order="those").restore(loader().state())


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(UsageError, match="6 rows of a step cannot be shared by 4"):
        loader(share=Share(0, 4))


def test_what_a_worker_raises_is_raised_and_nothing_is_left_running():
    def fail(row):
        if row.pieces[0].document > 10:
            raise ValueError("a picture is damaged")
        return row

    before = threading.active_count()
    with pytest.raises(ValueError, match="damaged"):
        steps(loader(workers=2, read=fail))
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.01)
    assert threading.active_count() == before


def test_workers_read_ahead():
    read = []
    source = iter(loader(workers=2, read=lambda row: (read.append(row), row)[1]))
    next(source)
    for _ in range(100):
        if len(read) >= 2 * BATCH:
            break
        time.sleep(0.01)
    assert len(read) >= 2 * BATCH
    source.close()
