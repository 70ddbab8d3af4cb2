"""Sentences, words and about how many tokens a text has: by rules, the same on every machine, for no one language."""

import re
from collections.abc import Iterator

_ABBREVIATED = (
    "mr mrs ms dr prof rev gen sen rep st sr jr vs etc e.g i.e cf fig no nos vol pp ca approx inc ltd co corp dept est"
    " jan feb mar apr jun jul aug sep sept oct nov dec u.s u.k a.m p.m ph.d"
)
_ABBREVIATIONS = frozenset(_ABBREVIATED.split())
_CLOSING = "\"'”’»)]"  # noqa: RUF001
_END = re.compile(
    # a run of marks is looked at once, from its first on
    rf"(?<![.!?…])(?P<mark>[.!?…]++)(?P<closing>[{re.escape(_CLOSING)}]*+)(?=\s|$)|[。！？]+[」』”’）]*|\n[^\S\n]*\n"  # noqa: RUF001
)
_MARKS = ".!?…。！？\n"  # noqa: RUF001
"""One of them is in the end of every sentence but a text's last."""
_MARK, _SEEN = re.compile(f"[{_MARKS}]"), re.compile(r"\S")
_LAST_WORD, _LONGEST = re.compile(r"[\w.]*+$"), 8
"""Before a full stop; one of so many characters is no abbreviation."""
_LETTER = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"
"""Of writings without spaces between words."""
_WORD = re.compile(rf"{_LETTER}|(?:(?!{_LETTER})\w)+(?:['’](?!{_LETTER})\w+)?")  # noqa: RUF001


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the space around them. A text that is not blank has at least one."""
    return [piece for start, end in _spans(text) if (piece := text[start:end].strip())]


def most_sentences(text: str) -> int:
    """A number that `sentences` does not exceed, found much faster."""
    return sum(map(text.count, _MARKS)) + (text[-1:] not in _MARKS)


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def tokens(text: str) -> int:
    """About as many as a chat model's tokenizer makes: four bytes of UTF-8 each."""
    return -(-len(text.encode()) // 4)


def cut(text: str, most: int) -> str:
    """The text up to the last end of a sentence that leaves at most `most` tokens; of one long sentence, its words."""
    if tokens(text) <= most:
        return text
    ends = [end for _, end in _spans(text)] or [0]
    fitting = [end for end in ends if tokens(text[:end]) <= most]
    if fitting:
        return text[: fitting[-1]].rstrip()
    room = text.encode()[: 4 * most].decode(errors="ignore")
    return room.rpartition(" ")[0] or room


def _spans(text: str) -> Iterator[tuple[int, int]]:
    start = at = 0
    # a set of characters is found much faster than a choice of patterns
    while mark := _MARK.search(text, at):
        end = _END.match(text, mark.start())
        at = end.end() if end else mark.end()
        if end and _ends(text, start, end):
            yield start, at
            start = at
    if start < len(text):
        yield start, len(text)


def _ends(text: str, start: int, end: re.Match[str]) -> bool:
    mark = end["mark"]
    if mark is None:
        return True
    seen = _SEEN.search(text, end.end())
    follows = seen[0] if seen else ""
    if follows.islower() and (end["closing"] or mark in ("...", "…")):
        return False  # "Really?" she said
    if mark != ".":
        return True
    last = _LAST_WORD.search(text, max(start, end.start() - _LONGEST), end.start())
    word = last[0] if last else ""
    is_initial = len(word) == 1 and word.isupper() and word != "I" and follows.isupper()
    return word.casefold() not in _ABBREVIATIONS and not is_initial
