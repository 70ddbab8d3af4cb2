"""What one process of a server sends the other is what arrives, however it is cut up on its way."""

import io
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from tests.serve.apart import pipe
from weft.document import Document, Image, Text, Turn
from weft.errors import AdapterError, ConfigError, ImageError, UsageError, WeftError
from weft.generation import Choice, Finished, ImageBegin, ImageReady, SamplingConfig, TextDelta, Usage
from weft.serve.messages import Ask, End, Gone, Joined, Leave, Round
from weft.serve.scheduler import Overdue
from weft.serve.wire import Failed, Ready, Wire
from weft.serve.worker import Unexpected

numbers = st.integers(0, 2**63 - 1)
texts = st.text(st.characters(), max_size=20)  # with halves of surrogate pairs
parts = st.one_of(st.builds(Text, texts), st.builds(Image, st.binary(max_size=40)))
turns = st.builds(
    Turn, st.sampled_from(["system", "user", "assistant"]), st.lists(parts).map(tuple), st.none() | st.booleans()
)
documents = st.builds(
    Document, st.lists(turns).map(tuple), st.none() | texts, st.dictionaries(texts, st.none() | texts | numbers)
)
choices = st.builds(
    Choice, temperature=st.floats(0, 1e6), top_k=st.none() | st.integers(1, 2**40), top_p=st.floats(1e-9, 1)
)
configs = st.builds(
    SamplingConfig, text=choices, image=choices, seed=numbers, guidance=st.none() | st.floats(0, 1e6),
    size=st.none() | st.tuples(st.integers(1, 4096), st.integers(1, 4096)), first=st.sampled_from(["any", "image"]),
    max_images=st.integers(1, 99), max_tokens=st.none() | st.integers(1, 10**40),
)  # fmt: skip


@st.composite
def pictures(draw):
    size = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    count = 3 * size[0] * size[1]
    return PILImage.frombytes("RGB", size, draw(st.binary(min_size=count, max_size=count)))


@st.composite
def reports(draw):
    request = draw(numbers)
    return request, draw(
        st.one_of(
            st.just(Joined()),
            st.just(Gone()),
            st.builds(TextDelta, st.just(request), texts),
            st.builds(ImageBegin, st.just(request), numbers),
            st.builds(ImageReady, st.just(request), numbers, pictures()),
            st.builds(
                Finished, st.just(request), st.sampled_from(["stop", "length", "cancelled", "invalid_logits"]),
                st.builds(Usage, numbers, numbers, numbers),
            ),
        )
    )  # fmt: skip


messages = st.one_of(
    st.builds(Ready, st.lists(texts).map(tuple), numbers),
    st.builds(Failed, texts),
    st.builds(Ask, numbers, texts, documents, configs),
    st.builds(Leave, numbers, st.floats(allow_nan=False)),
    st.just(End()),
    st.builds(Round, st.lists(reports()).map(tuple), numbers, numbers),
)


class Cut(io.BytesIO):
    """Gives no more than so many bytes at once."""

    def __init__(self, data, most):
        super().__init__(data)
        self._most = most

    def read1(self, size=-1):
        return super().read1(min(size, self._most))


def sent(*all_messages):
    reads, writes = pipe()
    wire, found = Wire(io.BytesIO(), writes), []
    reading = threading.Thread(target=lambda: found.append(reads.read()))
    reading.start()
    for message in all_messages:
        wire.send(message)
    wire.close()
    reading.join()
    reads.close()
    return found[0]


def read(reads):
    """What stands in a file, one message after the other."""
    return Wire(reads, io.BytesIO())


@settings(deadline=None)
@given(st.lists(messages, max_size=5), st.integers(1, 64))
def test_what_is_sent_arrives_in_order(all_messages, most):
    assert list(read(Cut(sent(*all_messages), most))) == all_messages


def test_nobody_waits_for_who_does_not_read():
    reads, writes = pipe()
    wire = Wire(io.BytesIO(), writes)
    large = Ask(0, "a", Document((Turn("user", (Image(b"x" * 2**20),)),)), SamplingConfig())
    # more than a pipe holds, and before and after it what is written at once
    all_messages = [Leave(0, 0.0), large, Leave(1, 0.0), Leave(2, 0.0), large, large, *[Leave(3, 0.0)] * 9999]
    for message in all_messages:
        wire.send(message)
    closing = threading.Thread(target=wire.close)
    closing.start()
    assert list(read(reads)) == all_messages
    closing.join()


def test_what_is_written_at_once_does_not_overtake_what_the_thread_has(monkeypatch):
    reads, writes = pipe()
    put, is_begun, may_go_on = Wire._put, threading.Event(), threading.Event()

    def put_late(wire, data):
        if threading.current_thread() is wire._writer:
            is_begun.set()
            may_go_on.wait()
        put(wire, data)

    monkeypatch.setattr(Wire, "_put", put_late)
    wire = Wire(io.BytesIO(), writes)
    large, small = Ready(("a" * 2**13,), 1), End()
    wire.send(large)
    is_begun.wait()
    wire.send(small)
    may_go_on.set()
    wire.close()
    assert list(read(reads)) == [large, small]


@pytest.mark.parametrize("part, error", [(Image(path="a/b.png"), ValueError), (Text(3.5j), TypeError)])
def test_what_cannot_be_sent_is_told_to_who_sends_it(part, error):
    reads, writes = pipe()
    wire = Wire(io.BytesIO(), writes)
    with pytest.raises(error):
        wire.send(Ask(0, "a", Document((Turn("user", (part,)),)), SamplingConfig()))
    wire.send(End())
    wire.close()
    assert list(read(reads)) == [End()]


def test_who_sends_to_nobody_is_not_held_up():
    reads, writes = pipe()
    reads.close()
    wire = Wire(io.BytesIO(), writes)
    for _ in range(3):
        wire.send(Ready(("a" * 2**20,), 1))
    wire.close()


@pytest.mark.parametrize(
    "error",
    [
        WeftError("what", where="where", fix="fix"),
        UsageError("what"),
        ConfigError("what", fix="fix"),
        AdapterError("what", where="a/b"),
        ImageError("what", reason="image_pixels"),
        Overdue("what", 7),
        Unexpected("what"),
    ],
)
def test_errors_arrive_as_what_they_are(error):
    (found,) = read(io.BytesIO(sent(error)))
    assert type(found) is type(error)
    assert vars(found) == vars(error)
    assert (str(found), found.code, found.args) == (str(error), error.code, error.args[:1])
    ((request, found),) = next(iter(read(io.BytesIO(sent(Round(((3, error),), 1, 0)))))).reports
    assert (request, type(found), vars(found)) == (3, type(error), vars(error))


def test_an_error_that_is_not_known_here_is_the_nearest_that_is():
    class Rare(AdapterError):
        code = "rare"

    data = sent(Rare("what", fix="fix"))
    Rare.code = "forgotten"
    (found,) = read(io.BytesIO(data))
    assert (type(found), found.what, found.fix) == (AdapterError, "what", "fix")
