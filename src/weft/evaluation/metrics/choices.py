"""Multiple choice: which option does a reply name? Parsers differ by up to four points on the same replies.

    mcq/mmmu       Yue et al. 2023, arXiv:2311.16502: always an answer, drawn where none is found; open questions too
    mcq/circular   MMBench, Liu et al. 2023, arXiv:2307.06281: the options rotated, right only if right every time;
                   letters by VLMEvalKit's rules without a judge
    mcq/prefix     the reply begins with the letter

The slips of the reference parsers are kept: published numbers have them.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from weft.errors import UsageError
from weft.evaluation.metrics.scores import Scores, mean_of, same_length

Options = Mapping[str, str]
"""Letter -> text, in the order of the question."""


@dataclass(frozen=True)
class Choice:
    letter: str
    random: bool
    """No option was found: the letter was drawn."""


def parse_choice(reply: str, options: Options, draw: random.Random) -> Choice:
    """MMMU's: `(A)`; else `A` as a word; else an option's text in a reply of over five words. The last one counts."""
    for mark in ",.!?;:'":
        # One after another, so `A,.` keeps its comma.
        reply = reply.strip(mark)
    reply = f" {reply} "
    lower = reply.lower()
    bracketed = {letter: reply.rfind(f"({letter})") for letter in options}
    alone = {letter: reply.rfind(f" {letter} ") for letter in options}
    spelled = {letter: lower.rfind(text.lower()) for letter, text in options.items()}
    for places in (bracketed, alone, *([spelled] if len(reply.split()) > 5 else [])):
        if max(places.values()) >= 0:
            return Choice(max(places, key=lambda letter: places[letter]), random=False)
    return Choice(draw.choice(list(options)), random=True)


Answer = str | float


def parse_open(reply: str) -> set[Answer]:
    """MMMU's: the ends of lines after words like `is` or `answer`, and every number in them; else the whole reply."""
    found = []
    reply = reply.strip().strip(".").lower()
    # Sentences too were meant, but their capital letters are gone by now.
    lines = reply.split("\n")
    signs = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    for i, line in enumerate(lines):
        last = ["="] if i == len(lines) - 1 else []
        ends = [line.split(sign)[-1].strip() for sign in (*signs, *last) if sign in line]
        # An empty end does not stand in the way of a longer one that comes after it.
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    found = found or [reply]
    return {answer for text in (*found, *_numbers(found)) for answer in normalise_open(text)}


_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""With commas, scientific, plain."""


def _numbers(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for pattern in _NUMBERS:
            yield from pattern.findall(text)


def normalise_open(text: str) -> list[Answer]:
    """A number rounded to two decimals, or the text in lower case; a letter is padded, so that words do not hold it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def open_is_right(found: set[Answer], answers: Sequence[str]) -> bool:
    """A number is equal, or an answer's text is in something found."""
    wanted = [answer for text in answers for answer in normalise_open(text)]
    numbers = {answer for answer in wanted if isinstance(answer, float)}
    texts = [answer for answer in wanted if isinstance(answer, str)]
    return any(any(text in each for text in texts) if isinstance(each, str) else each in numbers for each in found)


@dataclass(frozen=True)
class Question:
    """Of MMMU: `options` is empty for an open question; any of `answers` is right."""

    options: Options
    answers: tuple[str, ...]


@dataclass(frozen=True)
class MMMU:
    accuracy: Scores
    """Over questions, drawn answers included."""
    predictions: tuple[Choice | frozenset[Answer], ...]

    @property
    def drawn(self) -> int:
        """Questions answered at random for want of an option in the reply."""
        return sum(isinstance(p, Choice) and p.random for p in self.predictions)

    @property
    def without_drawn(self) -> Scores:
        """The same with drawn answers counted as wrong."""
        pairs = zip(self.accuracy.per_sample, self.predictions, strict=True)
        return mean_of([0.0 if isinstance(p, Choice) and p.random else value for value, p in pairs])


def mmmu(replies: Sequence[str], questions: Sequence[Question], *, seed: int = 42) -> MMMU:
    """Accuracy of MMMU. Drawn answers depend on the seed and on the order of the questions."""
    same_length("mmmu", replies=replies, questions=questions)
    draw = random.Random(seed)
    values, predictions = [], []
    for reply, question in zip(replies, questions, strict=True):
        prediction: Choice | frozenset[Answer]
        if question.options:
            prediction = parse_choice(reply, question.options, draw)
            values.append(float(prediction.letter in question.answers))
        else:
            prediction = frozenset(parse_open(reply))
            values.append(float(open_is_right(set(prediction), question.answers)))
        predictions.append(prediction)
    return MMMU(mean_of(values), tuple(predictions))


REFUSED = "Z"
"""What a reply that declines is read as; no option has this letter."""
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED = "Failed to obtain answer via API"
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
"""Without a word's end, as in the reference: `answer is cats` names C."""


def infer_letter(reply: str, options: Options) -> str | None:
    """MMBench's letter by rules alone: an option's letter, `REFUSED`, or None where nothing can be inferred."""
    return _letter(reply, options) or _by_text(reply, options)


def _letter(reply: str, options: Options) -> str | None:
    if _FAILED in reply:
        return None
    if any(refusal in reply for refusal in _REFUSALS):
        return REFUSED
    words = reply.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    said = _ANSWER_IS.search(reply)
    return said[1].upper() if said and said[1].upper() in options else None


def _by_text(reply: str, options: Options) -> str | None:
    if len(reply.lower()) > 2 * sum(len(text) for text in options.values()):
        return None
    named = [letter for letter, text in options.items() if text.lower() in reply.lower()]
    return named[0] if len(named) == 1 else None


def prefix_letter(reply: str, options: Options) -> str | None:
    """The letter that a reply begins with, in brackets or not, and with no further letter or digit after it."""
    found = re.match(r"\s*\(?([A-Z])(?![A-Za-z0-9])", reply)
    return found[1] if found and found[1] in options else None


ROTATIONS = 1_000_000
"""Rows of one question share their index modulo this."""


@dataclass(frozen=True)
class Row:
    """One rotation of a question's options."""

    index: int
    options: Options
    answer: str


@dataclass(frozen=True)
class Circular:
    circular: Scores
    """Over questions, by rising number: right under every rotation."""
    questions: tuple[int, ...]
    rows: Scores
    """Over rows."""
    first: Scores
    """Over the rows whose index is the question's own: as if options had not been rotated."""
    letters: tuple[str | None, ...]

    @property
    def unparsed(self) -> int:
        return sum(letter is None for letter in self.letters)


def mmbench(replies: Sequence[str], rows: Sequence[Row]) -> Circular:
    """Circular accuracy of MMBench by exact matching: a letter that cannot be inferred is wrong."""
    same_length("mmbench", replies=replies, rows=rows)
    indices = [row.index for row in rows]
    if len(set(indices)) < len(indices):
        twice = next(index for index in indices if indices.count(index) > 1)
        raise UsageError(f"row {twice} is there twice", where="mmbench", fix="give each rotation of a question once")
    letters = [infer_letter(reply, row.options) for reply, row in zip(replies, rows, strict=True)]
    right = [float(letter == row.answer) for letter, row in zip(letters, rows, strict=True)]
    questions: dict[int, list[float]] = {}
    for row, hit in sorted(zip(rows, right, strict=True), key=lambda pair: pair[0].index % ROTATIONS):
        questions.setdefault(row.index % ROTATIONS, []).append(hit)
    return Circular(
        circular=mean_of([min(hits) for hits in questions.values()]),
        questions=tuple(questions),
        rows=mean_of(right),
        first=mean_of([hit for row, hit in zip(rows, right, strict=True) if row.index < ROTATIONS]),
        letters=tuple(letters),
    )
