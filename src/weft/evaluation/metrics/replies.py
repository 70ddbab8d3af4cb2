"""Reading what a judge wrote: one score, a pair of scores, or which of two outputs is better.

A judge that reasons first names other numbers on the way, so the first digit of a reply says nothing. Rules are tried
in order, and the first that finds something decides, even if what it finds cannot be a score:

    score line   the last `Score: N` or `Score = N`, bold or not, `N/5` or `N out of 5` included
    json         an object with the key `score`, fenced or not
    out of       `N/5` or `N out of 5`, said of the whole and not of `3 out of 5 pictures`
    number       the reply is a number and nothing else

A range (`4-5`), another scale (`8/10`), two different answers or a number outside the scale are no score: the reply is
unparsed, which is counted, and never clipped or guessed.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Rule = Literal["score line", "json", "out of", "number"]


@dataclass(frozen=True)
class Scale:
    """Whole numbers from lowest to highest."""

    lowest: int = 0
    highest: int = 5


ZERO_TO_FIVE = Scale()
ZERO_TO_TEN = Scale(0, 10)


@dataclass(frozen=True)
class Reading:
    """`score` is None for a reply that could not be read; `rule` is the one that decided, if any did."""

    score: float | None
    rule: Rule | None


_NUMBER = r"(?P<number>-?[0-9]+(?:[.,][0-9]+)*)"
_SCORE = re.compile(rf"(?<![A-Za-z0-9])score[*_`\s]*[:=\uff1a][*_`\s\[(<\"']*{_NUMBER}", re.IGNORECASE)
_CLOSING = r"[ \t]*[*_`\])>\"']*[ \t]*"
_OF = re.compile(rf"{_CLOSING}(?:/|out[ \t]+of\b|of\b)[ \t]*[*_`]*(?P<whole>[0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)
_ANOTHER = re.compile(
    rf"{_CLOSING}(?:(?:[-=]>|[-\u2010-\u2015\u2212\u2192\u21d2~,;&±+|\\]|\.\.+|(?:to|through|or|and|vs)\b)?"
    r"[ \t]*[*_`\[(]*[0-9]|\((?:revised|corrected|updated|changed|originally|previously|was|now)\b)",
    re.IGNORECASE,
)
_WHOLE = re.compile(
    rf"{_CLOSING}(?P<what>[a-z]+[ \t]+)?\(?(?:out[ \t]+of\b|on[ \t]+a[ \t]+scale\b)[^0-9\n]*"
    r"(?:[0-9]+[ \t]*(?:[-\u2010-\u2015\u2212]|to\b)[ \t]*)?(?P<whole>[0-9]+)",
    re.IGNORECASE,
)
"""Another way to name the scale: `5 points out of 10`, `3 on a scale from 0 to 5`."""
_UNITS = {"", "point", "points", "star", "stars", "mark", "marks"}
_SUPPOSED_AFTER = re.compile(
    rf"{_CLOSING}(?:means?|would|could|should|might|is|indicates?|denotes?|represents?|requires?|stands|corresponds|if)\b",
    re.IGNORECASE,
)
_SUPPOSED_BEFORE = re.compile(
    r"(?:\bnot|n['\u2019]t(?: \w+)?|\bnever|\bthan|\binstead of|\bif)(?: an?| the)?[ *_`\"']*$", re.I
)
_SHARE = re.compile(
    r"(?<![\w./,-])(?P<number>-?[0-9]+(?:[.,][0-9]+)*)[*_`]*[ \t]*(?:/|out[ \t]+of\b)[ \t]*[*_`]*(?P<whole>[0-9]+)"
    r"(?![0-9/])(?!\.[0-9])[*_`]*"
    r"(?=[ \t]*(?:$|[.,;:!?)\]}\"'\n\r|\u2013\u2014-]"
    r"|(?:stars?|points?|for|because|since|as|overall|due|given|here)\b))",
    re.IGNORECASE,
)
_SHARES = re.compile(
    r"[0-9][*_` \t]*(?:/|out[ \t]+of\b)[*_` \t]*[0-9]+[*_` \t]*(?:,|&|(?:and|or|to|then|vs)\b)[*_` \t]*"
    r"[0-9.]+[*_` \t]*(?:/|out[ \t]+of\b)",
    re.IGNORECASE,
)
"""Two of them beside each other."""
_SCALES = {"max", "maximum", "max_score", "out_of", "scale"}
"""Keys by which an object may tell another scale."""


def read_score(reply: str, scale: Scale = ZERO_TO_FIVE, *, decimals: bool = False) -> Reading:
    """The score that a reply gives.

    Args:
        decimals: accept `3.5` too, which a mean of several samples is.
    """
    objects = list(_scored_objects(reply))
    finders: tuple[tuple[Rule, Callable[[], list[str | None]]], ...] = (
        ("score line", lambda: _score_lines(_without(reply, objects), scale)[-1:]),
        ("json", lambda: [_json_number(value, scale) for _, _, value in objects]),
        ("out of", lambda: _shares(reply, scale)),
        ("number", lambda: [m[0] for m in [re.fullmatch(_NUMBER, reply.strip(" \t\r\n*_`\"'()[]."))] if m]),
    )
    for rule, find in finders:
        found = find()
        if found:
            scores = {_on(scale, number, decimals) for number in found}
            return Reading(scores.pop() if len(scores) == 1 else None, rule)
    return Reading(None, None)


def read_score_of(title: str, reply: str, scale: Scale = ZERO_TO_FIVE, *, decimals: bool = False) -> Reading:
    """The score of one aspect, in a reply that scores several: its last `Score (Title): N`, and nothing else."""
    named = re.compile(rf"(?<![A-Za-z0-9])score[*_` \t]*\([*_` \t]*{re.escape(title)}[*_` \t]*\)", re.IGNORECASE)
    lines = [named.sub("Score", line) for line in reply.splitlines() if named.search(line)]
    numbers = _score_lines("\n".join(lines), scale)
    return Reading(_on(scale, numbers[-1], decimals), "score line") if numbers else Reading(None, None)


def _score_lines(text: str, scale: Scale) -> list[str | None]:
    """Numbers of the score lines, None for one that says no single number of this scale; suppositions left out."""
    numbers: list[str | None] = []
    for match in _SCORE.finditer(text):
        before, after = text[: match.start()], text[match.end() :]
        if _SUPPOSED_AFTER.match(after) or _SUPPOSED_BEFORE.search(before):
            continue
        whole = _OF.match(after)
        elsewhere = whole is not None and float(whole["whole"]) != scale.highest
        rest = after[whole.end() :] if whole else after
        named = None if whole else _WHOLE.match(after)
        if named is not None:
            is_of_all = (named["what"] or "").strip().lower() in _UNITS
            elsewhere = not is_of_all or float(named["whole"]) != scale.highest
            rest = after[named.end() :]
        unclear = rest[:1].isalnum() or rest.lstrip()[:1] == "%" or rest[:1] in ("+", "/") or _ANOTHER.match(rest)
        numbers.append(None if elsewhere or unclear else match["number"])
    return numbers


def _shares(reply: str, scale: Scale) -> list[str | None]:
    if _SHARES.search(reply):
        return [None]
    return [match["number"] for match in _SHARE.finditer(reply) if int(match["whole"]) == scale.highest]


def _scored_objects(reply: str) -> Iterator[tuple[int, int, Any]]:
    """(start, end, score) of the outermost JSON objects with such a key."""
    decoder, at = json.JSONDecoder(), 0
    while (at := reply.find("{", at)) >= 0:
        try:
            found, end = decoder.raw_decode(reply, at)
        except (json.JSONDecodeError, RecursionError):
            at += 1
            continue
        lower = {str(key).lower(): value for key, value in found.items()}
        if "score" in lower:
            yield at, end, lower
            at = end
        else:
            at += 1


def _json_number(found: dict[str, Any], scale: Scale) -> str | None:
    if any(found[key] != scale.highest for key in _SCALES & set(found)):
        return None
    score = found["score"]
    if isinstance(score, str):
        whole = re.fullmatch(rf"{_NUMBER}(?:\s*(?:/|out of)\s*{scale.highest})?", score.strip())
        return whole["number"] if whole else None
    return None if isinstance(score, bool) or not isinstance(score, int | float) else repr(score)


def _without(reply: str, objects: Sequence[tuple[int, int, Any]]) -> str:
    for start, end, _ in reversed(objects):
        reply = f"{reply[:start]}\n{reply[end:]}"
    return reply


def _on(scale: Scale, number: str | None, decimals: bool) -> float | None:
    form = r"-?(0|[1-9][0-9]*)" + (r"(\.[0-9]+)?" if decimals else "")
    if number is None or not re.fullmatch(form, number):
        return None
    value = float(number) + 0.0  # no -0
    return value if scale.lowest <= value <= scale.highest else None


def read_pair(reply: str) -> tuple[float, float] | None:
    """The two numbers of a first line that holds nothing else, as judges of two answers were once told to write."""
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(word) for word in words)
    except ValueError:
        return None
    return first, second


Verdict = Literal["A", "B", "Tie(A)", "Tie(B)", "Tie"]
"""Which of two outputs is better, as they were shown; a tie may lean."""

_SIDE = (
    r"(?:an?[ \t]+(?=tie\b))?(?P<{0}>tie[ \t]*(?:\([ \t]*[AB][ \t]*\)|[AB]\b)?"
    r"|(?:(?:model|output|answer|response|assistant)[ \t_]*)?[AB]\b"
    r"(?![ \t]*(?:/|,|&|or\b|and\b)[ \t]*(?:(?:model|output|answer|response|assistant)[ \t_]*)?[AB]\b))"
)
_VERDICTS = (
    re.compile(rf"\[\[[ \t]*{_SIDE.format('side')}[ \t]*\]\]", re.IGNORECASE),
    re.compile(rf"\b(?:verdict|winner|better|choice|preference)[*_` \t]*[:=][*_` \t]*{_SIDE.format('side')}", re.I),
    re.compile(rf"^[*_` \t]*{_SIDE.format('side')}(?:[*_` \t]+(?:is better|wins))?[*_`. \t]*$", re.I | re.M),
)


def read_verdict(reply: str) -> Verdict | None:
    """`A`, `B` or a tie: in double brackets, after a word like `Winner:`, or on a line of its own; the last one counts.

    None where nothing of the kind is there: a letter at the start of a sentence is an article as often as a verdict.
    """
    for pattern in _VERDICTS:
        found = [match["side"] for match in pattern.finditer(reply)]
        if found:
            side = found[-1].upper()
            letter = re.sub(r"[^AB]", "", side[3:] if side.startswith("TIE") else side[-1:])
            if side.startswith("TIE"):
                return "Tie(A)" if letter == "A" else "Tie(B)" if letter == "B" else "Tie"
            return "A" if letter == "A" else "B"
    return None


def in_both_orders(shown: Verdict, swapped: Verdict) -> Verdict:
    """One verdict from two: of (A, B) as they are, and of the same two with their places, and so letters, exchanged.

    What both say stands; A twice, once as a tie that leans, is a tie that leans; a verdict that flips is a tie.
    """
    other: Verdict = _EXCHANGED[swapped]
    if shown == other:
        return shown
    if {shown, other} == {"A", "Tie(A)"}:
        return "Tie(A)"
    return "Tie(B)" if {shown, other} == {"B", "Tie(B)"} else "Tie"


_EXCHANGED: dict[Verdict, Verdict] = {"A": "B", "B": "A", "Tie(A)": "Tie(B)", "Tie(B)": "Tie(A)", "Tie": "Tie"}
