"""The document's one form on disk."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.document import Document, Image, Text, Turn, assistant, from_json, user
from weft.errors import DocumentError

PARTS = st.one_of(st.text().map(Text), st.text(min_size=1).map(lambda path: Image(path=path)))
TURNS = st.builds(
    Turn,
    st.sampled_from(["system", "user", "assistant"]),
    st.lists(PARTS).map(tuple),
    st.sampled_from([None, True, False]),
)


@given(st.builds(Document, st.lists(TURNS, min_size=1).map(tuple), st.none() | st.text(), st.just({"source": "x"})))
def test_json_round_trip(document):
    if any(0xD800 <= ord(c) < 0xE000 for part in document.parts for c in getattr(part, "text", "")):
        return
    assert from_json(json.loads(json.dumps(document.to_json()))) == document


def test_plain_string_content_is_one_text_part():
    document = from_json({"messages": [{"role": "user", "content": "hello"}], "license": "CC0"})
    assert document == Document((user("hello"),), meta={"license": "CC0"})


@pytest.mark.parametrize(
    "record,field",
    [
        ([], "JSON object"),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, r"messages\[0\]"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"messages\[0\].content\[0\]"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, r"content\[0\].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, r"content\[0\].text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a\ud800"}]}]}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": ""}]}]}, r"content\[0\].image"),
        ({"messages": [{"role": "user", "content": "x", "loss": "yes"}]}, r"messages\[0\].loss"),
        ({"messages": [{"role": "user", "content": "x"}], "id": 3}, "id"),
        ({"messages": [{"role": "user", "content": "x"}], "meta": []}, "meta"),
    ],
)
def test_wrong_records_name_the_field_and_the_place(record, field):
    with pytest.raises(DocumentError, match=rf"{field}[\s\S]*data.jsonl, line 7"):
        from_json(record, "data.jsonl, line 7")


def test_images_without_bytes_or_path_are_refused():
    with pytest.raises(DocumentError):
        Image()
    with pytest.raises(DocumentError, match="without a path"):
        Document((assistant(Image(b"x")),)).to_json()


def test_with_images_replaces_in_order():
    document = Document((user("a", Image(path="1")), assistant(Image(path="2"), "b")))
    assert [image.path for image in document.with_images([Image(path="x"), Image(path="y")]).images] == ["x", "y"]
