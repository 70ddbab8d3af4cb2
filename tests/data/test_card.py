"""The README of a dataset says what is in it and whose it is, and nothing of the machine or the time."""

import json
import re

import pytest

from tests.data.corpus import line, png, write
from tests.data.running import contents
from weft.data.build import BuildConfig, build
from weft.data.card import DATE
from weft.data.card import contents as contents_of
from weft.errors import UsageError


def sources(folder, *identities: str, meta: dict | None = None) -> dict:
    records = []
    for identity in identities:
        content = [{"type": "text", "text": "look"}, {"type": "image", "image": "a.png"}]
        about = {"images": {"a.png": {"license": "CC BY | 4.0"}}, **(meta or {})}
        records.append({"id": identity, "meta": about, "messages": [{"role": "assistant", "content": content}]})
    write(folder, {"a.png": png(), "x.jsonl": b"".join(map(line, records))})
    return {"sources": [{"kind": "chat_jsonl", "path": folder / "x.jsonl"}]}


def readme(config: dict, out) -> str:
    build(BuildConfig.model_validate(config), out)
    return (out / "README.md").read_text()


@pytest.mark.parametrize(
    "identities, access",
    [
        (("mmc4:1", "obelics:2"), "open"),
        (("mmc4:1", "vist:2"), "non_commercial"),
        (("mmc4:1",), "open"),
    ],
)
def test_the_whole_is_as_restricted_as_its_most_restricted_document(identities, access, tmp_path):
    text = readme(sources(tmp_path / "in", *identities), tmp_path / "out")
    assert f"**{access}**" in text
    for identity in identities:
        assert re.search(rf"^\| {identity.split(':')[0]} \| 1 \| \w+ \| (annotations|every photo)", text, re.MULTILINE)


def test_what_a_document_says_of_its_access_counts(tmp_path):
    text = readme(sources(tmp_path / "in", "mmc4:1", meta={"access": "gated"}), tmp_path / "out")
    assert "**gated**" in text
    assert "| mmc4 | 1 | gated |" in text


def test_documents_that_were_dropped_do_not_restrict_the_rest(tmp_path):
    config = sources(tmp_path / "in", "mmc4:1", "vist:2")
    text = readme({**config, "filters": [{"kind": "licence", "access": "open"}]}, tmp_path / "out")
    assert "**open**" in text
    assert "vist" not in text


def test_it_tells_counts_licences_thresholds_models_and_the_funnel(tmp_path):
    config = sources(
        tmp_path / "in",
        *(f"mmc4:{i}" for i in range(7)),
        meta={
            "similarity_model": "some-model",
            "annotations": {"quality": {"annotator": "judge-1 <b>"}},
        },
    )
    filters = [{"kind": "image_count", "min": 1, "max": 6}, {"kind": "decode"}]
    text = readme({**config, "filters": filters}, tmp_path / "out")
    assert "7 of 7 records" in text
    assert "| CC BY \\| 4.0 | 7 |" in text
    assert "- judge-1 &lt;b>" in text
    assert re.search(r"^\| image_count \| .*max 6", text, re.MULTILINE)
    assert re.search(r"^\| image_count \| 7 \| 0 \| 7 \| 0 \|", text, re.MULTILINE)
    assert str(tmp_path) not in text


def test_a_model_in_a_folder_is_named_without_the_folder(tmp_path):
    from weft.data.card import Contents, body

    settings = {"kind": "coherence", "model": "/home/me/models/clip-b", "threshold": 0.2}
    summary = {
        **{side: {"records": 1, "texts": 1, "images": 1} for side in ("kept", "read")},
        "stages": [],
        "config": {"filters": [settings]},
    }
    text = body(summary, Contents())
    assert "- clip-b" in text
    assert 'model "clip-b", threshold 0.2' in text
    assert "/home" not in text


def test_the_same_documents_have_the_same_card_whenever_it_is_made(tmp_path, monkeypatch):
    monkeypatch.delenv(DATE, raising=False)
    config = sources(tmp_path / "in", "mmc4:1")
    text = readme(config, tmp_path / "a")
    build(BuildConfig.model_validate(config), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert "Made on" not in text
    monkeypatch.setenv(DATE, "1700000000")
    assert "Made on 2023-11-14." in readme(config, tmp_path / "a")
    monkeypatch.setenv(DATE, "yesterday")
    with pytest.raises(UsageError, match=DATE):
        build(BuildConfig.model_validate(config), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_contents_are_those_of_the_files(tmp_path):
    readme(sources(tmp_path / "in", "mmc4:1", "a:b:2", "c"), tmp_path / "out")
    found = contents_of(tmp_path / "out")
    assert found.documents == 3
    assert found.stored == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.parquet"))
    assert dict(found.rights) == {("mmc4", "open"): 1, ("", "open"): 2}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["kept"]["records"] == 3
