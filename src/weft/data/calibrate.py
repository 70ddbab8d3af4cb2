"""What the thresholds of a recipe would do to a sample of its sources, before a build is run with them.

Every filter that compares a number with a threshold gives one number for each document of the sample, measured on the
document as it was read, so that each threshold is seen by itself. A proposal keeps a given share of the sample; where
pictures are looked at for being alike it also stays below what pictures of different documents have in common, for
those are not duplicates of each other.
"""

import io
import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from weft.atomic import write_text
from weft.data.annotate.material import material_of, source_of
from weft.data.filters import FilterConfig, coherence, decode
from weft.data.filters.calibrate import Calibration, calibration_of
from weft.data.filters.coherence import Coherence
from weft.data.filters.duplicate_images import DuplicateImages
from weft.data.filters.image_count import ImageCount
from weft.data.filters.image_diversity import ImageDiversity, distances_of, values_of, worst_of
from weft.data.filters.sentence_count import SentenceCount, count_sentences
from weft.data.filters.text_length import TextLength
from weft.data.sources import SOURCES, SourceConfig
from weft.data.stage import Record
from weft.document import Document
from weft.errors import UsageError
from weft.images import decode_image

if TYPE_CHECKING:
    from PIL import Image as PILImage

DEFAULT: tuple[FilterConfig, ...] = (
    TextLength(),
    SentenceCount(),
    ImageCount(min=3, max=6),
    DuplicateImages(),
    ImageDiversity(),
    Coherence(threshold=0.24),
)
"""What is looked at where no recipe says it: the paper's counts, hashes instead of networks, cosines of the source."""
BINS = 20
UNRELATED = 32
"""Documents whose first pictures are compared with each other."""
CHANCE = 0.01
"""A pair that is closer than all but this share of unrelated ones is called alike."""
_SIDE = 160
_PAIRS = 4
"""Pairs of pictures shown on either side of a threshold."""

Keeps = Literal["at least", "at most", "more than"]
"""What a threshold keeps: documents whose value is so compared with it."""


@dataclass(frozen=True)
class Score:
    """What one threshold is compared with, of every document that has it."""

    filter: str
    field: str
    what: str
    keeps: Keeps
    values: tuple[float, ...]
    unrelated: tuple[float, ...]
    """The same of pictures, or of a picture and texts, of different documents."""
    now: float
    proposed: float

    def kept(self, threshold: float, values: Sequence[float] | None = None) -> float:
        """The fraction of documents that a threshold keeps."""
        values = self.values if values is None else values
        return sum(_passes(value, self.keeps, threshold) for value in values) / len(values) if values else 0.0

    @property
    def edges(self) -> tuple[float, ...]:
        """Of the bins of a histogram that holds all values and both thresholds; whole numbers where these are."""
        everything = (*self.values, *self.unrelated, self.now, self.proposed)
        low, high = min(everything), max(everything)
        if all(isinstance(value, int) for value in everything):
            wide = math.ceil((high + 1 - low) / BINS)
            return tuple(range(int(low), int(high) + 1 + wide, wide))
        high = high if high > low else low + 1
        return tuple(low + (high - low) * i / BINS for i in range(BINS + 1))

    def histogram(self, values: Sequence[float]) -> list[int]:
        """How many of `values` are in each bin."""
        edges, last = self.edges, len(self.edges) - 2
        places = Counter(min(bisect_right(edges, value) - 1, last) for value in values)
        return [places[i] for i in range(last + 1)]

    def to_json(self) -> dict[str, Any]:
        passing = self.kept(self.proposed, self.unrelated) if self.unrelated else None
        return {
            "filter": self.filter,
            "field": self.field,
            "what": self.what,
            "keeps": self.keeps,
            "documents": len(self.values),
            "edges": list(self.edges),
            "histogram": self.histogram(self.values),
            "histogram_unrelated": self.histogram(self.unrelated),
            "kept_at_edges": [self.kept(edge) for edge in self.edges],
            "now": self.now,
            "kept_now": self.kept(self.now),
            "proposed": self.proposed,
            "kept_proposed": self.kept(self.proposed),
            "unrelated_kept_proposed": passing,
        }

    def __str__(self) -> str:
        counts, most = self.histogram(self.values), max(self.histogram(self.values))
        lines = [f"{self.filter}.{self.field}: {self.what}, {len(self.values)} documents"]
        lines.append(f"{'threshold':>12}{'from here on':>14}  {'':30}{'kept':>8}")
        for edge, number in zip(self.edges, counts, strict=False):
            if number:
                lines.append(f"{edge:12.4g}{number:14}  {'#' * round(30 * number / most):30}{self.kept(edge):8.3f}")
        proposed = f"proposed {self.proposed:g} keeps {self.kept(self.proposed):.3f}"
        if self.unrelated:
            proposed += f", and {self.kept(self.proposed, self.unrelated):.3f} of what is unrelated"
        return "\n".join([*lines, f"now {self.now:g} keeps {self.kept(self.now):.3f}; {proposed}"])


@dataclass(frozen=True)
class Pair:
    """Two pictures of a document."""

    document: str
    numbers: tuple[int, int]
    distance: float
    pictures: tuple[bytes, bytes]
    """Small, encoded."""


@dataclass(frozen=True)
class Report:
    """What a sample was measured for."""

    read: int
    sampled: int
    """Records that gave a document."""
    keep: float
    scores: tuple[Score, ...]
    presets: Calibration | None
    """Of image diversity."""
    pairs: tuple[Pair, ...]
    """All within documents, by distance."""
    missing: dict[str, str]
    """Filters that could not be measured, and why."""
    filters: tuple[FilterConfig, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "sampled": self.sampled,
            "keep": self.keep,
            "scores": [score.to_json() for score in self.scores],
            "presets": None if self.presets is None else self.presets.at_preset,
            "missing": self.missing,
            "filters": fragment_of(self),
        }

    def __str__(self) -> str:
        head = f"{self.sampled} documents of {self.read} records; every threshold by itself, on documents as read"
        parts = [head, *map(str, self.scores)]
        if self.presets is not None:
            parts.append(f"the paper's sentence in its three readings (image_diversity):\n{self.presets}")
        parts += [f"{kind}: not measured, {why}" for kind, why in self.missing.items()]
        return "\n\n".join(parts)


def sample(sources: Sequence[SourceConfig], number: int) -> Iterator[Record]:
    """Records of units that are spread evenly over all sources, from the first of each on, until `number` documents.

    Raises:
        UsageError: a source holds nothing.
    """
    units = [(source, unit) for source in sources for unit in SOURCES[source.kind].plan(source).units]
    chosen = [units[i * len(units) // min(number, len(units))] for i in range(min(number, len(units)))]
    left = number
    for place, (source, unit) in enumerate(chosen):
        share = math.ceil(left / (len(chosen) - place))
        for record in SOURCES[source.kind].read(source, unit):
            yield record
            if record.document is not None:
                share, left = share - 1, left - 1
            if share <= 0:
                break


def calibrate(filters: Sequence[FilterConfig], records: Iterable[Record], keep: float = 0.95) -> Report:
    """Measure a sample. Pictures that cannot be decoded are left out of it.

    Args:
        keep: the share of the sample that each proposed threshold keeps, or more; less only where equal hashes are
            more frequent.

    Raises:
        UsageError: `keep` is no share, or the sample holds no document.
        CheckpointError: the weights of a filter cannot be read.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"keep must be above 0 and at most 1, got {keep:g}", where="weft data calibrate")
    read, documents = 0, list[Document]()
    sound = decode.build(decode.Decode(on_bad_image="image"))
    for record in records:
        read += 1
        if record.document is not None:
            document, _ = sound(record.document)
            documents += [] if document is None else [document]
    if not documents:
        raise UsageError(f"of {read} records none gave a document", fix="weft data check says what is wrong with them")
    scores, missing = list[Score](), dict[str, str]()
    presets, pairs = None, list[Pair]()
    for config in filters:
        match config:
            case TextLength():
                found = [sum(len(text.text) for text in document.texts) for document in documents]
                scores += _bounds(config, "characters of text", found, keep)
            case SentenceCount():
                found = [count_sentences(material_of(d).texts, source_of(d), config) for d in documents]
                scores += _bounds(config, "sentences", found, keep)
            case ImageCount():
                scores += _bounds(config, "pictures", [len(list(d.images)) for d in documents], keep)
            case DuplicateImages() if config.max_bits is not None:
                scores += _bits(config, documents, keep, missing)
            case ImageDiversity():
                presets, pairs = _diversity(config, documents, keep, scores, missing)
            case Coherence():
                scores += _cosines(config, documents, keep, missing)
    return Report(read, len(documents), keep, tuple(scores), presets, tuple(pairs), missing, tuple(filters))


def fragment_of(report: Report) -> list[dict[str, Any]]:
    """The measured filters as a recipe has them, with the proposed thresholds."""
    filters = []
    for config in report.filters:
        proposed = {score.field: score.proposed for score in report.scores if score.filter == config.kind}
        if proposed:
            changed = config.model_copy(update=proposed)
            filters.append(changed.model_dump(mode="json", include={"kind", *config.model_fields_set, *proposed}))
    return filters


def write_fragment(report: Report, out: Path, source: Path) -> None:
    """Write the proposal as YAML that can be put into a recipe."""
    lines = [
        f"# Proposed by: weft data calibrate {source}",
        f"# from {report.sampled} documents: each threshold by itself keeps {report.keep:g} of them, or more.",
        *(
            f"# {score.filter}.{score.field}: {score.proposed:g} keeps {score.kept(score.proposed):.3f}, "
            f"{score.now:g} keeps {score.kept(score.now):.3f}"
            for score in report.scores
        ),
    ]
    write_text(out, "\n".join(lines) + "\n" + yaml.safe_dump({"filters": fragment_of(report)}, sort_keys=False))


def _passes(value: float, keeps: Keeps, threshold: float) -> bool:
    if keeps == "more than":
        return value > threshold
    return value >= threshold if keeps == "at least" else value <= threshold


def _proposed(values: Sequence[float], keeps: Keeps, keep: float, unrelated: Sequence[float] = ()) -> float:
    """The threshold that drops as much as `keep` allows, though nothing that is like `unrelated`."""
    if keeps == "at most":
        return -_proposed([-value for value in values], "at least", keep, [-value for value in unrelated])
    found = sorted(values)[math.floor(round((1 - keep) * len(values), 9))]
    if unrelated:
        found = min(found, sorted(unrelated)[math.floor(CHANCE * len(unrelated))])
    # rounded to the side on which more is kept
    return found - 1 if keeps == "more than" else math.floor(found * 10_000) / 10_000


def _bounds(config: TextLength | SentenceCount | ImageCount, what: str, values: list[int], keep: float) -> list[Score]:
    scores = []
    sides: tuple[tuple[str, Keeps, int | None], ...] = (("min", "at least", config.min), ("max", "at most", config.max))
    for field, keeps, now in sides:
        if now is not None:
            # the counts are the paper's, and say what a document is for: they are loosened, never tightened
            proposed = int(_proposed(values, keeps, keep))
            proposed = min(proposed, now) if keeps == "at least" else max(proposed, now)
            scores.append(Score(config.kind, field, what, keeps, tuple(values), (), now, proposed))
    return scores


def _bits(config: DuplicateImages, documents: Sequence[Document], keep: float, missing: dict[str, str]) -> list[Score]:
    from weft.scorers import hash_distances

    def bits(pictures: "Sequence[PILImage.Image]") -> list[float]:
        # of pictures that show too little to be compared the distance is 1
        found = values_of(hash_distances(pictures).tolist(), "distance")
        return [round(256 * distance) for distance, _, _ in found if distance < 1]

    least = [min(found) for document in documents if (found := bits(_pictures(document)))]
    if not least:
        missing[config.kind] = _NO_PAIRS
        return []
    unrelated = bits(_of_different(documents))
    assert config.max_bits is not None
    proposed = max(0, int(_proposed(least, "more than", keep, unrelated)))
    what = "least number of bits of 256 in which the hashes of two pictures differ"
    return [
        Score(config.kind, "max_bits", what, "more than", tuple(least), tuple(unrelated), config.max_bits, proposed)
    ]


def _diversity(
    config: ImageDiversity, documents: Sequence[Document], keep: float, scores: list[Score], missing: dict[str, str]
) -> tuple[Calibration | None, list[Pair]]:
    distances = distances_of(config)
    measured, worst, pairs = [], list[float](), list[Pair]()
    for document in documents:
        pictures = _pictures(document)
        if not 2 <= len(pictures) <= config.max_images:
            continue
        found = distances(pictures).tolist()
        measured.append(found)
        worst.append(worst_of(values_of(found, config.space), config.discard)[0])
        small = [_small(picture) for picture in pictures]
        pairs += [
            Pair(document.id or "", (i, j), distance, (small[i], small[j]))
            for distance, i, j in values_of(found, "distance")
        ]
    if not measured:
        missing[config.kind] = _NO_PAIRS
        return None, []
    others = _of_different(documents)
    unrelated = [value for value, _, _ in values_of(distances(others).tolist(), config.space)] if others[1:] else []
    keeps: Keeps = "at most" if config.discard == "above" else "at least"
    proposed = _proposed(worst, keeps, keep, () if config.is_inverted else unrelated)
    side = "greatest" if config.discard == "above" else "least"
    what = f"{side} {config.metric} {config.space} between two pictures"
    scores.append(
        Score(config.kind, "threshold", what, keeps, tuple(worst), tuple(unrelated), config.threshold, proposed)
    )
    return calibration_of(config.metric, measured), sorted(pairs, key=lambda pair: pair.distance)


def _cosines(config: Coherence, documents: Sequence[Document], keep: float, missing: dict[str, str]) -> list[Score]:
    measure = None if config.model is None else coherence.cosines_of(config.model)
    found = []
    for document in documents:
        if source_of(document) in config.skip or not any(True for _ in document.images):
            continue
        cosines = coherence.stored(document, config.threshold_model) if config.reuse else None
        if cosines is None and measure is not None:
            cosines = coherence.scored(document, measure)
        if cosines is not None:
            found.append(cosines)
    if not found:
        missing[config.kind] = (
            f"no document holds cosines of {config.threshold_model}, and no model was given: set coherence.model"
        )
        return []
    unrelated = list[float]()
    if measure is not None:
        shifted = itertools.pairwise(documents)
        crossed = [
            (image, material_of(other).texts) for one, other in shifted for image in itertools.islice(one.images, 1)
        ]
        unrelated = [max(measure(image, texts)) for image, texts in crossed[:UNRELATED] if texts]
    scale = 1.0 if config.units == "cosine" else coherence.SCALE
    if config.unit == "image":
        values, what = [value for cosines in found for value in cosines], f"{config.units} of a picture"
    else:
        values = [coherence.aggregate_of(cosines, config) for cosines in found]
        what = f"{config.aggregate} {config.units} of the pictures"
    scaled = tuple(scale * value for value in values)
    others = tuple(scale * value for value in unrelated)
    proposed = _proposed(scaled, "at least", keep)
    what = f"{what} and the text beside them ({config.threshold_model})"
    return [Score(config.kind, "threshold", what, "at least", scaled, others, config.threshold, proposed)]


_NO_PAIRS = "no document holds two pictures that can be compared"


def _pictures(document: Document) -> "list[PILImage.Image]":
    return [decode_image(image.data or b"") for image in document.images]


def _of_different(documents: Sequence[Document]) -> "list[PILImage.Image]":
    """The first picture of each of several documents, without those that are the same file."""
    first = {image.sha256: image for document in documents for image in itertools.islice(document.images, 1)}
    return [decode_image(image.data or b"") for image in itertools.islice(first.values(), UNRELATED)]


def _small(picture: "PILImage.Image") -> bytes:
    picture = picture.copy()
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
