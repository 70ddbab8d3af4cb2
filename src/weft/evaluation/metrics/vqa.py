"""Answers to questions about pictures: the accuracies of VQAv2, VizWiz and GQA, and answers cut out of sentences.

VQAv2 (Goyal et al. 2017, arXiv:1612.00837) also scores OK-VQA and TextVQA: ten people answered, and an answer is as
right as a third of those who agree with it, at most 1, averaged over the sets of nine. What an evaluator does to the
strings before it compares them decides several points; its slips are kept, because all published numbers have them.

    vqa/v2       both sides are normalised, unless all ten answers are the same string
    vqa/vizwiz   only the prediction is; with typographic apostrophes in most contractions
    vqa/gqa      equal after lower case and strip
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from weft.errors import UsageError
from weft.evaluation.metrics.scores import Scores, mean_of, same_length

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
FULL_STOPS = 32
"""So many are removed: the reference passes a flag, whose value this is, in the place of the count."""

_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_MORE_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at
"""


def _contractions() -> dict[str, str]:
    """Words that lack one apostrophe -> with it. Two are not mended, and one entry is the wrong way round."""
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()} | {"somebody'd": "somebodyd"}
    for word in _MORE_APOSTROPHES.split():
        table |= {word[:i] + word[i + 1 :]: word for i, letter in enumerate(word) if letter == "'"}
    return table


CONTRACTIONS = _contractions()
CURLY_CONTRACTIONS = {
    missing.replace("'", "\u2019") if missing not in ("couldn'tve", "hadn'tve") else missing: (
        whole if whole in ("ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've")
        else whole.replace("'", "\u2019")
    )
    for missing, whole in CONTRACTIONS.items()
}  # fmt: skip
"""VizWiz's: typographic apostrophes in all but a few entries."""

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def vqa_accuracy(
    predictions: Sequence[str],
    annotations: Sequence[Sequence[str | Mapping[str, Any]]],
    *,
    identify: bool = True,
) -> Scores:
    """Accuracy of VQAv2, 0 to 1 per question; tables multiply by 100.

    Args:
        predictions: one answer per question.
        annotations: the people's answers to each question: strings, or records with the key `answer`.
        identify: leave out exactly one person at a time. False: leave out all records equal to that person's, as the
            released evaluator does on files whose records hold no `answer_id`; equal answers then vanish together.
    """
    same_length("vqa_accuracy", predictions=predictions, annotations=annotations)
    return mean_of([_accuracy(*pair, identify) for pair in zip(predictions, annotations, strict=True)])


def _accuracy(prediction: str, people: Sequence[str | Mapping[str, Any]], identify: bool) -> float:
    records = [dict(p) if isinstance(p, Mapping) else {"answer": p} for p in _somebody(people)]
    if identify:
        records = [{"answer_id": i} | record for i, record in enumerate(records, start=1)]
    prediction = _one_line(prediction)
    for record in records:
        record["answer"] = _one_line(record["answer"])
    if len({record["answer"] for record in records}) > 1:
        prediction = normalise(prediction)
        for record in records:
            record["answer"] = normalise(record["answer"])
    agreed = 0.0
    for left_out in records:
        matches = sum(record["answer"] == prediction for record in records if record != left_out)
        agreed += min(1.0, matches / 3)
    return agreed / len(records)


def vizwiz_accuracy(predictions: Sequence[str], annotations: Sequence[Sequence[str]]) -> Scores:
    """Accuracy of VizWiz, 0 to 1 per question: the prediction is normalised, the people's answers never are."""
    same_length("vizwiz_accuracy", predictions=predictions, annotations=annotations)
    values = []
    for prediction, people in zip(predictions, annotations, strict=True):
        said = normalise(_one_line(prediction), CURLY_CONTRACTIONS)
        matches = [answer == said for answer in _somebody(people)]
        values.append(sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches))
    return mean_of(values)


def gqa_accuracy(predictions: Sequence[str], answers: Sequence[str]) -> Scores:
    """Share of answers that are equal after lower case and strip."""
    same_length("gqa_accuracy", predictions=predictions, answers=answers)
    pairs = zip(predictions, answers, strict=True)
    return mean_of([float(said.strip().lower() == answer.strip().lower()) for said, answer in pairs])


def by_group(scores: Scores, groups: Sequence[str]) -> dict[str, Scores]:
    """The same scores for each group of samples (type of answer, type of question), in order of appearance."""
    same_length("by_group", scores=scores.per_sample, groups=groups)
    members: dict[str, list[float]] = {}
    for value, group in zip(scores.per_sample, groups, strict=True):
        members.setdefault(group, []).append(value)
    return {group: mean_of(values) for group, values in members.items()}


def normalise(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Punctuation, then lower case, number words, articles and contractions."""
    words = (NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        # What decides is the text as it came, not what earlier marks have made of it.
        alone = number or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if alone else " ")
    return _FULL_STOP.sub("", out, count=FULL_STOPS)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _somebody(people: Sequence[Any]) -> Sequence[Any]:
    if isinstance(people, str) or not people:
        raise UsageError(
            f"a question has no list of answers, but {people!r}",
            where="the annotations of a VQA data set",
            fix="give each question the list of what people answered",
        )
    return people


Extraction = Literal["whole", "mm-interleaved"]


def extract_answer(reply: str, extraction: Extraction) -> str:
    """The answer in a reply: `whole` leaves it as it is, `mm-interleaved` cuts as that paper's code does.

    Its cuts are by substring, so `pizza hut` becomes `hut`; they are part of its published numbers.
    """
    if extraction == "whole":
        return reply
    answer = re.split(r"[.,!]", reply.replace('"', "").strip().split("\n")[0])[0].lower()
    for before in ("is ", "are ", "a ", "an ", "the "):
        if before in answer:
            answer = answer.split(before)[1]
    for after in (" of", " or ", " and "):
        answer = answer.split(after)[0]
    return answer.strip()
