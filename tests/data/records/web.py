"""Records of web pages: MMC4, OBELICS, OmniCorpus, WikiWeb2M."""

import base64
import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.data.corpus import write
from tests.data.records.case import CUT, JSON, Case, Damage, drop, lines, parquet, picture, put, tar
from weft.data.sources.draft import identity
from weft.data.tfrecord import frame


def url(n: int, i: int = 0) -> str:
    return f"https://pictures.example/{n}/{i}.jpg"


def fetched(n: int) -> dict[str, bytes]:
    return {hashlib.sha256(url(n, i).encode()).hexdigest(): picture(n, i) for i in range(2)}


def mmc4_record(n: int) -> dict[str, Any]:
    return {
        "text_list": [f"One {n}.", "Two.", "Three."],
        "url": f"https://page.example/{n}",
        "image_info": [
            {
                "image_name": f"{n:012x}.png",
                "raw_url": url(n),
                "matched_text_index": 1,
                "matched_sim": 0.31,
                "face_detections": None,
            },
            {"image_name": f"{n + 100:012x}.png", "raw_url": url(n, 1), "matched_text_index": 2, "matched_sim": 0.27},
        ],
        "similarity_matrix": [[0.1, 0.31, 0.2], [0.1, 0.2, 0.27]],
        "could_have_url_duplicate": 0,
    }


def mmc4_id(n: int) -> str:
    meta = {"url": f"https://page.example/{n}", "similarity_model": "clip-vit-large-patch14"}
    meta["could_have_url_duplicate"] = 0
    return identity("mmc4", None, [[f"One {n}.", "Two.", "Three."], meta])


def mmc4_document(n: int):
    parts = [f"One {n}.", "Two.", picture(n), "Three.", picture(n, 1)]
    return mmc4_id(n), [("assistant", parts)]


MMC4_DAMAGE = {
    "no text_list": Damage(drop("text_list"), "missing_key"),
    "text_list is a text": Damage(put("text_list", value="One."), "wrong_type"),
    "a sentence is null": Damage(put("text_list", 0, value=None), "wrong_type"),
    "a sentence is blank": Damage(put("text_list", 0, value=" "), "empty_text", "text"),
    "no image_info": Damage(drop("image_info"), "missing_key"),
    "image_info holds a text": Damage(put("image_info", 0, value="x.jpg"), "wrong_type"),
    "no image_name": Damage(drop("image_info", 0, "image_name"), "missing_key"),
    "image_name is a number": Damage(put("image_info", 0, "image_name", value=3), "wrong_type"),
    "matched_text_index is true": Damage(put("image_info", 0, "matched_text_index", value=True), "wrong_type"),
    "sentence out of range": Damage(put("image_info", 0, "matched_text_index", value=3), "index_range", "image"),
    "sentence before the first": Damage(put("image_info", 0, "matched_text_index", value=-1), "index_range", "image"),
    "matrix of another length": Damage(put("similarity_matrix", value=[[0.1]]), "count_mismatch"),
    "path climbs out": Damage(put("image_info", 0, "image_name", value="../x.png"), "image_path", "image"),
    "absolute path": Damage(put("image_info", 0, "image_name", value="/etc/hostname"), "image_path", "image"),
    "absent file": Damage(put("image_info", 0, "image_name", value="none.png"), "image_missing", "image"),
}

MMC4 = Case(
    "mmc4",
    mmc4_record,
    mmc4_document,
    lambda n: {f"{n:012x}.png": picture(n), f"{n + 100:012x}.png": picture(n, 1)},
    lines("docs_no_face_shard_17_v3.jsonl"),
    {**JSON, **CUT, **MMC4_DAMAGE},
    {"placement": "after"},
)


def mmc4_sample(n: int) -> dict[str, Any]:
    record = mmc4_record(n)
    for i, info in enumerate(record["image_info"]):
        info["image_base64"] = base64.b64encode(picture(n, i)).decode()
    return {f"{n:06}.json": json.dumps(record).encode()}


def in_json(change: Any) -> Any:
    """The change of a record, made in the .json member of a sample."""
    return lambda sample: {name: json.dumps(change(json.loads(data))).encode() for name, data in sample.items()}


MMC4_TAR = Case(
    "mmc4",
    mmc4_sample,
    mmc4_document,
    lambda n: {},
    tar("00000.tar"),
    {
        **{name: Damage(in_json(d.change), d.reason, d.costs) for name, d in MMC4_DAMAGE.items() if "path" not in name
           and name not in ("absent file", "no image_name")},
        "not base64": Damage(
            in_json(put("image_info", 0, "image_base64", value="?")), "image_inline", "image"
        ),
        "an empty picture": Damage(in_json(put("image_info", 0, "image_base64", value="")), "image_size", "image"),
        "no .json": Damage(lambda s: {name.replace("json", "txt"): data for name, data in s.items()}, "missing_key"),
        "a link": Damage(lambda s: dict.fromkeys(s, "/etc/hostname"), "archive_link"),
        "cut JSON": Damage(lambda s: {name: data[:-5] for name, data in s.items()}, "broken_json"),
    },
    {"placement": "after"},
)  # fmt: skip


OBELICS_SCHEMA = pa.schema(
    [
        ("images", pa.list_(pa.string())),
        ("texts", pa.list_(pa.string())),
        ("metadata", pa.string()),
        ("general_metadata", pa.string()),
    ]
)


def obelics_record(n: int) -> dict[str, Any]:
    about = [None, {"alt_text": "alt", "src": url(n), "original_width": 24}, None, {"src": url(n, 1)}]
    return {
        "images": [None, url(n), None, url(n, 1)],
        "texts": [f"First {n}.\n\nParagraph.", None, "Second.", None],
        "metadata": json.dumps(about),
        "general_metadata": json.dumps({"url": f"https://page.example/{n}", "warc_filename": "w"}),
    }


def obelics_document(n: int, source: str = "obelics", native: str | None = None):
    record = obelics_record(n)
    name = identity(source, native, [record["texts"], record["images"]])
    return name, [("assistant", [f"First {n}.\n\nParagraph.", picture(n), "Second.", picture(n, 1)])]


PARALLEL_DAMAGE = {
    "texts are null": Damage(put("texts", value=None), "wrong_type"),
    "images are null": Damage(put("images", value=None), "wrong_type"),
    "one text more": Damage(put("texts", value=["a", None, "b", None, "c"]), "count_mismatch"),
    "both at one place": Damage(put("texts", 1, value="also a text"), "not_one_of_two"),
    "neither at one place": Damage(put("texts", 0, value=None), "not_one_of_two"),
    "a blank text": Damage(put("texts", 0, value=" \n"), "empty_text", "text"),
    "a picture that was not fetched": Damage(put("images", 1, value="https://x.example/y"), "image_remote", "image"),
    "a path for a URL": Damage(put("images", 1, value="../../etc/passwd"), "image_remote", "image"),
}

OBELICS = Case(
    "obelics",
    obelics_record,
    obelics_document,
    fetched,
    parquet("train-00000-of-00001.parquet", OBELICS_SCHEMA),
    {
        **PARALLEL_DAMAGE,
        "metadata is null": Damage(put("metadata", value=None), "wrong_type"),
        "metadata is cut off": Damage(put("metadata", value='[null, {"src": '), "broken_json"),
        "metadata is an object": Damage(put("metadata", value="{}"), "wrong_type"),
        "metadata holds a number": Damage(put("metadata", value="[null, 1, null, null]"), "wrong_type"),
        "metadata is shorter": Damage(put("metadata", value="[null]"), "count_mismatch"),
        "general_metadata is null": Damage(put("general_metadata", value=None), "wrong_type"),
        "general_metadata is a list": Damage(put("general_metadata", value="[]"), "wrong_type"),
        "general_metadata is nested absurdly": Damage(put("general_metadata", value="[" * 99_999), "too_deep"),
    },
)


def omni_record(n: int) -> dict[str, Any]:
    record = obelics_record(n)
    return {
        "images": record["images"],
        "texts": record["texts"],
        "general_metadata": {"id": f"omni-{n}", "url": f"https://page.example/{n}", "porn_prob": 0.01},
        "metadata": [{"width": 24, "height": 16, "unsafe_prob": 0.0}, {"width": 24, "height": 16}],
        "valid_image": [None, True, None, True],
    }


OMNICORPUS = Case(
    "omnicorpus",
    omni_record,
    lambda n: (f"omnicorpus:omni-{n}", obelics_document(n)[1]),
    fetched,
    lines("part.jsonl"),
    {
        **JSON,
        **CUT,
        **PARALLEL_DAMAGE,
        "no texts": Damage(drop("texts"), "missing_key"),
        "a picture that is not valid": Damage(put("valid_image", 1, value=False), "image_invalid", "image"),
        "valid_image is shorter": Damage(put("valid_image", value=[True]), "count_mismatch"),
        "metadata is a number": Damage(put("metadata", value=3), "wrong_type"),
        "metadata of three": Damage(put("metadata", value=[{}, {}, {}]), "count_mismatch"),
    },
)


def matched_record(n: int) -> dict[str, Any]:
    return {
        "id": f"m{n}",
        "text_list": [f"One {n}.", "Two."],
        "image_info": [{"image_url": url(n)}, {"image_url": url(n, 1)}],
        "similarity_matrix": [[0.3, 0.1], [0.2, 0.4]],
        "valid_image_ids": [0, 1],
    }


OMNICORPUS_MATCHED = Case(
    "omnicorpus",
    matched_record,
    lambda n: (f"omnicorpus:m{n}", [("assistant", [picture(n), f"One {n}.", picture(n, 1), "Two."])]),
    fetched,
    lines("part.jsonl"),
    {
        **JSON,
        "no image_info": Damage(drop("image_info"), "missing_key"),
        "no image_url": Damage(drop("image_info", 0, "image_url"), "missing_key"),
        "matrix of another length": Damage(put("similarity_matrix", value=[[1.0, 0.0]]), "count_mismatch"),
        "an empty row": Damage(put("similarity_matrix", 0, value=[]), "index_range", "image"),
        "a text in the matrix": Damage(put("similarity_matrix", 0, 0, value="0.3"), "wrong_type"),
        "no matrix": Damage(drop("similarity_matrix"), "missing_key"),
        "a picture that is not valid": Damage(put("valid_image_ids", value=[1]), "image_invalid", "image"),
    },
    {"placement": "before"},
)


def wiki_record(n: int) -> dict[str, Any]:
    """Context and feature lists, as `example` writes them."""
    return {
        "context": {"page_title": [f"Page {n}".encode()], "page_url": [f"https://w.example/{n}".encode()],
                    "split": [b"train"]},
        "lists": {
            "section_title": [[f"Page {n}".encode()], [b"History"], [b"Table"]],
            "section_text": [[b"Introduction."], [b"Long ago."], [b"| a |"]],
            "section_image_url": [[url(n).encode()], [url(n, 1).encode()], []],
            "section_image_clean_ref_desc": [[b"A caption"], [b""], []],
            "section_contains_table_or_list": [[0], [0], [1]],
        },
    }  # fmt: skip


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _message(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def _feature(values: Sequence[Any]) -> bytes:
    if any(isinstance(value, int) for value in values):
        return _message(3, _message(1, b"".join(map(varint, values))))
    if any(isinstance(value, float) for value in values):
        return _message(2, _message(1, b"".join(struct.pack("<f", value) for value in values)))
    return _message(1, b"".join(_message(1, value) for value in values)) if values else b""


def example(record: dict[str, Any]) -> bytes:
    """A SequenceExample, put together byte by byte from the wire format."""
    context = b"".join(
        _message(1, _message(1, key.encode()) + _message(2, _feature(values)))
        for key, values in record["context"].items()
    )
    lists = b"".join(
        _message(1, _message(1, key.encode()) + _message(2, b"".join(_message(1, _feature(step)) for step in steps)))
        for key, steps in record["lists"].items()
    )
    return _message(1, context) + _message(2, lists)


def tfrecord(folder: Path, records: Sequence[Any]) -> None:
    framed = (record if isinstance(record, bytes) else frame(example(record)) for record in records)
    write(folder, {"wikiweb2m-val.tfrecord": b"".join(framed)})


def _flipped(at: int) -> Any:
    def change(record: Any) -> bytes:
        data = bytearray(frame(example(record)))
        data[at] ^= 1
        return bytes(data)

    return change


WIKIWEB2M = Case(
    "wikiweb2m",
    wiki_record,
    lambda n: (
        f"wikiweb2m:https://w.example/{n}",
        [
            ("user", [f"write an illustrated document: Page {n}"]),
            ("assistant", ["Introduction.", picture(n), "A caption", "## History\n\nLong ago.", picture(n, 1)]),
        ],
    ),
    fetched,
    tfrecord,
    {
        "payload fails its checksum": Damage(_flipped(40), "bad_checksum"),
        "checksum is damaged": Damage(_flipped(-1), "bad_checksum"),
        "length fails its checksum": Damage(_flipped(0), "bad_checksum", last=True),
        "cut off": Damage(lambda r: frame(example(r))[:-9], "truncated", last=True),
        "cut off in the header": Damage(lambda r: frame(example(r))[:7], "truncated", last=True),
        "not a message": Damage(lambda r: frame(b"\xff\xff\xff"), "bad_message"),
        "no title": Damage(drop("context", "page_title"), "missing_key"),
        "title is a number": Damage(put("context", "page_title", value=[7]), "wrong_type"),
        "title is blank": Damage(put("context", "page_title", value=[b" "]), "empty_value"),
        "title is not UTF-8": Damage(put("context", "page_title", value=[b"\xff"]), "not_utf8"),
        "two titles": Damage(put("context", "page_title", value=[b"a", b"b"]), "count_mismatch"),
        "no section_text": Damage(drop("lists", "section_text"), "missing_key"),
        "a section without a title": Damage(put("lists", "section_title", value=[[b"a"]]), "count_mismatch"),
        "a caption too many": Damage(
            put("lists", "section_image_clean_ref_desc", 0, value=[b"a", b"b"]), "count_mismatch"
        ),
        "a flag is a text": Damage(put("lists", "section_contains_table_or_list", 0, value=[b"no"]), "wrong_type"),
        "a text is blank": Damage(put("lists", "section_text", 0, value=[b" "]), "empty_text", "text"),
        "a picture that was not fetched": Damage(
            put("lists", "section_image_url", 0, value=[b"https://x.example/"]), "image_remote", "image"
        ),
    },
)

CASES = {
    "mmc4": MMC4,
    "mmc4 in webdataset": MMC4_TAR,
    "obelics": OBELICS,
    "omnicorpus": OMNICORPUS,
    "omnicorpus, matched": OMNICORPUS_MATCHED,
    "wikiweb2m": WIKIWEB2M,
}
