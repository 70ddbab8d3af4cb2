"""The files that records lie in: order, limits, damage and traps of each kind."""

import gzip
import io
import json
import tarfile
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.corpus import write
from tests.data.records.case import array, members, parquet, put
from tests.data.records.reading import ADAPTER, CASES, config_of, drops, kept, read
from tests.data.records.web import example, wiki_record
from weft.data.sources import SOURCES
from weft.data.sources.files import arrays
from weft.data.stage import RecordError
from weft.data.tfrecord import frame, masked_crc, parse_example, payloads
from weft.errors import UsageError


@pytest.mark.parametrize("form", ["lines", "array", "members", "parquet", "gzip", "zip"])
def test_many_records_are_read_in_order_whatever_they_lie_in(form, tmp_path):
    hard = 'brackets ]}{[, quotes " and a backslash \\.'
    rows = [{"id": f"r{i}", "answer": f"{i}: {hard}"} for i in range(1, 201)]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    config: dict[str, Any] = {"id": "id", "output": [{"text": "answer"}]}
    match form:
        case "lines":
            write(tmp_path, {"a.jsonl": data})
        case "array":
            array("a.json")(tmp_path, rows)
        case "members":
            members("a.json", b'\xef\xbb\xbf{"x": {"data": [0]}, "data": {', b'}, "y": 1}')(
                tmp_path, [{row["id"]: {"answer": row["answer"]}} for row in rows]
            )
            config = {"inside": "data", "output": [{"text": "r1.answer"}]}
        case "parquet":
            parquet("a.parquet", pa.schema([("id", pa.string()), ("answer", pa.string())]))(tmp_path, rows)
        case "gzip":
            write(tmp_path, {"a.jsonl.gz": gzip.compress(data)})
        case "zip":
            with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a.jsonl", data)
    source = {"kind": "mapping", "path": str(tmp_path), **config}
    made = ADAPTER.validate_python(source)
    plan = SOURCES["mapping"].plan(made)
    if form in ("lines", "array", "members"):
        assert [unit.number for unit in plan.units] == [64, 64, 64, 8]
    records = [record for unit in plan.units for record in SOURCES["mapping"].read(made, unit)]
    assert [record.line for record in records] == list(range(1, 201))
    if form == "members":
        assert [record.document is not None for record in records] == [True, *[False] * 199]
        assert records[0].document.turns[0].parts[0].text == rows[0]["answer"]
    else:
        found = [(r.document.id, r.document.turns[0].parts[0].text) for r in records]
        assert found == [(f"mapping:{row['id']}", row["answer"]) for row in rows]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('ab"\\[]{},: \u00e9\n', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('k"\\]},:', max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    members=st.lists(JSON_VALUES, max_size=6) | st.dictionaries(st.text('k"\\', max_size=4), JSON_VALUES, max_size=5),
    before=JSON_VALUES,
    chunk=st.sampled_from([1, 2, 3, 7, 2**18]),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_the_members_of_any_json_are_those_the_parser_finds(members, before, chunk, ascii_only, indent):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        file = Path(folder) / "a.json"
        whole = {"before": before, "data": members, "after": [1]}
        file.write_text(json.dumps(whole, ensure_ascii=ascii_only, indent=indent))
        patch.setattr(arrays, "_CHUNK", chunk)
        found = [json.loads(data) for data in arrays.read_all(file, "data")]
    assert found == ([{key: value} for key, value in members.items()] if isinstance(members, dict) else members)


def test_a_member_that_never_ends_costs_the_rest_and_an_empty_file_is_one_record(tmp_path):
    case = CASES["mmdialog"]
    whole = [json.dumps(case.record(n)).encode() for n in (1, 2, 3)]
    case.lay(tmp_path, [whole[0], whole[1].replace(b'"conversation":', b'"conversation: ', 1), whole[2]])
    items = read(case, tmp_path)
    assert kept(items) == [case.document(1)]
    assert drops(items) == [("record", "broken_json")]
    for data, lost in ((b"", 0), (b"[]", 0), (b" [ ] ", 0), (b"[{},", 2), (b"[,]", 1)):
        write(tmp_path, {"conversations.json": data})
        assert len(drops(read(case, tmp_path))) == lost, data
    for data in (b"", b"7", b"{}", b'{"data": {}}', b'{"database": 3}'):
        write(tmp_path / "y", {"youcookii_annotations_trainval.json": data})
        assert drops(read(CASES["youcook2"], tmp_path / "y")) == [("record", "broken_json")], data


def test_a_record_longer_than_the_limit_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("weft.data.sources.files.arrays.MAX_RECORD", 2000)
    monkeypatch.setattr("weft.data.sources.files.lines.MAX_RECORD", 2000)
    for name in ("mmdialog", "mmc4"):
        case = CASES[name]
        case.lay(tmp_path / name, [case.record(1), put("note", value="x" * 5000)(case.record(2)), case.record(3)])
        items = read(case, tmp_path / name)
        assert kept(items) == [case.document(1), case.document(3)]
        assert drops(items) == [("record", "too_large")]


def test_a_large_array_is_read_in_little_memory(tmp_path):
    rows = [{"conversation_id": str(i), "conversation": [{"turn": [{"__TEXT__": "x" * 4000}]}]} for i in range(3000)]
    array("conversations.json")(tmp_path, rows)
    del rows
    assert (tmp_path / "conversations.json").stat().st_size > 12_000_000
    config = config_of(CASES["mmdialog"], tmp_path)
    source = SOURCES["mmdialog"]
    tracemalloc.start()
    try:
        assert sum(1 for unit in source.plan(config).units for _ in source.read(config, unit)) == 3000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["docs_shard_17_v2.jsonl.zip", "docs_shard_17_v2.zip", "docs_shard_17_v2.jsonl.gz"])
def test_a_packed_shard_is_read_and_its_damage_costs_the_rest(name, tmp_path):
    case = CASES["mmc4"]
    case.lay(tmp_path, [case.record(n) for n in range(1, 4)])
    shard = tmp_path / "docs_no_face_shard_17_v3.jsonl"
    data = shard.read_bytes()
    shard.unlink()
    packed = tmp_path / name
    if name.endswith("gz"):
        packed.write_bytes(gzip.compress(data, mtime=0))
    else:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("docs_shard_17_v2.jsonl", data)
    assert kept(read(case, tmp_path)) == [case.document(n) for n in (1, 2, 3)]
    whole = packed.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0x55
    for bad in (whole[: len(whole) // 2], bytes(damaged)):
        packed.write_bytes(bad)
        items = read(case, tmp_path)
        assert drops(items)[-1][0] == "record"
        assert {why for _, why in drops(items)} <= {"damaged_file", "broken_json", "not_utf8"}
        assert len(kept(items)) < 3


def test_archives_that_are_traps_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("weft.data.sources.files.lines.MAX_RECORD", 1000)
    case = CASES["mmc4"]
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", b"\n" * 2_000_000)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.jsonl", b"{}")
        archive.writestr("../b.jsonl", b"{}")
    with zipfile.ZipFile(tmp_path / "locked.zip", "w") as archive:
        archive.writestr("a.jsonl", b"{}")
    locked = bytearray((tmp_path / "locked.zip").read_bytes())
    locked[6] |= 1
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    write(tmp_path, {"locked.zip": bytes(locked), "none.zip": b"no archive"})
    with tarfile.open(tmp_path / "deep.tar.gz", "w:gz") as archive:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.bin")
            info.size = 2_000_000
            archive.addfile(info, io.BytesIO(bytes(2_000_000)))
    write(tmp_path, {"bomb.jsonl.gz": gzip.compress(b"\n" * 2_000_000)})
    reasons = sorted(why for _, why in drops(read(case, tmp_path)))
    wanted = ["archive_encrypted", "archive_members", "archive_ratio", "archive_ratio", "damaged_file", "damaged_file"]
    assert reasons == wanted


def test_a_damaged_tar_keeps_what_came_before(tmp_path):
    case = CASES["laion, webdataset"]
    case.lay(tmp_path, [case.record(n) for n in range(1, 6)])
    file = tmp_path / "00000.tar"
    whole = file.read_bytes()
    middle = whole.index(b"000000003.png")
    for bad in (whole[: middle + 700], whole[:middle] + b"\xff" * 512 + whole[middle + 512 :]):
        file.write_bytes(bad)
        items = read(case, tmp_path)
        assert kept(items) == [case.document(1), case.document(2)]
        assert drops(items) == [("record", "damaged_file")]
    file.write_bytes(b"no archive")
    assert drops(read(case, tmp_path)) == [("record", "damaged_file")]
    write(tmp_path, {"00000.tar": gzip.compress(whole)})
    assert kept(read(case, tmp_path)) == [case.document(n) for n in range(1, 6)]


def test_every_row_behind_damage_in_parquet_is_counted(tmp_path):
    case = CASES["obelics"]
    case.lay(tmp_path, [case.record(n) for n in range(1, 6)])
    (file,) = tmp_path.glob("*.parquet")
    whole = file.read_bytes()
    file.write_bytes(b"\xff" * 200 + whole[200:])
    items = read(case, tmp_path)
    assert len(items) == 5
    assert kept(items) == [case.document(n) for n in (3, 4, 5)]
    assert drops(items) == [("record", "damaged_file")] * 2
    file.write_bytes(whole[:-30])
    assert drops(read(case, tmp_path)) == [("record", "damaged_file")]


def test_text_in_parquet_that_is_not_utf8_costs_its_row(tmp_path):
    case = CASES["obelics"]
    case.lay(tmp_path, [case.record(1), case.record(2), case.record(3)])
    (file,) = tmp_path.glob("*.parquet")
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    raw = pa.array([b"{}", b"\xff", b"{}"]).view(pa.string())
    pq.write_table(table.set_column(3, "general_metadata", raw), file)
    items = read(case, tmp_path)
    assert kept(items) == [case.document(1), case.document(3)]
    assert drops(items) == [("record", "not_utf8")]


def test_a_checksum_is_the_published_one():
    # CRC-32C of the digits 1 to 9 is e3069283
    assert masked_crc(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_a_message_is_read_as_it_is_laid_down():
    record = {"context": {"a": [b"x"], "b": []}, "lists": {"c": [[1, 300], []], "d": [[0.5]]}}
    assert parse_example(example(record)) == (record["context"], record["lists"])
    with pytest.raises(RecordError, match="SequenceExample"):
        parse_example(b"\x0a\xff")


def test_a_packed_tfrecord_is_read_and_an_oversized_record_skipped(tmp_path, monkeypatch):
    small, large = example(wiki_record(1)), b"x" * 4000
    file = tmp_path / "a.tfrecord.gz-00000-of-00001"
    file.write_bytes(gzip.compress(frame(small) + frame(large) + frame(small)))
    monkeypatch.setattr("weft.data.tfrecord.MAX_PAYLOAD", 2000)
    first, second, third = payloads(file)
    assert first == third == small
    assert second.reason == "too_large"
    file.write_bytes(gzip.compress(frame(small) * 3)[:-20])
    items = read(CASES["wikiweb2m"], tmp_path)
    assert drops(items)[-1] == ("record", "damaged_file")


def test_a_folder_without_files_of_the_source_is_refused(tmp_path):
    write(tmp_path, {"a.doc": b""})
    for name in CASES:
        with pytest.raises(UsageError):
            read(CASES[name], tmp_path)
