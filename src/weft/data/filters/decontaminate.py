"""Documents that hold a picture or a text of a benchmark, by a list of hashes; the list may be passed on, its data not.

image HEX    SHA-256 of a picture's bytes          look HEX    perceptual hash of a picture, 256 bits
text HEX     SHA-256 of a text's words, in small letters, one space between two
"""

import functools
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt

from weft.config import Config
from weft.data.filters.removal import rejected
from weft.data.sentences import words
from weft.data.stage import Outcome, Stage
from weft.document import Document
from weft.errors import ImageError, UsageError
from weft.images import decode_image

MIN_WORDS = 8
"""Shorter texts are too common to mean anything."""


class Decontaminate(Config):
    """Drops documents with something on the list. How many were hit is in the ledger, as `contaminated_...`."""

    kind: Literal["decontaminate"] = "decontaminate"
    hashes: Path
    """Made by `hashes_of`; lines that are empty or begin with # say nothing."""
    max_bits: NonNegativeInt = 4
    """In which perceptual hashes may differ to mean the same picture."""


@dataclass(frozen=True)
class _Listed:
    images: frozenset[str]
    texts: frozenset[str]
    looks: tuple[int, ...]


def build(config: Decontaminate) -> Stage:
    listed = _read(config.hashes)

    def stage(document: Document) -> Outcome:
        for image in document.images:
            if image.data is not None and image.sha256 in listed.images:
                return rejected("contaminated_image", f"SHA-256 {image.sha256[:16]} is on the list", image=image.path)
        for text in document.texts:
            for key in _text_keys(text.text):
                if key in listed.texts:
                    return rejected("contaminated_text", f"text with SHA-256 {key[:16]} is on the list")
        return _looked_at(document, listed, config.max_bits) if listed.looks else (document, ())

    return stage


def hashes_of(documents: Iterable[Document]) -> Iterator[str]:
    """The lines of a list that keeps these documents out of training data."""
    for document in documents:
        for image in document.images:
            yield f"image {image.sha256}"
            look = _look(image.data or b"")
            if look is not None:
                yield f"look {look:064x}"
        for text in document.texts:
            for key in _text_keys(text.text):
                yield f"text {key}"


def _looked_at(document: Document, listed: _Listed, max_bits: int) -> Outcome:
    from weft.scorers import hamming

    for image in document.images:
        look = _look(image.data or b"")
        bits = min((hamming(look, each) for each in listed.looks), default=None) if look is not None else None
        if bits is not None and bits <= max_bits:
            message = f"{bits} bits from a picture on the list, at most {max_bits}"
            return rejected("contaminated_look", message, bits, max_bits, image=image.path)
    return document, ()


def _look(data: bytes) -> int | None:
    """None for pictures that cannot be decoded, or that show too little to be told from others."""
    from weft.scorers import difference_hash, tells_apart

    try:
        look = difference_hash(decode_image(data))
    except ImageError:
        return None
    return look if tells_apart(look) else None


def _text_keys(text: str) -> list[str]:
    """Of a text, whatever its spaces, punctuation and capital letters; none of one that is short."""
    found = words(unicodedata.normalize("NFKC", text).casefold())
    return [hashlib.sha256(" ".join(found).encode()).hexdigest()] if len(found) >= MIN_WORDS else []


@functools.lru_cache(maxsize=4)
def _read(file: Path) -> _Listed:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("list of hashes cannot be read", where=str(file), fix="check the path") from error
    found: dict[str, set[str]] = {"image": set(), "text": set(), "look": set()}
    for number, line in enumerate(lines, start=1):
        kind, _, value = line.strip().partition(" ")
        if not kind or kind.startswith("#"):
            continue
        is_hash = len(value) == 64 and set(value.lower()) <= set("0123456789abcdef")
        if kind not in found or not is_hash:
            raise UsageError(
                "a line is no hash", where=f"{file}, line {number}", fix="write image, text or look, and 64 hex digits"
            )
        found[kind].add(value.lower())
    looks = tuple(sorted(int(value, 16) for value in found["look"]))
    return _Listed(frozenset(found["image"]), frozenset(found["text"]), looks)
