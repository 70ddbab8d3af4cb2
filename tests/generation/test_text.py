import random

import pytest

from weft.backbones.tiny import load
from weft.generation.text import TextStream


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.mark.parametrize("text", ["plain", "Grüße, 猫が好き 🐈‍⬛!", " leading", "\ufffd is a character too \ufffd", ""])
def test_pieces_are_whole_characters_and_make_the_text(nano, text):
    ids = nano.tokenize(text)
    stream = TextStream(nano.detokenize)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == nano.detokenize(ids) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_pieces_of_random_bytes_make_what_detokenizing_them_gives(nano):
    special = set(nano.tokens)
    words = [token for token in range(nano.config.vocabulary) if token not in special]
    stream = TextStream(nano.detokenize)
    for seed in range(300):
        ids = random.Random(seed).choices(words, k=seed % 17)
        assert "".join(stream.push(token) for token in ids) + stream.flush() == nano.detokenize(ids), seed


def test_broken_characters_come_with_the_flush(nano):
    stream = TextStream(nano.detokenize)
    cat = nano.tokenize("a🐈")[:-1]
    assert "".join(stream.push(token) for token in cat) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.push(nano.tokenize("b")[0]) + stream.push(nano.tokenize("b")[1]) == "b"
