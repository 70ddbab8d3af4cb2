"""Documents become columns and rows become documents, whatever a document holds."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data.shards import SCHEMA, from_row, to_columns
from weft.document import Document, Image, Text, Turn

PARTS = st.one_of(
    st.builds(Text, st.text(max_size=4)),
    st.builds(Image, st.binary(max_size=4), st.one_of(st.none(), st.just("a/b.png"))),
)
TURNS = st.builds(
    Turn,
    st.sampled_from(["system", "user", "assistant"]),
    st.lists(PARTS, max_size=4).map(tuple),
    st.sampled_from([None, True, False]),
)
DOCUMENTS = st.builds(
    Document,
    st.lists(TURNS, max_size=3).map(tuple),
    st.one_of(st.none(), st.text(max_size=4)),
    st.sampled_from([{}, {"b": [1, {"a": None}]}]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(DOCUMENTS, max_size=5))
def test_rows_of_columns_are_the_documents(documents):
    batch = pa.RecordBatch.from_arrays(to_columns(documents), schema=SCHEMA)
    batch.validate(full=True)
    assert [from_row(row) for row in batch.to_pylist()] == documents
    for row, document in zip(batch.to_pylist(), documents, strict=True):
        assert row["sha256"] == [image.sha256 for image in document.images]
        numbers = [part["image"] for turn in row["messages"] for part in turn["content"] if part["type"] == "image"]
        assert numbers == list(range(len(row["images"])))


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_columns_do_not_depend_on_how_documents_come_in_batches(cut):
    documents = [Document((Turn("assistant", (Text(str(i)), Image(b"%d" % i))),), f"d{i}") for i in range(3)]
    parts = [documents[:cut], documents[cut:]]
    batches = [pa.RecordBatch.from_arrays(to_columns(part), schema=SCHEMA) for part in parts]
    whole = pa.RecordBatch.from_arrays(to_columns(documents), schema=SCHEMA)
    assert pa.Table.from_batches(batches).combine_chunks() == pa.Table.from_batches([whole])
