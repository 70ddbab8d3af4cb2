"""Tables of judged illustrated answers: what is judged, what scores nought by rule, and how figures are averaged."""

import json
import math
from pathlib import Path

import pytest

from weft.errors import UsageError
from weft.evaluation.metrics.interleaved import (
    ASPECTS,
    OPENING_CRITERIA,
    Asked,
    AspectScore,
    Battle,
    Given,
    MissingRules,
    opening_row,
    overall,
    summarise,
    treatment,
    win_rates,
)

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "interleavedeval_tables"
STORY, EDIT = Asked(text=True, images=True), Asked(text=False, images=True)


@pytest.mark.skipif(not DATA.is_dir(), reason="the known answers are not here")
def test_published_tables():
    tables = json.loads((DATA / "tables.json").read_text())
    assert [overall(row[1:6]) for row in tables["interleavedbench_full_gpt4o_0_5"]] == [
        row[6] for row in tables["interleavedbench_full_gpt4o_0_5"]
    ]
    apart = [abs(overall(row[1:6]) - row[6]) for row in tables["human_0_3"]]
    # One row was averaged before it was rounded.
    assert sorted(round(each, 2) for each in apart) == [0, 0, 0, 0.01]


def treatments(asked, given, rules=MissingRules()):  # noqa: B008
    return [treatment(aspect, asked, given, rules) for aspect in ASPECTS]


def test_missing_modalities():
    judge, zero, none = "judge", "zero", "not applicable"
    whole = Given(text=True, images=2, input_images=1)
    assert treatments(STORY, whole) == [judge] * 5
    assert treatments(STORY, Given(False, 2, 1)) == [zero, judge, judge, zero, judge]
    assert treatments(STORY, Given(True, 0, 1)) == [judge, zero, zero, zero, judge]
    assert treatments(STORY, Given(False, 0, 1)) == [zero] * 5
    assert treatments(EDIT, whole) == [none, judge, judge, none, judge]
    assert treatments(EDIT, Given(True, 0, 1)) == [none, zero, zero, none, judge]
    assert treatments(EDIT, Given(False, 0, 1)) == [none, zero, zero, none, zero]


def test_where_papers_disagree_there_is_a_switch():
    compose = Asked(text=False, images=True, composition=True)
    given = Given(text=True, images=1, input_images=0)
    assert treatments(compose, given)[0] == "not applicable"
    assert treatments(compose, given, MissingRules(composition_text="judge"))[0] == "judge"
    assert treatments(EDIT, given, MissingRules(composition_text="judge"))[0] == "not applicable"
    assert treatments(STORY, given)[2] == "judge"
    assert treatments(STORY, given, MissingRules(single_image="not applicable"))[2] == "not applicable"
    alone_after_input = Given(text=True, images=1, input_images=1)
    assert treatments(STORY, alone_after_input, MissingRules(single_image="not applicable"))[2] == "judge"


def judged(id, task, aspect, score, how="judged"):
    return AspectScore(id, task, aspect, how, score)


def test_an_aspect_is_the_mean_over_instances_and_the_overall_one_of_the_five():
    scores = [judged(f"{aspect}", "story", aspect, 4.0) for aspect in ASPECTS[1:]]
    scores += [judged("1", "story", ASPECTS[0], 3.0), judged("2", "story", ASPECTS[0], 5.0)]
    scores += [
        judged("3", "report", ASPECTS[0], 0.0, "by rule"),
        judged("4", "edit", ASPECTS[0], None, "not applicable"),
    ]
    summary = summarise(scores)
    text = summary.aspects["text_quality"]
    assert text.mean == pytest.approx(8 / 3)
    assert text.mean_of_tasks == 2.0 and text.tasks == {"story": 4.0, "report": 0.0}
    assert (text.n, text.by_rule, text.unparsed, text.not_applicable) == (3, 1, 0, 1)
    assert summary.overall == pytest.approx((8 / 3 + 16) / 5)
    assert summary.valid


def test_unread_replies_are_left_out_and_more_than_one_in_a_hundred_are_too_many():
    def summary(unparsed):
        hows = ["unparsed"] * unparsed + ["judged"] * (100 - unparsed)
        values = [None] * unparsed + [2.0] * (100 - unparsed)
        rows = zip(hows, values, strict=True)
        return summarise([judged(str(i), "t", ASPECTS[0], value, how) for i, (how, value) in enumerate(rows)])

    one, two = summary(1), summary(2)
    assert one.aspects["text_quality"].mean == 2.0 and one.aspects["text_quality"].unparsed == 1
    assert (one.valid, two.valid) == (True, False)
    assert math.isnan(one.overall), "four aspects have no instance"


def test_scores_that_contradict_themselves_are_refused():
    with pytest.raises(UsageError, match="scored twice"):
        summarise([judged("1", "t", ASPECTS[0], 1.0)] * 2)
    with pytest.raises(UsageError, match="smell"):
        summarise([judged("1", "t", "smell", 1.0)])
    with pytest.raises(UsageError, match="unparsed"):
        judged("1", "t", ASPECTS[0], 1.0, "unparsed")
    with pytest.raises(UsageError, match="judged"):
        judged("1", "t", ASPECTS[0], None)


def test_openings_table_rounds_before_it_averages():
    instances = [
        dict.fromkeys(OPENING_CRITERIA, 7),
        dict.fromkeys(OPENING_CRITERIA, 8),
        dict.fromkeys(OPENING_CRITERIA, 8),
    ]
    instances[0] = instances[0] | {OPENING_CRITERIA[0]: 1}
    row = opening_row([*instances, instances[0] | {OPENING_CRITERIA[3]: None}])
    assert row.criteria[OPENING_CRITERIA[0]] == 5.67 and row.criteria[OPENING_CRITERIA[1]] == 7.67
    assert row.overall == round((5.67 + 6 * 7.67) / 7, 2)
    assert (row.n, row.unparsed) == (3, 1)


def test_win_rates_by_what_a_tie_is_worth():
    battles = [Battle("x", "y", "A"), Battle("y", "x", "Tie(B)"), Battle("x", "y", "Tie(B)"), Battle("x", "y", "Tie")]
    assert win_rates(battles, "without") == {"x": 1.0, "y": 0.0}
    assert win_rates(battles, "zero") == {"x": 0.25, "y": 0.0}
    assert win_rates(battles, "half") == {"x": 0.625, "y": 0.375}
    # Tie(B) of (y, x) leans to x, that of (x, y) to y, and the last to nobody.
    assert win_rates(battles, "forced") == {"x": 0.625, "y": 0.375}
    assert win_rates(battles[1:2], "forced") == {"y": 0.0, "x": 1.0}
    assert win_rates(battles[3:], "without") == {}
