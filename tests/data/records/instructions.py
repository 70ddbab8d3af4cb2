"""Records of edits, conversations and pairs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.data.corpus import write
from tests.data.records.case import CUT, JSON, Case, Damage, array, drop, lines, members, parquet, picture, put, tar
from tests.data.records.stories import bad_paths, pictures
from tests.data.records.web import fetched, url
from weft.data.sources.draft import identity

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LAST = {name: Damage(d.change, d.reason, last=True) for name, d in CUT.items()}
"""Of an array: the file ends with the record that is cut off."""


def pix2pix_seeds(folder: Path, records: Sequence[Any]) -> None:
    for n in range(1, 6):
        prompt = {"input": "a cat", "edit": f"make it {n}", "output": "another cat"}
        write(folder, {f"000{n}/prompt.json": json.dumps(prompt).encode()})
    bad = {"gone": {"input": "a"}, "typed": {"edit": 7}, "blank": {"edit": "  "}}
    write(folder, {f"{name}/prompt.json": json.dumps(prompt).encode() for name, prompt in bad.items()})
    write(
        folder, {"cut/prompt.json": b'{"edit": ', "list/prompt.json": b"[]", "bytes/prompt.json": b'{"edit": "\xff"}'}
    )
    for name in bad:
        write(folder, {f"{name}/7_0.jpg": picture(7), f"{name}/7_1.jpg": picture(8)})
    array("seeds.json")(folder, records)


PIX2PIX = Case(
    "instruct_pix2pix",
    lambda n: [f"000{n}", [str(n)]],
    lambda n: (
        f"instruct_pix2pix:000{n}/{n}",
        [("user", [picture(n), f"make it {n}"]), ("assistant", [picture(n, 1)])],
    ),
    pictures("000{n}/{n}_{i}.jpg", 2),
    pix2pix_seeds,
    {
        **LAST,
        "a number instead": Damage(lambda r: 7, "wrong_type"),
        "null instead": Damage(lambda r: None, "wrong_type"),
        "only a folder": Damage(drop(1), "count_mismatch"),
        "seeds are a text": Damage(put(1, value="2"), "wrong_type"),
        "a seed is null": Damage(put(1, 0, value=None), "wrong_type"),
        "an absent folder": Damage(put(0, value="none"), "unreadable"),
        "a folder outside": Damage(put(0, value="../000"), "path"),
        "an absolute folder": Damage(put(0, value="/etc"), "path"),
        "no edit": Damage(lambda r: ["gone", ["7"]], "missing_key"),
        "edit is a number": Damage(lambda r: ["typed", ["7"]], "wrong_type"),
        "edit is blank": Damage(lambda r: ["blank", ["7"]], "empty_text", "text"),
        "prompt is cut off": Damage(lambda r: ["cut", ["7"]], "broken_json"),
        "prompt is a list": Damage(lambda r: ["list", ["7"]], "wrong_type"),
        "prompt is not UTF-8": Damage(lambda r: ["bytes", ["7"]], "not_utf8"),
        "an absent picture": Damage(put(1, 0, value="99"), "image_missing"),
        "a seed that climbs out": Damage(put(1, 0, value="../../x"), "image_path"),
    },
)

_COLUMNS = {"original_prompt": pa.string(), "original_image": IMAGE, "edit_prompt": pa.string()}
_COLUMNS |= {"edited_prompt": pa.string(), "edited_image": IMAGE}


def embedded(n: int, i: int) -> dict[str, Any]:
    return {"bytes": picture(n, i), "path": "../../../etc/passwd"}


def pix2pix_row(n: int) -> dict[str, Any]:
    return {
        "original_prompt": f"a cat {n}",
        "original_image": embedded(n, 0),
        "edit_prompt": "make it blue",
        "edited_prompt": "a blue cat",
        "edited_image": embedded(n, 1),
    }


def edited(before: str, after: str) -> dict[str, Damage]:
    """Damage of a row with pictures inside."""
    return {
        "before is null": Damage(put(before, value=None), "wrong_type"),
        "after is null": Damage(put(after, value=None), "wrong_type"),
        "after has no bytes and no path": Damage(put(after, value={"bytes": None, "path": None}), "wrong_type"),
        "after has no bytes": Damage(put(after, value={"bytes": b"", "path": "a.png"}), "image_size"),
        "after is too large": Damage(put(after, "bytes", value=b"x" * (20 * 2**20 + 1)), "image_size"),
        "before names a file outside": Damage(put(before, value={"bytes": None, "path": "../x.png"}), "image_path"),
        "before names an absolute file": Damage(
            put(before, value={"bytes": None, "path": "/etc/hostname"}), "image_path"
        ),
        "before names no file": Damage(put(before, value={"bytes": None, "path": "none.png"}), "image_missing"),
    }


PIX2PIX_ROWS = Case(
    "instruct_pix2pix",
    pix2pix_row,
    lambda n: (
        identity("instruct_pix2pix", None, pix2pix_row(n)),
        [("user", [picture(n), "make it blue"]), ("assistant", [picture(n, 1)])],
    ),
    lambda n: {},
    parquet("train.parquet", pa.schema(list(_COLUMNS.items()))),
    {
        **edited("original_image", "edited_image"),
        "edit_prompt is null": Damage(put("edit_prompt", value=None), "wrong_type"),
        "edit_prompt is blank": Damage(put("edit_prompt", value=" "), "empty_text", "text"),
    },
    sniffed=True,
)


def brush_row(n: int) -> dict[str, Any]:
    return {
        "img_id": f"{n}",
        "turn_index": 1,
        "source_img": embedded(n, 0),
        "mask_img": None,
        "instruction": "add a hat",
        "target_img": embedded(n, 1),
    }


_BRUSH = {"img_id": pa.string(), "turn_index": pa.int32(), "source_img": IMAGE, "mask_img": IMAGE}
_BRUSH |= {"instruction": pa.string(), "target_img": IMAGE}
MAGICBRUSH = Case(
    "magicbrush",
    brush_row,
    lambda n: (f"magicbrush:{n}/1", [("user", [picture(n), "add a hat"]), ("assistant", [picture(n, 1)])]),
    lambda n: {},
    parquet("train-00000.parquet", pa.schema(list(_BRUSH.items()))),
    {
        **edited("source_img", "target_img"),
        "no id": Damage(put("img_id", value=None), "wrong_type"),
        "no turn": Damage(put("turn_index", value=None), "wrong_type"),
        "instruction is null": Damage(put("instruction", value=None), "wrong_type"),
        "instruction is blank": Damage(put("instruction", value=""), "empty_text", "text"),
        "a canary": Damage(put("instruction", value="canary GUID 1f2e"), "benchmark"),
    },
)


def session(n: int) -> dict[str, Any]:
    def turn(before: str, after: str, what: str) -> dict[str, Any]:
        return {
            "input": f"{n}-{before}.png",
            "mask": f"{n}-mask.png",
            "output": f"{n}-{after}.png",
            "instruction": what,
        }

    return {f"{n}": [turn("0", "1", "add a hat"), turn("1", "2", "and a dog")]}


SESSIONS = Case(
    "magicbrush",
    session,
    lambda n: (
        f"magicbrush:{n}",
        [
            ("user", [picture(n), "add a hat"]),
            ("assistant", [picture(n, 1)]),
            ("user", ["and a dog"]),
            ("assistant", [picture(n, 2)]),
        ],
    ),
    pictures("{n}/{n}-{i}.png", 3),
    members("edit_sessions.json"),
    {
        "turns are a text": Damage(put("2", value="add"), "wrong_type"),
        "no turns": Damage(put("2", value=[]), "empty_value"),
        "a turn is null": Damage(put("2", 0, value=None), "wrong_type"),
        "no input": Damage(drop("2", 0, "input"), "missing_key"),
        "output is null": Damage(put("2", 1, "output", value=None), "wrong_type"),
        "no instruction": Damage(drop("2", 0, "instruction"), "missing_key"),
        "instruction is a number": Damage(put("2", 0, "instruction", value=4), "wrong_type"),
        "instruction is blank": Damage(put("2", 0, "instruction", value="\t"), "empty_text", "text"),
        "an absent picture": Damage(put("2", 1, "output", value="2-9.png"), "image_missing"),
        "a path that climbs out": Damage(put("2", 1, "output", value="../../a-1.png"), "image_path"),
        "an absolute path": Damage(put("2", 1, "output", value="/etc/a-1.png"), "image_path"),
        "broken": Damage(lambda r: json.dumps(r).encode().replace(b'": "', b'" "', 1), "broken_json"),
    },
)


def spoken(n: int, **others: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"Picture {n}."}]
    return {"id": f"c{n}", "image": f"{n}.png", "conversations": said, **others}


def answered(source: str) -> Any:
    return lambda n: (f"{source}:c{n}", [("user", [picture(n), "What is this?"]), ("assistant", [f"Picture {n}."])])


SPOKEN = {
    **JSON,
    "no conversations": Damage(drop("conversations"), "missing_key"),
    "conversations are a text": Damage(put("conversations", value="hello"), "wrong_type"),
    "conversations are empty": Damage(put("conversations", value=[]), "empty_value"),
    "a message is null": Damage(put("conversations", 0, value=None), "wrong_type"),
    "no role": Damage(drop("conversations", 0, "from"), "missing_key"),
    "another role": Damage(put("conversations", 0, "from", value="robot"), "unknown_role"),
    "no value": Damage(drop("conversations", 1, "value"), "missing_key"),
    "a value is a list": Damage(put("conversations", 1, "value", value=["a"]), "wrong_type"),
    "an answer is blank": Damage(put("conversations", 1, "value", value=" "), "empty"),
    "a mark too many": Damage(put("conversations", 0, "value", value="<image><image>x"), "count_mismatch"),
    "id is a list": Damage(put("id", value=[]), "wrong_type"),
    **bad_paths("image"),
}
LLAVA = Case(
    "llava",
    spoken,
    answered("llava"),
    pictures("{n}.png", 1),
    array("mix.json"),
    {**SPOKEN, **LAST, "image is a number": Damage(put("image", value=4), "wrong_type")},
    sniffed=True,
)
VISION_FLAN = Case(
    "vision_flan",
    lambda n: spoken(n, task_name="vqa"),
    answered("vision_flan"),
    pictures("{n}.png", 1),
    lines("flan.jsonl"),
    {**SPOKEN, **CUT, "no image": Damage(drop("image"), "missing_key")},
    sniffed=True,
)


def several(n: int) -> dict[str, Any]:
    said = [
        {"role": "user", "content": "First <image> and second <image>: which?"},
        {"role": "assistant", "content": f"The {n}th."},
    ]
    return {"id": f"m{n}", "images": [f"{n}-0.png", f"{n}-1.png"], "conversation": said, "source": "nlvr2"}


def compared(source: str, native: str = "m") -> Any:
    asked = ["First", "and second", ": which?"]
    return lambda n: (
        f"{source}:{native}{n}",
        [("user", [asked[0], picture(n), asked[1], picture(n, 1), asked[2]]), ("assistant", [f"The {n}th."])],
    )


SEVERAL = {
    **JSON,
    "images are null": Damage(put("images", value=None), "count_mismatch"),
    "one picture less": Damage(drop("images", 0), "count_mismatch"),
    "a picture more": Damage(put("images", value=["a.png"] * 3), "count_mismatch"),
    "a picture is null": Damage(put("images", 0, value=None), "wrong_type"),
    "a picture is a number": Damage(put("images", 0, value=3), "wrong_type"),
    **bad_paths("images", 0),
}
MANTIS = Case(
    "mantis",
    several,
    compared("mantis"),
    pictures("{n}-{i}.png", 2),
    lines("mantis.jsonl"),
    {
        **SEVERAL,
        **CUT,
        "no marks": Damage(put("conversation", 0, "content", value="which?"), "count_mismatch"),
        "no conversation": Damage(drop("conversation"), "missing_key"),
        "content is null": Damage(put("conversation", 0, "content", value=None), "missing_key"),
        "another role": Damage(put("conversation", 0, "role", value="tool"), "unknown_role"),
    },
    sniffed=True,
)


def swift_record(n: int) -> dict[str, Any]:
    record = several(n)
    return {"id": f"m{n}", "messages": record["conversation"], "images": record["images"]}


SWIFT = Case(
    "swift",
    swift_record,
    compared("swift"),
    pictures("{n}-{i}.png", 2),
    lines("train.jsonl"),
    {
        **SEVERAL,
        **CUT,
        "messages are an object": Damage(put("messages", value={}), "wrong_type"),
        "a film": Damage(put("videos", value=["a.mp4"]), "other_media"),
        "loss is a text": Damage(put("messages", 0, "loss", value="yes"), "wrong_type"),
        "system is a list": Damage(put("system", value=[]), "wrong_type"),
    },
    sniffed=True,
)


def query(n: int) -> dict[str, Any]:
    return {
        "id": f"q{n}",
        "system": "Be short.",
        "history": [["Hi", "Hello"]],
        "query": "<image>What?",
        "response": f"A {n}.",
        "images": [f"{n}-0.png"],
    }


SWIFT_QUERY = Case(
    "swift",
    query,
    lambda n: (
        f"swift:q{n}",
        [
            ("system", ["Be short."]),
            ("user", ["Hi"]),
            ("assistant", ["Hello"]),
            ("user", [picture(n), "What?"]),
            ("assistant", [f"A {n}."]),
        ],
    ),
    pictures("{n}-{i}.png", 1),
    lines("train.jsonl"),
    {
        **JSON,
        **CUT,
        "no query": Damage(drop("query"), "missing_key"),
        "response is null": Damage(put("response", value=None), "wrong_type"),
        "history is a text": Damage(put("history", value="Hi"), "wrong_type"),
        "a pair of one": Damage(put("history", 0, value=["Hi"]), "count_mismatch"),
        "a pair of numbers": Damage(put("history", 0, value=[1, 2]), "wrong_type"),
        "no picture": Damage(put("images", value=[]), "count_mismatch"),
    },
)


def bench_record(n: int) -> dict[str, Any]:
    said = [
        {"from": "human", "value": "<BEGIN> Go on: <image>"},
        {"from": "gpt", "value": f"Then {n}. <image>"},
    ]
    return {
        "id": f"b{n}",
        "task_name": "wikihow_next_step",
        "image": [f"{n}-0.png", f"{n}-1.png"],
        "conversations": said,
    }


BENCH = Case(
    "interleavedbench",
    bench_record,
    lambda n: (
        f"interleavedbench:b{n}",
        [("user", ["Go on:", picture(n)]), ("assistant", [f"Then {n}.", picture(n, 1)])],
    ),
    pictures("{n}-{i}.png", 2),
    array("interleaved_bench.json"),
    {
        **JSON,
        **LAST,
        "no id": Damage(drop("id"), "missing_key"),
        "no pictures": Damage(drop("image"), "count_mismatch"),
        "a picture more": Damage(put("image", value=["a.png"] * 3), "count_mismatch"),
        "no conversations": Damage(drop("conversations"), "missing_key"),
        **bad_paths("image", 0),
    },
)


def paired(source: str, name: Any, caption: str = "A cat {n}.") -> Any:
    return lambda n: (name(n), [("assistant", [picture(n), caption.format(n=n)])])


PAIRED = {
    **JSON,
    **CUT,
    "no image": Damage(drop("image"), "missing_key"),
    "image is a number": Damage(put("image", value=3), "wrong_type"),
    "no caption": Damage(drop("caption"), "missing_key"),
    "a caption of numbers": Damage(put("caption", value=[1]), "wrong_type"),
    "caption is blank": Damage(put("caption", value=" "), "empty_value"),
    **bad_paths("image"),
}
LAION_LINES = Case(
    "laion",
    lambda n: {"image": f"{n}.png", "caption": f"A cat {n}.", "punsafe": 0.01},
    paired("laion", lambda n: identity("laion", None, [None, f"{n}.png", f"A cat {n}."])),
    pictures("{n}.png", 1),
    lines("pairs.jsonl"),
    PAIRED,
    {"order": "image_first"},
    sniffed=True,
)


def laion_row(n: int) -> dict[str, Any]:
    return {"URL": url(n), "TEXT": "cat.jpg", "top_caption": f"A cat {n}.", "punsafe": 0.1, "similarity": 0.3}


LAION_ROWS = Case(
    "laion",
    laion_row,
    paired("laion", lambda n: identity("laion", None, [url(n), None, f"A cat {n}."])),
    fetched,
    parquet(
        "part.parquet",
        pa.schema([(k, pa.string()) for k in ("URL", "TEXT", "top_caption")] + [("punsafe", pa.float64())]),
    ),
    {
        "no captions": Damage(lambda r: {**r, "top_caption": None, "TEXT": None}, "missing_key"),
        "caption is blank": Damage(put("top_caption", value=""), "empty_value"),
        "no URL": Damage(put("URL", value=None), "missing_key"),
        "not fetched": Damage(put("URL", value="https://x.example/"), "image_remote"),
        "a path for a URL": Damage(put("URL", value="/etc/hostname"), "image_remote"),
    },
    {"order": "image_first"},
)


def laion_sample(n: int) -> dict[str, Any]:
    about = {"caption": "other", "url": url(n), "pwatermark": 0.2}
    return {
        f"{n:09}.png": picture(n),
        f"{n:09}.txt": f"A cat {n}.".encode(),
        f"{n:09}.json": json.dumps(about).encode(),
    }


def _only(*kinds: str) -> Any:
    return lambda sample: {name: data for name, data in sample.items() if name.rpartition(".")[2] in kinds}


def _member(kind: str, data: Any) -> Any:
    return lambda sample: {name: data if name.endswith(kind) else old for name, old in sample.items()}


LAION_TAR = Case(
    "laion",
    laion_sample,
    paired("laion", lambda n: f"laion:00000.tar/{n:09}"),
    lambda n: {},
    tar("00000.tar"),
    {
        "no picture": Damage(_only("txt", "json"), "missing_key"),
        "no caption": Damage(lambda s: {**_only("png")(s)}, "missing_key"),
        "an empty picture": Damage(_member(".png", b""), "image_size"),
        "caption is not UTF-8": Damage(_member(".txt", b"\xff"), "not_utf8"),
        "caption is blank": Damage(_member(".txt", b" \n"), "empty_value"),
        "json is cut off": Damage(_member(".json", b'{"url": '), "broken_json"),
        "json is a list": Damage(_member(".json", b"[]"), "wrong_type"),
        "json is nested absurdly": Damage(_member(".json", b"[" * 100_000), "too_deep"),
        "the picture is a link": Damage(_member(".png", "/etc/hostname"), "archive_link"),
        "the caption is a link": Damage(_member(".txt", "../../x"), "archive_link"),
        "a picture too large": Damage(_member(".png", b"x" * (20 * 2**20 + 1)), "too_large"),
        "two captions": Damage(lambda s: {**s, next(iter(s)).replace("png", "TXT"): b"a"}, "duplicate_key"),
    },
    {"order": "image_first"},
    sniffed=True,
)


def literal(change: Any) -> Any:
    return lambda record: repr(change(record)).encode()


PAIR_SHARD = Case(
    "pair_shards",
    lambda n: {"image": f"{n}.png", "caption": ["A cat", f"{n}."]},
    paired("pair_shards", lambda n: identity("pair_shards", None, [f"{n}.png", f"a cat {n}."]), "a cat {n}."),
    pictures("{n}.png", 1),
    lines("0000001.txt"),
    {
        # a trailing comma makes a literal that is none of JSON's
        **{name: damage for name, damage in PAIRED.items() if name != "a trailing comma"},
        "a literal without a caption": Damage(literal(drop("caption")), "missing_key"),
        "a literal that would call": Damage(
            lambda r: b"{'image': __import__('os').system('touch called'), 'caption': 'x'}", "broken_json"
        ),
        "a literal that is a name": Damage(lambda r: b"{'image': path, 'caption': 'x'}", "broken_json"),
        "a literal nested absurdly": Damage(lambda r: b"(" * 50_000 + b")" * 50_000, "broken_json"),
        "a literal with half a pair": Damage(lambda r: b"{'image': '\\ud800', 'caption': 'x'}", "lone_surrogate"),
        "a literal of bytes": Damage(lambda r: b"{'image': b'x', 'caption': 'x'}", "broken_json"),
    },
    {"order": "image_first"},
    sniffed=True,
)

ADE20K = Case(
    "ade20k",
    lambda n: {"image_id": f"ADE_{n}", "caption": f"A room {n}."},
    lambda n: (
        f"ade20k:training/ADE_{n}",
        [("user", [picture(n), f"A room {n}."]), ("assistant", [picture(n, 1)])],
    ),
    lambda n: {
        f"annotations_with_color/training/ADE_{n}.png": picture(n),
        f"images/training/ADE_{n}.jpg": picture(n, 1),
    },
    array("training.json"),
    {
        **JSON,
        **LAST,
        "no image_id": Damage(drop("image_id"), "missing_key"),
        "image_id is null": Damage(put("image_id", value=None), "wrong_type"),
        "no caption": Damage(drop("caption"), "missing_key"),
        "caption is null": Damage(put("caption", value=None), "wrong_type"),
        "an absent photo": Damage(put("image_id", value="ADE_99"), "image_missing"),
        "an id that climbs out": Damage(put("image_id", value="../../../x"), "image_path"),
    },
)

MAPPING = Case(
    "mapping",
    lambda n: {
        "uid": n,
        "ask": {"title": f"T{n}"},
        "steps": [{"say": "One.", "file": f"{n}-0.png"}, {"say": "Two.", "file": f"{n}-1.png"}],
    },
    lambda n: (
        f"mapping:{n}",
        [("user", [f"T{n}"]), ("assistant", ["One.", picture(n), "Two.", picture(n, 1)])],
    ),
    pictures("{n}-{i}.png", 2),
    lines("unknown.jsonl"),
    {
        **JSON,
        **CUT,
        "no id": Damage(drop("uid"), "missing_key"),
        "id is a list": Damage(put("uid", value=[1]), "wrong_type"),
        "no title": Damage(drop("ask", "title"), "missing_key"),
        "ask is a text": Damage(put("ask", value="T"), "missing_key"),
        "steps are null": Damage(put("steps", value=None), "missing_key"),
        "steps are a text": Damage(put("steps", value="One."), "wrong_type"),
        "a step is a text": Damage(put("steps", 0, value="One."), "wrong_type"),
        "a step says a number": Damage(put("steps", 0, "say", value=1), "wrong_type"),
        **bad_paths("steps", 0, "file"),
    },
    {
        "id": "uid",
        "input": [{"text": "ask.title"}],
        "output": [{"each": "steps", "of": [{"text": "say"}, {"image": "file"}]}],
    },
    sniffed=True,
)

CASES = {
    "instruct_pix2pix": PIX2PIX,
    "instruct_pix2pix, parquet": PIX2PIX_ROWS,
    "magicbrush": MAGICBRUSH,
    "magicbrush, sessions": SESSIONS,
    "llava": LLAVA,
    "vision_flan": VISION_FLAN,
    "mantis": MANTIS,
    "swift": SWIFT,
    "swift, queries": SWIFT_QUERY,
    "interleavedbench": BENCH,
    "laion, lines": LAION_LINES,
    "laion, parquet": LAION_ROWS,
    "laion, webdataset": LAION_TAR,
    "pair_shards": PAIR_SHARD,
    "ade20k": ADE20K,
    "mapping": MAPPING,
}
