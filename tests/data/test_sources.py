"""Every source reads its records, and every damaged record costs itself, by name."""

import pytest

from tests.data.records.reading import CASES, drops, kept, read

DAMAGES = [(name, damage) for name, case in CASES.items() for damage in case.damages]


@pytest.mark.parametrize("name", CASES)
def test_valid_records_are_the_documents_they_should_be(name, tmp_path):
    case = CASES[name]
    case.lay(tmp_path, [case.record(n) for n in range(1, 6)])
    items = read(case, tmp_path)
    assert kept(items) == [case.document(n) for n in range(1, 6)]
    assert not [each for each in drops(items) if each[0] != "text"]


@pytest.mark.parametrize("name", CASES)
def test_every_source_has_ten_kinds_of_damage(name):
    kind = CASES[name].kind
    assert sum(len(case.damages) for case in CASES.values() if case.kind == kind) >= 10


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_a_damaged_record_costs_itself_and_says_why(name, damage, tmp_path):
    case, wrong = CASES[name], CASES[name].damages[damage]
    numbers = [1, 2] if wrong.last else [1, 2, 3]
    records = [wrong.change(case.record(n)) if n == 2 else case.record(n) for n in numbers]
    case.lay(tmp_path, records)
    items = read(case, tmp_path, **({} if wrong.costs == "record" else {"on_bad_image": "image"}))
    usual = drops(items[:1])
    whole = [case.document(n) for n in numbers if n != 2]
    if wrong.costs == "record":
        assert kept(items) == whole
        assert drops(items) == [*usual, ("record", wrong.reason), *(usual if not wrong.last else [])]
    else:
        found = kept(items)
        assert len(found) == 3
        assert [each for each in found if each in whole] == whole
        assert sorted(drops(items)) == sorted([*usual * 3, (wrong.costs, wrong.reason)])
    loss = next(d.loss for item in items for d in item.drops if d.loss.reason == wrong.reason)
    assert loss.message
