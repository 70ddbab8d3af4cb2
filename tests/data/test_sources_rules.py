"""What each source does with its own: placing, cutting, refusing, and what travels with a document."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.data.corpus import encoded, picture, write
from tests.data.records.case import array, parquet, put
from tests.data.records.instructions import IMAGE
from tests.data.records.reading import CASES, config_of, drops, kept, read
from tests.data.records.web import obelics_record
from weft.data.sources import SOURCES
from weft.data.sources.rules.conversations import messages_of
from weft.errors import UsageError


def test_a_picture_is_drawn_to_either_side_of_its_sentence_and_stays_there(tmp_path):
    case = CASES["mmc4"]
    rows = []
    for n in range(300):
        row = {**case.record(1), "text_list": [f"Sentence {n}."], "similarity_matrix": [[0.3]]}
        row["image_info"] = [{**row["image_info"][0], "matched_text_index": 0}]
        rows.append(row)
    case.lay(tmp_path, rows)
    found = [turns[0][1] for _, turns in kept(read(case, tmp_path, placement="random"))]
    assert found == [turns[0][1] for _, turns in kept(read(case, tmp_path, placement="random"))]
    before = sum(isinstance(parts[0], bytes) for parts in found)
    assert 110 < before < 190  # 150 +- 4.6 standard deviations
    for placement in ("before", "after"):
        sides = {isinstance(turns[0][1][0], bytes) for _, turns in kept(read(case, tmp_path, placement=placement))}
        assert sides == {placement == "before"}


def test_pictures_may_lie_in_a_folder_of_their_shard(tmp_path):
    case = CASES["mmc4"]
    case.lay(tmp_path, [case.record(1)])
    shard = tmp_path / "docs_no_face_shard_17_v3"
    shard.mkdir()
    for file in tmp_path.glob("*.png"):
        file.rename(shard / file.name)
    (item,) = read(case, tmp_path)
    assert kept([item]) == [case.document(1)]
    about = item.document.meta["images"]
    assert about[f"{shard.name}/{1:012x}.png"]["similarity"] == 0.31
    assert {image.path for image in item.document.images} == about.keys()


def test_pages_that_were_put_together_are_cut_apart(tmp_path):
    case = CASES["obelics"]
    cut = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
    record = put("texts", value=[f"A {cut}", None, f"B{cut}C", None])(obelics_record(1))
    case.lay(tmp_path, [record])
    found = kept(read(case, tmp_path))
    assert [[len(parts) for _, parts in turns] for _, turns in found] == [[1], [2], [2]]
    assert [turns[0][1][-1 if i == 1 else 0] for i, (_, turns) in enumerate(found)] == ["A ", "B", "C"]
    assert len({name for name, _ in found}) == 3


def test_a_pickle_that_would_run_is_refused_and_does_not_run(tmp_path):
    import pickle

    canary = tmp_path / "canary"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (canary,))

    for name in ("train.pt", "train.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps([{"title": Trap()}]))
    items = read(CASES["comm"], tmp_path)
    assert drops(items) == [("record", "unsafe_file")] * 2
    assert not canary.exists()


@pytest.mark.parametrize("name, table", [("pororo", "descriptions"), ("flintstones", "flintstones_annotations_v1-0")])
def test_pickled_tables_are_refused_with_a_way_out(name, table, tmp_path):
    case = CASES[name]
    case.lay(tmp_path, [case.record(1)])
    (tmp_path / "following_cache4.json").unlink()
    (tmp_path / "following_cache4.npy").write_bytes(b"pickle")
    with pytest.raises(UsageError, match=r"following_cache4.json; .*never loaded") as error:
        read(case, tmp_path)
    assert "as JSON once" in error.value.fix
    case.lay(tmp_path, [case.record(1)])
    plan = SOURCES[name].plan(config_of(case, tmp_path))
    assert {(r.file, r.losses[0].reason) for r in plan.skipped} >= {("following_cache4.npy", "pickled")}
    (tmp_path / f"{table}.json").unlink()
    with pytest.raises(UsageError, match=table):
        read(case, tmp_path)


def test_a_strip_of_frames_is_not_taken_for_a_picture(tmp_path):
    case = CASES["pororo"]
    case.lay(tmp_path, [case.record(1)])
    (tmp_path / "clip" / "1_2.png").write_bytes(encoded(picture(0, (16, 64))))
    items = read(case, tmp_path)
    assert drops(items) == [("record", "image_strip")]
    assert "4 frames" in items[0].drops[0].loss.message


def test_the_test_split_of_magicbrush_is_refused(tmp_path):
    case = CASES["magicbrush, sessions"]
    case.lay(tmp_path, [case.record(1)])
    shutil.copy(tmp_path / "edit_sessions.json", tmp_path / "test_sessions.json")
    hidden = {"canary": "canary GUID 7", **case.record(2)}
    write(tmp_path, {"mine.json": b" " * 2**20 + json.dumps(hidden).encode(), "latest.json": b"{}"})
    config = config_of(case, tmp_path)
    plan = SOURCES["magicbrush"].plan(config)
    assert {(r.file, r.losses[0].reason) for r in plan.skipped} == {
        ("mine.json", "benchmark"),
        ("test_sessions.json", "benchmark"),
    }
    assert kept(read(case, tmp_path)) == [case.document(1)]
    with pytest.raises(UsageError, match="test split"):
        read(case, tmp_path / "test_sessions.json")


def test_single_edits_of_magicbrush(tmp_path):
    case = CASES["magicbrush, sessions"]
    turns = [turn for n in (1, 2) for turn in case.record(n)[str(n)]]
    case.lay(tmp_path, [case.record(1)])
    (tmp_path / "edit_sessions.json").unlink()
    array("edit_turns.json")(tmp_path, turns)
    found = kept(read(case, tmp_path))
    pictures = {n: case.pictures(n) for n in (1, 2)}
    assert [said for _, said in found] == [
        [
            ("user", [pictures[n][f"{n}/{n}-{i}.png"], turn["instruction"]]),
            ("assistant", [pictures[n][f"{n}/{n}-{i + 1}.png"]]),
        ]
        for n in (1, 2)
        for i, turn in enumerate(case.record(n)[str(n)])
    ]


def test_a_sentence_of_no_story_is_one_lost_record(tmp_path):
    case = CASES["vist"]
    stray = {"photo_flickr_id": "1", "original_text": "Where do I belong?"}
    case.lay(tmp_path, [case.record(1), [stray], case.record(2)])
    items = read(case, tmp_path)
    assert kept(items) == [case.document(1), case.document(2)]
    assert drops(items) == [("record", "missing_key")]
    about = items[1].document.meta["images"]
    assert about["val/100.png"] == {"url_o": "https://f.example", "license": "3"}


def test_dishes_become_instructions(tmp_path):
    case = CASES["youcook2"]
    case.lay(tmp_path, [case.record(1)])
    write(tmp_path, {"label_foodtype.csv": b"101,blt\n102,soup\n"})
    ((_, turns),) = kept(read(case, tmp_path, dishes=str(tmp_path / "label_foodtype.csv")))
    assert turns[0] == ("user", ["write an illustrated document: blt"])
    with pytest.raises(UsageError, match="dishes"):
        read(case, tmp_path, dishes=str(tmp_path / "none.csv"))


def test_what_must_be_known_of_a_document_travels_with_it(tmp_path):
    def meta(name: str) -> Any:
        case = CASES[name]
        case.lay(tmp_path / name, [case.record(1)])
        return read(case, tmp_path / name)[0].document.meta

    assert meta("mmdialog")["access"] == "non_commercial"
    assert meta("interleavedbench")["evaluation_only"] is True
    assert meta("laion, parquet")["punsafe"] == 0.1
    assert meta("omnicorpus")["porn_prob"] == 0.01
    unsafe = [about.get("unsafe_prob") for about in meta("omnicorpus")["images"].values()]
    assert unsafe == [0.0, None]
    assert meta("mmc4")["similarity_model"] == "clip-vit-large-patch14"
    assert meta("wikiweb2m")["split"] == "train"


def test_text_is_put_in_order_and_turned_text_is_flagged(tmp_path):
    case = CASES["mmdialog"]
    record = put("conversation", 0, "turn", 0, "__TEXT__", value="e\u0301\0\x1b a\r\nb\u202ec")(case.record(1))
    case.lay(tmp_path, [record])
    (item,) = read(case, tmp_path)
    assert item.document.turns[0].parts[0].text == "\u00e9 a\nb\u202ec"
    assert item.document.meta["flags"] == ["bidi_override"]


def test_names_inside_files_never_become_paths(tmp_path):
    case = CASES["magicbrush"]
    case.lay(tmp_path, [case.record(1)])
    assert [image.path for image in read(case, tmp_path)[0].document.images] == [None, None]


def test_pictures_without_marks_stand_first(tmp_path):
    case = CASES["llava"]
    case.lay(tmp_path, [put("conversations", 0, "value", value="What is this?")(case.record(1))])
    assert kept(read(case, tmp_path)) == [case.document(1)]
    alone = {key: value for key, value in case.record(2).items() if key != "image"}
    case.lay(tmp_path, [put("conversations", 0, "value", value="Hi")(alone)])
    assert [turns[0] for _, turns in kept(read(case, tmp_path))] == [("user", ["Hi"])]


def test_both_names_of_a_conversation_are_one():
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    other = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    roles = [[(m.role, m.text) for m in messages_of({key: rows})] for key, rows in
             (("conversations", said), ("conversation", other), ("messages", other))]  # fmt: skip
    assert roles[0] == roles[1] == roles[2]


def test_mantis_in_parquet_holds_its_pictures(tmp_path):
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("id", pa.string()), ("images", pa.list_(IMAGE)), ("conversation", pa.list_(message))])
    case = CASES["mantis"]
    rows = [{**case.record(n), "images": [{"bytes": data, "path": None} for data in case.pictures(n).values()]}
            for n in (1, 2)]  # fmt: skip
    parquet("mantis.parquet", schema)(tmp_path, rows)
    assert kept(read(case, tmp_path)) == [case.document(1), case.document(2)]
