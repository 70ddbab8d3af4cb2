"""The page shows what was dropped, by stage and reason, with the picture and the value against the threshold."""

import re

import pytest

from tests.data.corpus import chat, encoded, line, picture, png, write
from tests.data.running import config, ledger
from tests.data.test_commands import run
from weft.data.build import build
from weft.data.view import write_view

FILTERS = (
    {"kind": "text_length", "min": 5},
    {"kind": "image_limits", "min_side": 10, "on_bad_image": "image"},
    {"kind": "image_count", "min": 1, "max": 2},
)


@pytest.fixture
def source(tmp_path):
    write(
        tmp_path / "in", {"a.png": png(1), "b.png": png(2), "c.png": png(3), "small.png": encoded(picture(4, (8, 8)))}
    )
    rows = [
        chat("good", "a.png", text="<b>good</b>"),
        *(chat(f"short{i}", "b.png", text="") for i in range(5)),
        chat("small", "a.png", "small.png", text="one is small"),
        chat("many", "a.png", "b.png", "c.png", text="<script>alert(1)</script>"),
        chat("gone", "gone.png", text="its picture is gone"),
    ]
    write(tmp_path / "in", {"documents.jsonl": b"".join(map(line, rows))})
    return tmp_path / "in"


@pytest.fixture
def dataset(source, tmp_path):
    build(config({"kind": "chat_jsonl", "path": str(source)}, filters=FILTERS), tmp_path / "out")
    return tmp_path / "out"


def page_of(folder, tmp_path, **options) -> str:
    write_view(folder, tmp_path / "page.html", **options)
    return (tmp_path / "page.html").read_text()


def blocks(page: str) -> dict[str, list[str]]:
    """By reason, what the page holds of each drop."""
    found = re.findall(r"<summary><b>(\w+)</b>(.*?)</details>", page, re.DOTALL)
    return {reason: body.split('<div class="drop">')[1:] for reason, body in found}


def test_the_ledger_has_value_and_threshold_as_columns(dataset):
    compared = {entry["reason"]: (entry["value"], entry["threshold"]) for entry in ledger(dataset)}
    assert compared == {
        "too_little_text": (4, 5),
        "image_too_small": (8, 10),
        "too_many_images": (3, 2),
        "image_missing": (None, None),
    }


def test_what_was_dropped_is_shown_with_its_pictures(dataset, tmp_path):
    page = page_of(dataset, tmp_path, drops=3)
    found = blocks(page)
    assert list(found) == ["image_missing", "too_little_text", "image_too_small", "too_many_images"]
    assert [body.count("<img") for body in found["too_little_text"]] == [1, 1, 1, 0, 0]
    assert "value <b>4</b>" in found["too_little_text"][0]
    assert "threshold <b>5</b>" in found["too_little_text"][0]
    (small,) = found["image_too_small"]
    assert (small.count("<img"), small.count('class="meant"')) == (2, 1)
    (many,) = found["too_many_images"]
    assert many.count("<img") == 3
    assert "&lt;script&gt;" in many
    assert "<script" not in page
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', page))
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))


def test_without_the_sources_the_reasons_stay(dataset, source, tmp_path):
    untouched = page_of(dataset, tmp_path, drops=0)
    (source / "documents.jsonl").rename(tmp_path / "elsewhere")
    page = page_of(dataset, tmp_path, drops=3)
    assert page == untouched
    assert "value <b>8</b>" in page


def test_another_record_in_the_place_is_not_shown(dataset, source, tmp_path):
    data = (source / "documents.jsonl").read_bytes()
    (source / "documents.jsonl").write_bytes(data.replace(b"many", b"new!"))
    (many,) = blocks(page_of(dataset, tmp_path))["too_many_images"]
    assert "<img" not in many


def test_what_would_be_dropped_of_a_source_is_shown_too(source, tmp_path):
    (source / "bad.png").write_bytes(png()[:100])
    (source / "documents.jsonl").write_bytes(line(chat("bad", "a.png", "bad.png", text="one is cut off")))
    page = page_of(source, tmp_path)
    ((reason, (body,)),) = blocks(page).items()
    assert reason.startswith("image_")
    assert body.count("<img") == 1
    assert "one is cut off" in body


def test_a_wrong_number_is_refused(dataset, tmp_path, capsys):
    for options in (("--samples", 0), ("--drops", -1)):
        code, _, err = run(capsys, "view", dataset, "--out", tmp_path / "x.html", *options)
        assert (code, "--samples must be" in err) == (2, True)


def test_the_funnel_ends_with_what_was_kept(dataset, capsys):
    code, out, _ = run(capsys, "funnel", dataset)
    assert code == 0
    assert "kept 2 of 9 records" in out
