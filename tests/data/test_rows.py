"""Documents in rows: nothing is lost or cut in a picture, rows hold what they may, and few positions stay empty."""

import random
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data.rows import WHOLE, Cursor, Extent, RowsConfig, best_fit, planned, stream, utilisation
from weft.errors import ContextError, UsageError

LENGTH = 40


@st.composite
def extents(draw, *, long: bool = True) -> Extent:
    """A document of runs of text and pictures with the tokens around them; a text token comes first."""
    at, pictures = 1, []
    for size, is_picture in draw(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=6 if long else 2)):
        if is_picture:
            pictures.append((at, at + min(size, LENGTH - 1)))
            size = min(size, LENGTH - 1)
        at += size
    return Extent(at, tuple(pictures), f"doc{at}")


documents = st.lists(extents(), min_size=1, max_size=30)
caps = st.one_of(st.none(), st.integers(1, 4))


def covered(pieces) -> list[tuple[int, int]]:
    """Every element of every document, in order."""
    return [(piece.document, element) for piece in sorted(pieces) for element in range(piece.start, piece.end)]


def everything(found) -> list[tuple[int, int]]:
    return [(number, element) for number, extent in enumerate(found) for element in range(extent.length)]


def check(found, packed, *, again: bool, max_images) -> None:
    for row in packed.rows:
        sizes = [piece.end - piece.start + (again and piece.start > 0) for piece in row.pieces]
        assert row.length == sum(sizes) <= LENGTH
        starts = [start for p in row.pieces for start, _ in found[p.document].pictures if p.start <= start < p.end]
        assert row.pictures == len(starts) <= (max_images or WHOLE)
        for piece in row.pieces:
            assert piece.end > piece.start
            for start, end in found[piece.document].pictures:
                for border in (piece.start, piece.end):
                    assert not start < border < end, "a picture is cut"
    assert covered([p for row in packed.rows for p in row.pieces] + packed.left) == everything(found)


@settings(deadline=None, max_examples=150)
@given(documents, caps)
def test_best_fit_holds_every_element_once(found, cap):
    packed = best_fit(found, LENGTH, max_images=cap)
    check(found, packed, again=True, max_images=cap)
    assert not packed.left
    # a document that fits is not cut
    cut = {p.document for row in packed.rows for p in row.pieces if p.end - p.start < found[p.document].length}
    for number in cut:
        assert found[number].length > LENGTH or len(found[number].pictures) > (cap or WHOLE)


@settings(deadline=None, max_examples=150)
@given(documents, caps)
def test_what_is_too_long_is_dropped_whole_where_that_is_asked(found, cap):
    packed = best_fit(found, LENGTH, max_images=cap, long="drop")
    check(found, packed, again=True, max_images=cap)
    for piece in (*packed.left, *(p for row in packed.rows for p in row.pieces)):
        assert (piece.start, piece.end) == (0, found[piece.document].length)
    for piece in packed.left:
        assert piece.end > LENGTH or len(found[piece.document].pictures) > (cap or WHOLE)


@settings(deadline=None, max_examples=150)
@given(documents, caps, st.sampled_from(["anywhere", "document"]))
def test_a_stream_holds_every_element_once_in_order_but_for_its_tail(found, cap, cut):
    packed = stream(found, LENGTH, max_images=cap, cut=cut)
    check(found, packed, again=False, max_images=cap)
    in_order = [p for row in packed.rows for p in row.pieces] + packed.left
    assert in_order == sorted(in_order)
    # the tail is one unfinished row
    assert sum(p.end - p.start for p in packed.left) < LENGTH
    for row, after in zip(packed.rows, [*packed.rows, None][1:], strict=True):
        then = after.pieces[0] if after else packed.left[0] if packed.left else None
        if then is None:
            continue
        if cut == "document" and len(row.pieces) > 1:
            assert then.start == 0, "a row of several documents ends with one"
        elif cap is None and cut == "anywhere":
            # as full as may be: only a picture that did not fit leaves room
            behind = [end - start for start, end in found[then.document].pictures if start == then.start]
            assert row.length + (behind[0] if behind else 1) > LENGTH


def test_a_document_goes_where_it_leaves_the_least_room():
    rows = best_fit([Extent(30), Extent(20), Extent(10), Extent(4)], LENGTH).rows
    assert [[piece.document for piece in row.pieces] for row in rows] == [[0, 2], [1, 3]]
    with_pictures = [Extent(30, ((3, 9),)), Extent(20), Extent(10, ((3, 9),))]
    rows = best_fit(with_pictures, LENGTH, max_images=1).rows
    assert [[piece.document for piece in row.pieces] for row in rows] == [[0], [1, 2]]


@pytest.mark.parametrize("pack", [best_fit, stream])
def test_a_picture_longer_than_a_row_is_named(pack):
    found = [Extent(5, (), "a"), Extent(60, ((3, 50),), "b")]
    with pytest.raises(ContextError, match="a picture needs 47 positions") as caught:
        pack(found, LENGTH)
    assert caught.value.where == "b"


endless = st.fixed_dictionaries(
    {
        "max_images": caps,
        "window": st.integers(1, 40),
        "cut": st.sampled_from(["anywhere", "document"]),
        "long": st.sampled_from(["split", "drop"]),
        "without_images": st.sampled_from(["keep", "drop"]),
    }
)


@settings(deadline=None, max_examples=100)
@given(documents, st.sampled_from(["none", "best_fit", "stream"]), endless, st.data())
def test_rows_go_on_from_anywhere_as_if_they_had_not_been_left(found, packing, config, data):
    # with one that always gives a row
    found = [*found, Extent(9, ((2, 7),))]
    asked = []

    def of(places):
        asked.append(places)
        return [found[place % len(found)] for place in places]

    plan = (packing, RowsConfig(**config), LENGTH, len(found), of)
    whole = list(islice(planned(*plan), 30))
    cut = data.draw(st.integers(1, 25))
    asked.clear()
    again = list(islice(planned(*plan, whole[cut - 1][1]), 30 - cut))
    assert again == whole[cut:]
    assert all(places.start >= whole[cut - 1][1].place for places in asked), "without the documents before"
    begun = 0
    for row, cursor in whole:
        begun += sum(piece.start == 0 for piece in row.pieces)
        if config["without_images"] == "keep":
            assert cursor.documents == begun
        else:
            assert row.pictures or packing == "none"


def test_a_pass_over_few_documents_is_over_before_the_next_begins():
    found = [Extent(9 + number) for number in range(7)]
    rows = planned("best_fit", RowsConfig(), LENGTH, 7, lambda places: [found[p % 7] for p in places])
    first = []
    for row, cursor in rows:
        first += [piece.document for piece in row.pieces]
        if cursor.place:
            break
    assert sorted(first) == list(range(7))


def test_documents_that_give_no_row_are_no_endless_wait():
    rows = planned("best_fit", RowsConfig(long="drop"), 5, 1000, lambda places: [Extent(9)] * len(places))
    with pytest.raises(UsageError, match="no row of 5 positions"):
        next(rows)


def test_without_packing_every_document_is_a_row():
    rows = planned("none", RowsConfig(), LENGTH, 3, lambda _: pytest.fail("nothing need be known"))
    assert [(row.pieces, cursor) for row, cursor in islice(rows, 2)] == [
        (((0, 0, WHOLE),), Cursor(1, 0, 1)),
        (((1, 0, WHOLE),), Cursor(2, 0, 2)),
    ]


# --- how full rows are: the mixes of pre-training documents, instructions and pairs -----------------------------------


def mmc4(rng) -> Extent:
    """Mean 606 tokens, 2.5 pictures of 65 tokens."""
    return _document(rng, pictures=1 + min(5, int(rng.expovariate(0.47))), text=rng.lognormvariate(5.8, 0.75))


def instruction(rng) -> Extent:
    """Mean 528 tokens, 4.5 pictures."""
    return _document(rng, pictures=rng.choice([3, 4, 5, 6]), text=rng.lognormvariate(5.33, 0.45))


def _document(rng, *, pictures: int, text: float) -> Extent:
    run = max(1, round(text / (pictures + 1)))
    starts = [1 + run + number * (65 + run) for number in range(pictures)]
    return Extent(1 + run * (pictures + 1) + 65 * pictures, tuple((at, at + 65) for at in starts))


@pytest.mark.parametrize(
    "mix,mean,pictures,least", [(mmc4, 606, 2.5, 0.98), (instruction, 528, 4.5, 0.95)], ids=["mmc4", "instruction"]
)
def test_rows_of_a_thousand_documents_are_nearly_full(mix, mean, pictures, least):
    rng = random.Random(0)
    found = [mix(rng) for _ in range(10_000)]
    assert sum(e.length for e in found) / len(found) == pytest.approx(mean, rel=0.05)
    assert sum(len(e.pictures) for e in found) / len(found) == pytest.approx(pictures, rel=0.05)
    rows = []
    for first in range(0, len(found), 1000):
        rows += best_fit(found[first : first + 1000], 2048, max_images=30).rows
    assert utilisation(rows, 2048) >= least
    assert utilisation(stream(found, 2048).rows, 2048) >= 0.97
