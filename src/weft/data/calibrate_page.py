"""A calibration as one HTML page that loads nothing: histograms, and the pairs of pictures near every threshold."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.atomic import write_text
from weft.data.calibrate import Pair, Report, Score
from weft.data.filters.image_diversity import PRESETS, ImageDiversity
from weft.images import data_uri

_SHOWN = 6
"""Pairs in a row."""
_WIDTH, _HEIGHT = 640, 160
"""Of a histogram, in units of its drawing."""


def write_page(report: Report, out: Path, title: str) -> None:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("weft.data"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("calibrate.html").render(
        title=title,
        report=report,
        charts=[_chart(score) for score in report.scores],
        readings=_readings(report),
        rows=list(_rows(report)),
        width=_WIDTH,
        height=_HEIGHT,
    )
    write_text(out, page)


def _chart(score: Score) -> dict[str, Any]:
    """Bars and lines in the units of the drawing; unrelated values are drawn as large as the others together."""
    counts, edges = score.histogram(score.values), score.edges
    others = score.histogram(score.unrelated)
    share = len(score.values) / len(score.unrelated) if score.unrelated else 0.0
    top = max(*counts, *(share * number for number in others))
    wide = _WIDTH / len(counts)
    return {
        "score": score,
        "bars": [(i * wide, wide, _HEIGHT * number / top) for i, number in enumerate(counts)],
        "others": [(i * wide, wide, _HEIGHT * share * number / top) for i, number in enumerate(others) if number],
        "now": _x(score.now, score),
        "proposed": _x(score.proposed, score),
        "rows": [(edge, number, score.kept(edge)) for edge, number in zip(edges, [*counts, None], strict=True)],
        "passing": score.kept(score.proposed, score.unrelated) if score.unrelated else None,
    }


def _x(threshold: float, score: Score) -> float:
    """Between what is kept and what is not: on the far side of a whole number that belongs to the lower side."""
    edges = score.edges
    beyond = isinstance(edges[0], int) and score.keeps != "at least"
    return _WIDTH * (threshold + beyond - edges[0]) / (edges[-1] - edges[0])


def _readings(report: Report) -> list[dict[str, Any]]:
    """The three readings of the paper's sentence, and what each does to the sample."""
    if report.presets is None:
        return []
    means = {
        "A": "LPIPS taken as a similarity, one minus the distance: near-duplicates go. The default.",
        "B": "LPIPS as the distance that it is: near-duplicates go, and much else; stricter.",
        "C": "the sentence as it stands: documents with unlike pictures go, near-duplicates stay. For comparison only.",
    }
    return [
        {
            "name": name,
            "rule": f"{rule['space']} {rule['discard']} {rule['threshold']:g} is discarded",
            "means": means[name],
            "kept": report.presets.at_preset[name],
        }
        for name, rule in PRESETS.items()
    ]


def _rows(report: Report) -> Iterator[dict[str, Any]]:
    """Pairs of pictures by where they are: at both ends, and on both sides of every threshold."""
    pairs = report.pairs
    if not pairs:
        return
    (config,) = (config for config in report.filters if isinstance(config, ImageDiversity))
    (score,) = (score for score in report.scores if score.filter == config.kind)
    yield {"name": "The most alike", "pairs": [_shown(pair) for pair in pairs[:_SHOWN]]}
    places = {
        "A discards what is closer": _distance(PRESETS["A"]["threshold"], "similarity"),
        "B discards what is closer, C what is further apart": PRESETS["B"]["threshold"],
        "the recipe's threshold": _distance(score.now, config.space),
        "the proposed threshold": _distance(score.proposed, config.space),
    }
    for name, distance in sorted(places.items(), key=lambda item: item[1]):
        near = sorted(pairs, key=lambda pair: abs(pair.distance - distance))[:_SHOWN]
        near.sort(key=lambda pair: pair.distance)
        yield {"name": f"Near distance {distance:.3g}: {name}", "pairs": [_shown(pair) for pair in near]}
    yield {"name": "The most unlike", "pairs": [_shown(pair) for pair in pairs[-_SHOWN:]]}


def _distance(threshold: float, space: str) -> float:
    return threshold if space == "distance" else 1 - threshold


def _shown(pair: Pair) -> dict[str, Any]:
    return {
        "document": pair.document,
        "numbers": pair.numbers,
        "distance": pair.distance,
        "sources": [data_uri(picture) for picture in pair.pictures],
        "verdicts": {name: _discards(rule, pair.distance) for name, rule in PRESETS.items()},
    }


def _discards(rule: dict[str, Any], distance: float) -> bool:
    value = distance if rule["space"] == "distance" else 1 - distance
    return bool(value > rule["threshold"] if rule["discard"] == "above" else value < rule["threshold"])
