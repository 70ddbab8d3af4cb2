"""A mapping reads files of an unknown layout; sniffing proposes one that does."""

import json
from collections.abc import Iterable

import pytest
import yaml

from tests.data.corpus import write
from tests.data.records.case import array, lines
from tests.data.records.reading import ADAPTER, CASES
from weft.data.sniff import sniff
from weft.data.sources import SOURCES
from weft.data.sources.mapping import Mapping
from weft.errors import UsageError


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sniffed])
def test_what_is_sniffed_reads_the_file(name, tmp_path):
    case = CASES[name]
    case.lay(tmp_path, [case.record(n) for n in range(1, 6)])
    (file,) = (f for f in tmp_path.iterdir() if f.is_file() and f.suffix not in (".png", ".jpg"))
    found = sniff(file)
    assert found.records == 5
    assert found.mapping is not None
    (recipe,) = yaml.safe_load(found.recipe())["sources"]
    source = ADAPTER.validate_python(recipe)
    assert source == found.mapping
    records = [r for unit in SOURCES["mapping"].plan(source).units for r in SOURCES["mapping"].read(source, unit)]
    assert len(records) == 5
    for n, record in enumerate(records, start=1):
        assert record.losses == ()
        _, wanted = case.document(n)
        pictures = sorted(part for _, parts in wanted for part in parts if isinstance(part, bytes))
        assert sorted(image.data for image in record.document.images) == pictures
        texts = [part for _, parts in wanted for part in parts if isinstance(part, str)]
        assert words_of(texts) <= words_of(text.text for text in record.document.texts)
        assert record.document.turns[-1].role == "assistant"


def words_of(texts: Iterable[str]) -> set[str]:
    return {word.lower() for text in texts for word in text.split()}


def test_sniffing_shows_keys_types_and_trouble(tmp_path):
    lines("a.jsonl")(tmp_path, [{"id": 1, "text": "Hi", "score": 0.5}, b"{", {"id": 2, "text": "Ho", "tags": ["x"]}])
    found = sniff(tmp_path / "a.jsonl")
    assert {field.name: field.types for field in found.fields} == {
        "id": ("int",),
        "text": ("str",),
        "score": ("float", "missing"),
        "tags": ("list of str", "missing"),
    }
    assert found.records == 2
    assert len(found.broken) == 1
    assert [slot.text for slot in found.mapping.output] == ["text"]
    lines("b.jsonl")(tmp_path, [{"n": 1}])
    assert sniff(tmp_path / "b.jsonl").mapping is None
    for bad in ("none.jsonl", "c.bin"):
        write(tmp_path, {"c.bin": b""})
        with pytest.raises(UsageError):
            sniff(tmp_path / bad)
    write(tmp_path, {"d.jsonl": b"{\n"})
    with pytest.raises(UsageError, match="no record could be read"):
        sniff(tmp_path / "d.jsonl")


def test_sniffing_finds_the_records_inside_an_object(tmp_path):
    rows = [{"name": f"n{i}", "answer": f"A {i}.", "image": f"{i}.png"} for i in range(4)]
    array("a.json", b'{"info": {"x": 1}, "data": [', b'], "n": [1]}')(tmp_path, rows)
    found = sniff(tmp_path / "a.json")
    assert found.mapping.inside == "data"
    assert found.mapping.id == "name"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"output": [{"text": "a", "image": "b"}]},
        {"output": [{"each": "a"}]},
        {"conversations": "a", "output": [{"text": "b"}]},
    ],
)
def test_a_mapping_that_says_nothing_is_refused(keys, tmp_path):
    with pytest.raises(ValueError, match=r"slot|each|name either"):
        Mapping.model_validate({"path": str(tmp_path), **keys})


def test_the_verb_proposes_a_recipe_that_builds(tmp_path, capsys):
    from weft import cli

    file = tmp_path / "pairs.jsonl"
    records = [{"id": f"r{i}", "question": f"what is {i}?", "answer": f"it is {i}"} for i in range(6)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = tmp_path / "recipe.yaml"
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "sniff", str(file), "--out", str(recipe)])
    assert not caught.value.code
    assert "question" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "build", str(recipe), "--out", str(tmp_path / "built"), "--json"])
    assert not caught.value.code
    assert json.loads(capsys.readouterr().out)["kept"]["records"] == 6
