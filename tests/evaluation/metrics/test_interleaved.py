"""Judged illustrated answers: what is judged, what scores the lowest by rule, and how figures are averaged."""

import json
from pathlib import Path

import pytest

from weft.evaluation.metrics.interleaved import Battle, Given, overall, treatment, win_rates

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "interleavedeval_tables"
ABOUT = {"text": ("text",), "perception": ("image",), "coherence": ("image",), "both": ("text", "image"), "help": ()}
STORY, EDIT, REPORT = ("text", "image"), ("image",), ("text",)


@pytest.mark.skipif(not DATA.is_dir(), reason="the known answers are not here")
def test_published_tables():
    tables = json.loads((DATA / "tables.json").read_text())
    assert [round(overall(row[1:6]), 2) for row in tables["interleavedbench_full_gpt4o_0_5"]] == [
        row[6] for row in tables["interleavedbench_full_gpt4o_0_5"]
    ]
    apart = [abs(round(overall(row[1:6]), 2) - row[6]) for row in tables["human_0_3"]]
    # One row was averaged before it was rounded.
    assert sorted(round(each, 2) for each in apart) == [0, 0, 0, 0.01]


def treatments(asked, given, single_image="ask"):
    return [
        treatment(about, asked, given, compares=name == "coherence", single_image=single_image)
        for name, about in ABOUT.items()
    ]


def test_missing_modalities():
    judge, zero, none = "judge", "by_rule", "not_applicable"
    whole = Given(text=True, images=2, input_images=1)
    assert treatments(STORY, whole) == [judge] * 5
    assert treatments(STORY, Given(False, 2, 1)) == [zero, judge, judge, zero, judge]
    assert treatments(STORY, Given(True, 0, 1)) == [judge, zero, zero, zero, judge]
    assert treatments(STORY, Given(False, 0, 1)) == [zero] * 5
    assert treatments(EDIT, whole) == [none, judge, judge, none, judge]
    assert treatments(EDIT, Given(True, 0, 1)) == [none, zero, zero, none, judge]
    assert treatments(EDIT, Given(False, 0, 1)) == [none, zero, zero, none, zero]
    assert treatments(REPORT, Given(True, 0, 0)) == [judge, none, none, none, judge]


def test_a_single_picture_is_asked_about_unless_said_otherwise():
    given = Given(text=True, images=1, input_images=0)
    assert treatments(STORY, given)[2] == "judge"
    assert treatments(STORY, given, "not_applicable") == ["judge", "judge", "not_applicable", "judge", "judge"]
    assert treatments(STORY, Given(True, 1, 1), "not_applicable")[2] == "judge"
    assert treatments(STORY, Given(True, 2, 0), "not_applicable")[2] == "judge"


def test_openings_table_rounds_before_it_averages():
    means = [17 / 3, *[23 / 3] * 6]
    assert overall(means, digits=2) == pytest.approx((5.67 + 6 * 7.67) / 7, abs=1e-12)
    assert overall(means) == pytest.approx((17 + 6 * 23) / 21, abs=1e-12)


def test_win_rates_by_what_a_tie_is_worth():
    battles = [Battle("x", "y", "A"), Battle("y", "x", "Tie(B)"), Battle("x", "y", "Tie(B)"), Battle("x", "y", "Tie")]
    assert win_rates(battles, "without") == {"x": 1.0, "y": 0.0}
    assert win_rates(battles, "zero") == {"x": 0.25, "y": 0.0}
    assert win_rates(battles, "half") == {"x": 0.625, "y": 0.375}
    # Tie(B) of (y, x) leans to x, that of (x, y) to y, and the last to nobody.
    assert win_rates(battles, "forced") == {"x": 0.625, "y": 0.375}
    assert win_rates(battles[1:2], "forced") == {"y": 0.0, "x": 1.0}
    assert win_rates(battles[3:], "without") == {}
