"""Documents of the real sets, in the layouts of their sources."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import write
from tests.data.records.reading import CASES, kept, read

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data" / "samples"


needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs ../shared/data/samples")


def sample(name: str) -> tuple[dict[str, Any], list[Any]]:
    """A sample document, and its texts and pictures in order."""
    document = json.loads((SAMPLES / name / "doc.json").read_bytes())
    parts = [
        element["text"] if element["type"] == "text" else (SAMPLES / name / element["path"]).read_bytes()
        for element in document["elements"]
    ]
    return document, parts


@needs_samples
def test_the_story_of_the_samples_is_read_in_both_forms(tmp_path):
    _, parts = sample("vist_story_40470")
    original = json.loads((SAMPLES / "vist_story_40470" / "original" / "val_cleaned.json").read_bytes())
    ((story, rows),) = original.items()
    pictures = parts[1::2]
    for row, data in zip(rows, pictures, strict=True):
        write(tmp_path / "mmi" / "images" / "val_images", {f"{row['image_id']}.jpg": data})
        write(tmp_path / "sis" / "val", {f"{row['image_id']}.jpg": data})
    write(tmp_path / "mmi", {"val_cleaned.json": json.dumps(original).encode()})
    annotations = [
        [{"story_id": story, "photo_flickr_id": row["image_id"], "worker_arranged_photo_order": row["sequence_index"],
          "original_text": row["caption"]}] for row in reversed(rows)
    ]  # fmt: skip
    whole = {"images": [], "albums": [], "annotations": annotations}
    write(tmp_path / "sis", {"val.story-in-sequence.json": json.dumps(whole).encode()})
    for form in ("mmi", "sis"):
        assert kept(read(CASES["vist"], tmp_path / form)) == [("vist:40470", [("assistant", parts)])]


@needs_samples
def test_the_dialogue_of_the_samples_is_read(tmp_path):
    document, parts = sample("mmdialog_skylines")
    turns: list[list[dict[str, str]]] = []
    for element in document["elements"]:
        if element["type"] == "text":
            turns.append([{"__TEXT__": element["text"]}])
        else:
            turns[-1].append({"__MEDIA__": Path(element["path"]).stem})
            shutil.copy(SAMPLES / "mmdialog_skylines" / element["path"], tmp_path)
    record = {"conversation_id": "0", "conversation": [{"turn": turn} for turn in turns]}
    write(tmp_path, {"conversations.json": json.dumps([record]).encode()})
    ((name, found),) = kept(read(CASES["mmdialog"], tmp_path))
    assert name == "mmdialog:0"
    assert [part for _, said in found for part in said] == parts
    assert [role for role, _ in found] == ["assistant", "user"] * 4 + ["assistant"]


@needs_samples
@pytest.mark.parametrize("quote", ["json", "literal"])
def test_the_pairs_of_the_samples_are_read(quote, tmp_path):
    document, parts = sample("cc3m_pairs")
    elements = document["elements"]
    rows = [{"image": a["path"], "caption": b["text"]} for a, b in zip(elements[::2], elements[1::2], strict=True)]
    text = "".join((json.dumps(row) if quote == "json" else repr(row)) + "\n" for row in rows)
    write(tmp_path, {"0000001.txt": text.encode()})
    images = str(SAMPLES / "cc3m_pairs")
    found = kept(read(CASES["pair_shards"], tmp_path, images=images))
    assert [part for _, turns in found for part in turns[0][1]] == parts
