"""Documents that show a picture twice: the same bytes, or the same look. No network is asked."""

from collections.abc import Iterable
from typing import Literal

from pydantic import NonNegativeInt

from weft.config import Config
from weft.data.filters.removal import decoding, rejected
from weft.data.stage import Outcome, Stage
from weft.document import Document, Image
from weft.images import decode_image


class DuplicateImages(Config):
    """Drops documents with equal pictures. Pictures that are found unequal here may still be alike."""

    kind: Literal["duplicate_images"] = "duplicate_images"
    max_bits: NonNegativeInt | None = 10
    """Perceptual hashes, of 256 bits, that differ in at most so many mean the same look; None: only bytes count."""


def build(config: DuplicateImages) -> Stage:
    def stage(document: Document) -> Outcome:
        images = list(document.images)
        again = _again(image.sha256 for image in images)
        if again is not None:
            i, j = again
            return rejected("duplicate_image", f"picture {j} has the bytes of picture {i}", image=images[j].path)
        if config.max_bits is None:
            return document, ()
        return _alike(document, images, config.max_bits)

    return decoding(stage)


def _again(keys: Iterable[str]) -> tuple[int, int] | None:
    seen: dict[str, int] = {}
    return next(((first, j) for j, key in enumerate(keys) if (first := seen.setdefault(key, j)) != j), None)


def _alike(document: Document, images: list[Image], max_bits: int) -> Outcome:
    from weft.scorers import HASHED, difference_hash, hamming, tells_apart

    hashes = [difference_hash(decode_image(image.data or b"", least=HASHED)) for image in images]
    for j, second in enumerate(hashes):
        for i, first in enumerate(hashes[:j]):
            bits = hamming(first, second)
            if bits <= max_bits and tells_apart(first) and tells_apart(second):
                message = f"picture {j} differs from picture {i} in {bits} bits, at most {max_bits}"
                return rejected("look_alike_image", message, bits, max_bits, image=images[j].path)
    return document, ()
