"""What thresholds of image diversity would do to a sample of documents, before one is chosen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weft.data.filters.image_diversity import (
    PRESETS,
    ImageDiversity,
    Metric,
    distances_of,
    pictures_of,
    values_of,
    worst_of,
)
from weft.document import Document
from weft.errors import ImageError

STEPS = 20


@dataclass(frozen=True)
class Calibration:
    """Of the documents with two pictures or more that could be opened."""

    metric: str
    documents: int
    pairs: int
    edges: tuple[float, ...]
    """Of the bins: distances from 0 to the largest that was found, or to 1 if none is larger."""
    histogram: tuple[int, ...]
    """Pairs in each bin."""
    kept: dict[str, tuple[float, ...]]
    """By preset: the fraction of documents that is kept with the threshold at each edge, in that preset's space."""
    at_preset: dict[str, float]
    """With the preset's own threshold."""

    def __str__(self) -> str:
        most = max(self.histogram, default=0) or 1
        lines = [f"{self.pairs} pairs of pictures in {self.documents} documents, {self.metric} distance"]
        heads = "".join(f"{f'kept by {name}':>12}" for name in self.kept)
        lines.append(f"{'distance':>15}{'pairs':>8}  {'':30}{heads}")
        for i, number in enumerate(self.histogram):
            bar = "#" * round(30 * number / most)
            kept = "".join(f"{values[i]:12.3f}" for values in self.kept.values())
            lines.append(f"{self.edges[i]:7.3f}-{self.edges[i + 1]:7.3f}{number:8}  {bar:30}{kept}")
        fractions = ", ".join(f"{name} {fraction:.3f}" for name, fraction in self.at_preset.items())
        return "\n".join([*lines, f"kept at the presets' own thresholds: {fractions}"])


def calibrate(config: ImageDiversity, documents: Iterable[Document]) -> Calibration:
    """Distances of all pairs within each document, and what each preset's rule keeps as its threshold moves.

    Every document is measured once. The table's rows name distances; presets that read similarities are asked at
    one minus the distance.
    """
    distances = distances_of(config)
    measured: list[Sequence[Sequence[float]]] = []
    for document in documents:
        images = list(document.images)
        try:
            pictures = pictures_of(images, config)
        except ImageError:
            continue
        if 2 <= len(images) <= config.max_images:
            measured.append(distances(pictures).tolist())
    return calibration_of(config.metric, measured)


def calibration_of(metric: Metric, measured: Sequence[Sequence[Sequence[float]]]) -> Calibration:
    """The same of distances that are known: one square of them for each document."""
    found = [value for each in measured for value, _, _ in values_of(each, "distance")]
    top = max([1.0, *found])
    edges = tuple(top * i / STEPS for i in range(STEPS + 1))
    histogram = [0] * STEPS
    for value in found:
        histogram[min(int(STEPS * value / top), STEPS - 1)] += 1
    kept = {name: tuple(_kept(measured, name, edge) for edge in edges) for name in PRESETS}
    own = {name: _kept(measured, name, _as_distance(PRESETS[name]["threshold"], name)) for name in PRESETS}
    return Calibration(metric, len(measured), len(found), edges, tuple(histogram), kept, own)


def _as_distance(threshold: float, preset: str) -> float:
    return threshold if PRESETS[preset]["space"] == "distance" else 1 - threshold


def _kept(measured: Sequence[Sequence[Sequence[float]]], preset: str, distance: float) -> float:
    """The fraction that the preset's rule keeps with its threshold at `distance`."""
    space, discard = PRESETS[preset]["space"], PRESETS[preset]["discard"]
    threshold = _as_distance(distance, preset)
    worst = [worst_of(values_of(each, space), discard)[0] for each in measured]
    left = sum(not (value > threshold if discard == "above" else value < threshold) for value in worst)
    return left / len(measured) if measured else 0.0
