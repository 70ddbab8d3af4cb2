"""MM-Vet: reading grades, and means for each capability."""

import pytest

from weft.errors import UsageError
from weft.evaluation.metrics.mm_vet import TRIES, Grade, grade, mm_vet, over_runs, points, read_grade


@pytest.mark.parametrize(
    "reply, value",
    [
        ("0.7", 0.7),
        ("1", 1.0),
        ("0.0 since", 0.0),
        ("1.5", None),
        ("-1", None),
        ("good", None),
        ("", None),
        ("nan", None),
    ],
)
def test_a_grade_is_the_first_word(reply, value):
    assert read_grade(reply) == value


def test_a_grader_is_asked_five_times_and_then_the_grade_is_nought():
    attempts = []
    assert grade(lambda attempt: attempts.append(attempt) or "0.5") == Grade(0.5, by_default=False)
    assert grade(lambda attempt: attempts.append(attempt) or "?") == Grade(0.0, by_default=True)
    assert attempts == [0, *range(TRIES)]


def test_means_in_total_and_for_capabilities():
    grades = [Grade(1.0, False), Grade(0.5, False), Grade(0.0, True)]
    run = mm_vet(grades, [["rec"], ["rec", "ocr"], ["ocr", "rec"]])
    assert points(run.total) == 50.0
    assert run.capabilities["rec"].value == 0.5 and run.capabilities["ocr"].value == 0.25
    assert "math" not in run.capabilities
    assert run.sets[frozenset({"rec", "ocr"})].value == 0.25
    assert run.by_default == 1


def test_runs_have_a_mean_and_a_spread():
    runs = [mm_vet([Grade(value, False)], [["rec"]]) for value in (0.4, 0.6)]
    assert over_runs(runs) == pytest.approx((0.5, 0.1))


@pytest.mark.parametrize("needed", [[], ["smell"]])
def test_an_unknown_capability_is_refused(needed):
    with pytest.raises(UsageError):
        mm_vet([Grade(1.0, False)], [needed])
