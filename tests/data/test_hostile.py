"""Hostile pictures, paths and archives are refused by name and reason, within limits, and the rest goes on."""

import os
import threading
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image as PILImage

from tests.data.corpus import chat, encoded, line, picture, png, write
from tests.data.hostile import PACKED, PATHS, PICTURES, SIDE, TARS, write_paths
from tests.data.running import config, ledger
from weft.data import open_dataset
from weft.data.build import build
from weft.errors import ImageError
from weft.images import decode_image, media_type, read_image

ARCHIVES = TARS | PACKED


def test_the_tables_are_long_enough():
    assert len(PICTURES) >= 40
    assert (
        sum(reason is not None for reason in PATHS.values()) + sum(bool(why) for _, why, _ in ARCHIVES.values()) >= 40
    )


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it skips
@pytest.mark.parametrize("name", PICTURES, ids=ascii)
def test_a_picture_is_refused_for_its_reason_or_is_one(name):
    make, reason = PICTURES[name]
    data = make()
    begin = time.process_time()
    if reason is None:
        decoded = decode_image(data)
        assert decoded.mode == "RGB"
        assert decoded.size in ((SIDE, SIDE), (1, 1), (1, 20_000))
        assert media_type(data) in ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp")
    else:
        with pytest.raises(ImageError) as error:
            decode_image(data, where="here")
        assert (error.value.reason, error.value.where) == (reason, "here")
    assert time.process_time() - begin < 5


@pytest.mark.filterwarnings("ignore")
def test_a_build_names_every_picture_that_it_refuses_and_goes_on(tmp_path):
    write(tmp_path / "in", {name: make() for name, (make, _) in PICTURES.items()})
    records = [chat(name, name) for name in PICTURES]
    write(tmp_path / "in", {"documents.jsonl": b"".join(map(line, records))})
    source = {"kind": "chat_jsonl", "path": str(tmp_path / "in" / "documents.jsonl")}
    summary = build(config(source), tmp_path / "out")
    assert summary.quarantined == ()
    refused = {name: reason for name, (_, reason) in PICTURES.items() if reason}
    assert {entry["image"]: entry["reason"] for entry in ledger(tmp_path / "out")} == refused
    assert [document.id for document in open_dataset(tmp_path / "out")] == [n for n in PICTURES if n not in refused]


def test_a_build_names_every_path_that_it_refuses_and_goes_on(tmp_path):
    write_paths(tmp_path)
    records = [chat(str(i), path) for i, path in enumerate(PATHS)]
    write(tmp_path / "in", {"documents.jsonl": b"".join(map(line, records))})
    build(config({"kind": "chat_jsonl", "path": str(tmp_path / "in" / "documents.jsonl")}), tmp_path / "out")
    found = {entry["image"]: (entry["reason"], entry["field"]) for entry in ledger(tmp_path / "out")}
    wanted = {path: (why, "messages[1].content[1].image") for path, why in PATHS.items() if why is not None}
    assert found == wanted
    kept = [str(i) for i, reason in enumerate(PATHS.values()) if reason is None]
    assert [document.id for document in open_dataset(tmp_path / "out")] == kept
    assert {image.data for document in open_dataset(tmp_path / "out") for image in document.images} == {
        (tmp_path / "in" / "good.png").read_bytes()
    }


def test_a_build_names_every_archive_that_it_refuses_and_goes_on(tmp_path):
    write(tmp_path / "in", {name: data for name, (data, _, _) in ARCHIVES.items()})
    write(tmp_path / "in", {"good.png": png()})
    made = config({"kind": "laion", "path": str(tmp_path / "in")}, filters=[{"kind": "decode"}])
    summary = build(made, tmp_path / "out")
    found = defaultdict(list)
    for entry in ledger(tmp_path / "out"):
        if entry["what"] == "record" and entry["stage"] == "read":
            found[entry["file"]].append(entry["reason"])
    assert found == {name: reasons for name, (_, reasons, _) in ARCHIVES.items() if reasons}
    # many of the good ones are the same pair
    again = summary.total.reasons["unique", "record", "duplicate_id"]
    assert summary.total.kept.records + again == sum(kept for _, _, kept in ARCHIVES.values())
    assert {entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")} == {"in", "out"}
    assert Counter(entry.name for entry in (tmp_path / "in").iterdir()) == Counter([*ARCHIVES, "good.png"])


def test_a_picture_that_may_not_be_read_is_told_from_one_that_is_not_there(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": png()})

    opened = os.open

    def refuse(file, *how):
        if str(file).endswith("a.png"):
            raise PermissionError(13, "Permission denied")
        return opened(file, *how)

    monkeypatch.setattr("weft.images.os.open", refuse)
    for name, reason in (("a.png", "image_unreadable"), ("b.png", "image_missing")):
        with pytest.raises(ImageError) as error:
            read_image(tmp_path, name)
        assert error.value.reason == reason


def test_of_several_pictures_in_a_file_the_first_counts():
    for name in ("animated.gif", "animated.png", "animated.webp", "several.mpo"):
        found = np.asarray(decode_image(PICTURES[name][0]())).astype(int)
        kind = {"gif": "GIF", "webp": "WEBP", "mpo": "JPEG", "png": "PNG"}[name.rpartition(".")[2]]
        alone = np.asarray(decode_image(encoded(picture(1, (SIDE, SIDE)), kind))).astype(int)
        # palettes and rates are chosen for all frames of an animation; two frames of noise differ by 85 and more
        assert abs(found - alone).mean() < 20, name


def test_a_cut_picture_is_never_taken_for_a_whole_one():
    """Wherever it is cut; the last two bytes of a GIF only say that nothing follows."""
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        whole = encoded(picture(1, (16, 12)), kind)
        reasons = set()
        for end in range(len(whole) - (2 if kind == "GIF" else 0)):
            with pytest.raises(ImageError) as error:
                decode_image(whole[:end])
            reasons.add(error.value.reason)
        assert reasons <= {"image_truncated", "image_unidentified", "image_damaged"}
        assert "image_truncated" in reasons


def test_pillows_own_limit_stays_whoever_decodes_at_the_same_time(monkeypatch):
    before, real = PILImage.MAX_IMAGE_PIXELS, PILImage.open

    def slow(*arguments, **options):
        time.sleep(0.05)
        return real(*arguments, **options)

    monkeypatch.setattr(PILImage, "open", slow)
    threads = [threading.Thread(target=decode_image, args=(png(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)  # the next one begins in the middle of this one
    for thread in threads:
        thread.join()
    assert before is not None
    assert before == PILImage.MAX_IMAGE_PIXELS
