"""Encoded documents on disk: the same to the bit, never another's, whole or not there."""

import dataclasses
import random

import pytest
import torch

from weft.data.token_cache import TokenCache
from weft.layout import FEATURE, ImageSpan, Pixels, TextSpan, TokenSequence

KEY = {"data": "d", "model": "m", "weights": "w", "reading": "r"}


def make(number: int, kind: str = "codes") -> TokenSequence:
    generator = torch.Generator().manual_seed(number)
    texts = [1 + number % 3, 2, 1]
    given = [bool(number % 2), False]
    spans = [TextSpan(texts[0])]
    for i in range(number % 3):
        picture = ImageSpan(2, 3, given=given[i], before=1 + i, after=i)
        spans += [picture, TextSpan(texts[1 + i])]
    ids = torch.cat(
        [
            torch.full((span.length,), FEATURE)
            if isinstance(span, ImageSpan) and kind != "codes"
            else torch.randint(2**30, (span.length,), generator=generator)
            for span in spans
        ]
    )
    pictures = [span for span in spans if isinstance(span, ImageSpan)]
    features = pixels = None
    if kind == "vectors" and pictures:
        features = torch.randn(6 * len(pictures), 5, generator=generator)
    if kind == "pixels":
        pixels = [_pixels(generator, painted=not span.given) for span in pictures]
    target = torch.rand(len(ids), generator=generator) < 0.5
    name = None if number % 5 == 0 else f"doc é {number}"
    return TokenSequence(ids, tuple(spans), target, name, features, tuple(pixels or ()))


def _pixels(generator, *, painted: bool) -> Pixels:
    seen, whole = (torch.randint(256, (3, n, n), generator=generator).byte() for n in (4, 8))
    return Pixels(seen, whole if painted else None)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b


@pytest.mark.parametrize("kind", ["codes", "vectors", "pixels"])
def test_documents_come_back_to_the_bit(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("weft.data.token_cache.DOCUMENTS", 7)
    monkeypatch.setattr("weft.data.token_cache.OPEN", 2)
    numbers = list(range(40))
    random.Random(0).shuffle(numbers)
    cache = TokenCache(tmp_path, **KEY)
    assert all(cache.get(number) is None for number in numbers)
    for number in numbers:
        cache.put(number, make(number, kind))
        assert same(cache.get(number), make(number, kind))
    cache.flush()
    assert len(list(cache.folder.glob("*.safetensors"))) == 6
    for each in (cache, TokenCache(tmp_path, **KEY)):
        assert len(each) == 40
        assert all(same(each.get(number), make(number, kind)) for number in numbers)
        assert each.get(40) is None


def test_what_was_not_flushed_is_not_there(tmp_path):
    cache = TokenCache(tmp_path, **KEY)
    cache.put(1, make(1))
    assert TokenCache(tmp_path, **KEY).get(1) is None
    cache.flush()
    cache.flush()
    assert same(TokenCache(tmp_path, **KEY).get(1), make(1))


@pytest.mark.parametrize("changed", [*KEY, "version"])
def test_nothing_of_another_key_is_found(tmp_path, changed, monkeypatch):
    cache = TokenCache(tmp_path, **KEY)
    cache.put(1, make(1))
    cache.flush()
    if changed == "version":
        monkeypatch.setattr("weft.data.token_cache.VERSION", 2)
        other = TokenCache(tmp_path, **KEY)
    else:
        other = TokenCache(tmp_path, **{**KEY, changed: "another"})
    assert other.get(1) is None
    assert other.folder != cache.folder


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone", "renamed"])
def test_a_damaged_file_is_passed_over(tmp_path, damage, caplog):
    cache = TokenCache(tmp_path, **KEY)
    cache.put(1, make(1))
    cache.flush()
    (file,) = cache.folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
    opened = TokenCache(tmp_path, **KEY) if damage == "gone" else None
    if damage in ("gone", "renamed"):
        file.rename(file.with_name("0" * 64 + ".safetensors" if damage == "renamed" else "away"))
    else:
        file.write_bytes({"flipped": data, "cut": data[:-9], "empty": b""}[damage])
    opened = opened or TokenCache(tmp_path, **KEY)
    assert opened.get(1) is None
    assert "encoded again" in caplog.text
    # and it is put anew
    opened.put(1, make(1))
    opened.flush()
    assert same(TokenCache(tmp_path, **KEY).get(1), make(1))


def test_a_writer_that_dies_leaves_nothing(tmp_path, monkeypatch):
    cache = TokenCache(tmp_path, **KEY)
    cache.put(1, make(1))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("weft.atomic.os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            cache.flush()
    assert not list(cache.folder.glob("*.safetensors"))
    assert TokenCache(tmp_path, **KEY).get(1) is None
    cache.flush()
    assert same(TokenCache(tmp_path, **KEY).get(1), make(1))
