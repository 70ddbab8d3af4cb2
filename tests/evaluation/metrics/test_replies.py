"""A judge's reply is read as what it says or not at all."""

import json
import random
from pathlib import Path

import pytest

from weft.evaluation.metrics.replies import (
    ZERO_TO_TEN,
    Reading,
    in_both_orders,
    read_pair,
    read_score,
    read_score_of,
    read_verdict,
)

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "judge_replies"

ASIDES = [
    "The output has 3 images and 2 paragraphs, so 5 parts in all.",
    "Input image 1 shows a dog; output image 4 shows another one.",
    "Only 2 out of 3 pictures match, and about 1/2 of the text repeats.",
    "The first 2 steps (of 7) are right. A 1:1 copy of image 2 follows.",
    "Text: 100 words. Colours are off by 30%, see step 4.5.",
]
READ = {
    "own line": "{aside}\nScore: {n}",
    "with a full stop": "{aside} Score: {n}.",
    "equals": "{aside}\nscore = {n}",
    "bold word": "{aside}\n**Score**: {n}",
    "bold word and colon": "{aside}\n**Score:** {n}",
    "bold number": "{aside}\nScore: **{n}**",
    "of five": "Score: {n}/5\n{aside}",
    "of five, apart": "{aside}\nFinal Score: {n} / 5",
    "out of five": "{aside} Overall score: {n} out of 5.",
    "reason after": "Score: {n}\nReason: {aside}",
    "reason in the same line": "Score: {n} because the style changes. {aside}",
    "said twice, last counts": "Score: {other}\nOn reflection that is wrong.\nScore: {n}",
    "a level is quoted": "Score: {other} would need better pictures. {aside}\nScore: {n}",
    "quoted afterwards": "Score: {n}\nA Score: {other} would need better pictures.",
    "json": '{{"score": {n}, "reason": "{aside}"}}',
    "fenced json": 'Here it is:\n```json\n{{"reason": "{aside}", "Score": {n}}}\n```',
    "json, number as text": '{{"explanation": "{aside}", "score": "{n}"}}',
    "json quotes a score line": '{{"reason": "Score: {other}", "score": {n}}}',
    "nested json": '{{"evaluation": {{"score": {n}, "reason": "{aside}"}}}}',
    "share": "{aside} I rate it {n}/5.",
    "share in words": "I give this {n} out of 5 for coherence. {aside}",
    "number alone": "{n}",
    "bold number alone": " **{n}**\n",
}
"""Shape of a reply whose score is n."""
UNREAD = {
    "prose with numbers": "{aside} {aside}",
    "empty": "",
    "a range": "{aside}\nScore: {n}-{more}",
    "a range in words": "Score: {n} to {more}",
    "two minds": "Score: {n} or {more}",
    "another scale": "{aside}\nScore: {n}/10",
    "another scale in words": "Score: {n} out of 10",
    "outside": "{aside}\nScore: {high}",
    "negative": "Score: -{more}",
    "two digits": "Score: {n}{n}",
    "decimal": "{aside}\nScore: {n}.5",
    "decimal comma": "Score: {n},5",
    "decimal share": "I rate it {n}.5/5.",
    "percent": "Score: {n}0%",
    "in letters": "{aside}\nScore: four",
    "the form, not filled in": "Score: N",
    "a supposition only": "Score: {more} would need another style.",
    "share of the pictures": "{n} out of 5 pictures are sharp. {aside}",
    "two shares": "Text {n}/5, pictures {other}/5.",
    "json without score": '{{"rating": {n}, "reason": "{aside}"}}',
    "json outside": '{{"score": {high}}}',
    "json, two scores": '{{"text": {{"score": {n}}}, "image": {{"score": {other}}}}}',
    "json, no number": '{{"score": null, "n": {n}}}',
    "json, another scale": '{{"score": {n}, "max_score": 10}}',
    "broken json": '{{"score": ',
    "date": "Written on {more}/5/2024. {aside}",
    "refusal": "I'm sorry, I can't judge these {more} images.",
    "stars": "Score: \u2605\u2605\u2605\u2606\u2606",
    "first digit of prose": "{n} images were given. {aside}",
}
"""Shape of a reply that gives no one score on the scale."""


def replies(shapes, count, seed):
    """So many of every shape."""
    draw = random.Random(seed)
    for i in range(count * len(shapes)):
        name = list(shapes)[i % len(shapes)]
        n = draw.randint(0, 5)
        other = draw.choice([k for k in range(6) if k != n])
        words = {"n": n, "other": other, "more": draw.randint(1, 5), "high": draw.randint(6, 99)}
        yield name, shapes[name].format(aside=draw.choice(ASIDES), **words), n


def test_fifty_replies_of_each_shape_are_read_or_unparsed_but_never_misread():
    read = list(replies(READ, 50, seed=0))
    unread = list(replies(UNREAD, 50, seed=1))
    wrong = [(name, text) for name, text, n in read if read_score(text).score != n]
    guessed = [(name, text) for name, text, _ in unread if read_score(text).score is not None]
    assert (wrong, guessed) == ([], [])
    assert min(len(READ), len(UNREAD)) >= 20 and {n for _, _, n in read} == set(range(6))


@pytest.mark.parametrize(
    "reply, rule",
    [("Score: 3", "score line"), ('{"score": 3}', "json"), ("It is 3/5.", "out of"), ("3", "number"), ("no", None)],
)
def test_the_rule_that_decided_is_told(reply, rule):
    assert read_score(reply) == Reading(3.0 if rule else None, rule)


def test_the_first_rule_that_finds_something_decides():
    assert read_score('{"score": 2}\nScore: 4').score == 4
    assert read_score("Score: 9. So 3/5.") == Reading(None, "score line")


def test_the_scale_is_the_callers():
    assert read_score("Score: 8", ZERO_TO_TEN).score == 8
    assert read_score("Score: 8/10", ZERO_TO_TEN).score == 8
    assert read_score("Score: 4/5", ZERO_TO_TEN).score is None


def test_decimals_are_for_means_of_samples_only():
    assert read_score("Score: 3.5").score is None
    assert read_score("Score: 3.5", decimals=True).score == 3.5
    assert read_score("Score: 5.5", decimals=True).score is None


ASPECTS_REPLY = """The text is fine: 5 of 6 lines. Score (Text quality): 4
**Score (Image coherence)**: **2**/5, not a Score (Helpfulness): 5
Score (Perceptual quality): 3, Score (Helpfulness): 1
Score: 0"""


@pytest.mark.parametrize(
    "title, score",
    [
        ("Text quality", 4), ("Image coherence", 2), ("Perceptual quality", 3), ("Helpfulness", 1),
        ("Text-image coherence", None), ("Quality", None), ("text QUALITY", 4),
    ],
)  # fmt: skip
def test_one_of_several_scores_is_the_one_that_is_named(title, score):
    assert read_score_of(title, ASPECTS_REPLY).score == score


@pytest.mark.parametrize("line", ["6", "3-4", "8/10", "3.5", "high", "2 or 3"])
def test_a_named_score_that_is_none_is_not_read(line):
    assert read_score_of("Style", f"Score (Style): {line}").score is None


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("A", "A"), ("B.", "B"), ("**B**", "B"), ("Tie(A)", "Tie(A)"), ("tie (b)", "Tie(B)"), ("Tie", "Tie"),
        ("Reasons.\n[[B]]", "B"), ("Winner: A\nbecause of style", "A"), ("Model A is better.", "A"),
        ("Verdict: tie", "Tie"),
        ("[[A]] no, [[B]]", "B"),
        ("A careful look decides nothing", None), ("Both are good", None), ("", None), ("Better", None),
    ],
)  # fmt: skip
def test_verdicts(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    "shown, swapped, both",
    [
        ("A", "B", "A"), ("B", "A", "B"), ("A", "A", "Tie"), ("B", "B", "Tie"), ("Tie", "Tie", "Tie"),
        ("Tie(A)", "Tie(B)", "Tie(A)"), ("A", "Tie(B)", "Tie(A)"), ("Tie(B)", "A", "Tie(B)"), ("A", "Tie", "Tie"),
        ("Tie(A)", "Tie(A)", "Tie"), ("A", "Tie(A)", "Tie"),
    ],
)  # fmt: skip
def test_a_verdict_that_flips_with_the_order_is_a_tie(shown, swapped, both):
    assert in_both_orders(shown, swapped) == both


@pytest.mark.skipif(not DATA.is_dir(), reason="the known answers are not here")
def test_pairs_on_first_lines_are_those_of_the_known_answers():
    cases = sorted(DATA.glob("*.expected.json"))
    assert cases
    for case in cases:
        expected = json.loads(case.read_text())
        replies = json.loads((DATA / case.name.replace(".expected", "")).read_text())
        pairs = [read_pair(each["reply"]) for each in replies]
        assert [list(pair or (-1, -1)) for pair in pairs] == expected["first_line_parse"]
        stored = expected["stored_scores"]
        assert [sum(column) / len(stored) for column in zip(*stored, strict=True)] == expected["mean_stored"]


def test_a_first_line_with_anything_else_is_no_pair():
    assert read_pair("8 9\nBoth are good") == (8.0, 9.0)
    assert read_pair("8,9.5") == (8.0, 9.5)
    assert [read_pair(text) for text in ("Both: 8 9", "8", "8 9 ", "", "8, 9")] == [None] * 5


@pytest.mark.parametrize(
    "reply, score",
    [
        ("Score: 0|1|2|3|4|5", None), ("Score: 1 2 3 4 5", None), ("Score: 4 5", None), ("Score: 4 -> 3", None),
        ("Score: 4 \u2192 3", None), ("Score: 4 => 3", None), ("Score: 4 (revised: 3)", None),
        ("Score: 4\u22125", None), ("Score: 4\u20115", None), ("Score: 4 through 5", None),
        ("Score: 5 points out of 10", None), ("Score: 3 (out of 10)", None), ("Score: 4 on a scale of 1-10", None),
        ("Score: 4\\10", None), ("4/5 and 3/5", None), ("Score: 2 images out of 5 are bad", None),
        ("Score: 4 points out of 5", 4), ("Score: 4 (out of 5)", 4), ("Score: 4 on a scale of 0 to 5", 4),
        ("Score: 4 because image 2 differs", 4), ("Score: 4 (image 2 is blurry)", 4), ("Score: 4\n5 pictures", 4),
    ],
)  # fmt: skip
def test_what_follows_a_score_on_its_line(reply, score):
    assert read_score(reply).score == score


def test_there_is_no_minus_zero():
    assert str(read_score("Score: -0").score) == "0.0"


@pytest.mark.parametrize(
    "reply, verdict",
    [("Winner: a tie", "Tie"), ("Winner: A or B", None), ("Winner: A/B", None), ("Choice: A and B", None),
     ("Winner: A, because B is bad", "A")],
)  # fmt: skip
def test_a_verdict_names_one_side(reply, verdict):
    assert read_verdict(reply) == verdict
