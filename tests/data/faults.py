"""Illustrated documents of which some have a fault: a table of the faults, how each is planted, and what drops it.

Two sources: `chat/documents.jsonl` in the chat form, and `swift/documents.jsonl`, where `<image>` marks in a text stand
for pictures of a list. `write_corpus` puts faults and harmless oddities at random places among good documents and says
what must become of every line.
"""

import json
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image as PILImage

from tests.data.corpus import encoded, picture, write
from weft.data.filters.decontaminate import hashes_of
from weft.document import Document, assistant

TEXT = "We walked down to the sea in the morning, and the water was as warm as it had been in the summer."
BENCHMARK = "The keeper of the old light house went to bed when the sun came up over the hills."
PICTURES = 40

In = Literal["chat", "swift"]


@dataclass(frozen=True)
class Case:
    """One kind of record. `make` gives its line, from an id that no other record has."""

    make: Callable[[str], bytes]
    stage: str | None = None
    """None: it is kept."""
    reason: str | None = None
    field: str | None = None
    into: In = "chat"


def record(identity: Any, *parts: Any, **others: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": "Show me the sea."}, {"role": "assistant", "content": list(parts)}]
    return {"id": identity, "messages": said, **others}


def text(value: Any = TEXT) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(value: Any) -> dict[str, Any]:
    return {"type": "image", "image": value}


def named(identity: str) -> str:
    """A good picture, another one for another id."""
    return f"{sum(identity.encode()) % PICTURES}.png"


def line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def good(identity: str) -> bytes:
    number = sum(identity.encode())
    pictures = [image(f"{(number + i) % PICTURES}.png") for i in range(1 + number % 3)]
    return line(record(identity, text(f"{TEXT} It was day {identity}."), *pictures))


def good_swift(identity: str) -> bytes:
    return line(swift(identity, f"{TEXT} It was day {identity}. <image> The sun set. <image>", ["1.png", "2.png"]))


def swift(identity: str, said: Any, images: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": "Show me the sea."}, {"role": "assistant", "content": said}]
    return {"id": identity, "messages": said, "images": images}


def _of(**changes: Any) -> Callable[[str], bytes]:
    """A good record with other values of some of its fields."""
    return lambda identity: line({**record(identity, text(), image(named(identity))), **changes})


def _parts(*parts: Any, **others: Any) -> Callable[[str], bytes]:
    return lambda identity: line(record(identity, *parts, **others))


def _answer(content: Any) -> Callable[[str], bytes]:
    user = {"role": "user", "content": "Show me the sea."}
    return _of(messages=[user, {"role": "assistant", "content": content}])


def _bad(make: Callable[[str], bytes], field: str | None) -> Case:
    return Case(make, "read", "bad_record", field)


def _path(value: str, reason: str) -> Case:
    return Case(_parts(text(), image(value)), "read", reason, "messages[1].content[1].image")


def _picture(name: str, reason: str, stage: str = "image_limits") -> Case:
    return Case(_parts(text(), image(f"bad/{name}")), stage, reason, "messages[1].content[1]")


def _swift(said: Any, images: Any, reason: str, field: str) -> Case:
    return Case(lambda identity: line(swift(identity, said, images)), "read", reason, field, "swift")


BAD_PICTURES = {
    "checksum.png": b"",
    "blank.png": encoded(PILImage.new("RGB", (32, 32), (9, 9, 9))),
    "small.png": encoded(picture(7, (32, 4))),
    "narrow.png": encoded(picture(7, (96, 24))),
    "wide.png": encoded(picture(7, (24, 400))),
    "benchmark.png": encoded(picture(1000, (32, 32))),
    "again.png": encoded(picture(3, (32, 32))),
    "alike.jpg": encoded(picture(3, (32, 32)), "JPEG", quality=95),
}
_whole = bytearray(encoded(picture(8, (32, 32))))
_whole[_whole.index(b"IDAT") + 20] ^= 1
BAD_PICTURES["checksum.png"] = bytes(_whole)

FAULTS: dict[str, Case] = {
    # no JSON, or none that is a record
    "cut line": Case(lambda i: good(i)[:60] + b"\n", "read", "broken_json"),
    "trailing comma": Case(lambda i: good(i)[:-2] + b",}\n", "read", "broken_json"),
    "single quotes": Case(lambda i: good(i).replace(b'"', b"'"), "read", "broken_json"),
    "two records in a line": Case(lambda i: good(i)[:-1] + good(i), "read", "broken_json"),
    "NaN": Case(_of(meta={"score": float("nan")}), "read", "bad_number"),
    "infinity": Case(_of(meta={"score": float("-inf")}), "read", "bad_number"),
    "duplicate key": Case(lambda i: b'{"id": "x", ' + good(i)[1:], "read", "duplicate_key", "id"),
    "lone surrogate": Case(lambda i: good(i).replace(b"It was", b"\\ud83d It was", 1), "read", "lone_surrogate"),
    "not UTF-8": Case(lambda i: good(i).replace(b"It was", b"It\xff was", 1), "read", "not_utf8"),
    "UTF-16": Case(
        lambda i: good(i)[:-1].decode().encode("utf-16-be").replace(b"\n", b" ") + b"\n", "read", "broken_json"
    ),
    "nested lists": Case(lambda i: b"[" * 50_000 + b"]" * 50_000 + b"\n", "read", "too_deep"),
    "null": _bad(lambda i: b"null\n", None),
    "a list": _bad(lambda i: b"[" + good(i)[:-1] + b"]\n", None),
    "a number": _bad(lambda i: b"17\n", None),
    "a string": _bad(lambda i: b'"' + i.encode() + b'"\n', None),
    # wrong types of each field, by the schema
    "id is a number": _bad(_of(id=17), "id"),
    "id is a list": _bad(_of(id=["x"]), "id"),
    "meta is a list": _bad(_of(meta=[1]), "meta"),
    "no messages": _bad(lambda i: line({"id": i}), "messages"),
    "messages is empty": _bad(_of(messages=[]), "messages"),
    "messages is null": _bad(_of(messages=None), "messages"),
    "messages is a string": _bad(_of(messages="none"), "messages"),
    "messages is an object": _bad(_of(messages={"role": "user"}), "messages"),
    "message is a string": _bad(_of(messages=["hello"]), "messages[0]"),
    "message is a list": _bad(_of(messages=[[["a"]]]), "messages[0]"),
    "unknown role": _bad(_of(messages=[{"role": "robot", "content": "hi"}]), "messages[0].role"),
    "no role": _bad(_of(messages=[{"content": "hi"}]), "messages[0].role"),
    "role is a number": _bad(_of(messages=[{"role": 1, "content": "hi"}]), "messages[0].role"),
    "no content": _bad(_of(messages=[{"role": "user"}]), "messages[0].content"),
    "content is null": _bad(_answer(None), "messages[1].content"),
    "content is a number": _bad(_answer(7), "messages[1].content"),
    "content is an object": _bad(_answer(text()), "messages[1].content"),
    "loss is a string": _bad(_of(messages=[{"role": "assistant", "content": "hi", "loss": "yes"}]), "messages[0].loss"),
    "unknown part": _bad(_parts(text(), {"type": "sound", "sound": "a.wav"}), "messages[1].content[1].type"),
    "part without type": _bad(_parts({"text": "hi"}), "messages[1].content[0].type"),
    "part is a string": _bad(_parts("hi"), "messages[1].content[0]"),
    "part is a list": _bad(_parts([text()]), "messages[1].content[0]"),
    "text is null": _bad(_parts(text(None)), "messages[1].content[0].text"),
    "text is a number": _bad(_parts(text(3)), "messages[1].content[0].text"),
    "picture without a path": _bad(_parts({"type": "image"}), "messages[1].content[0].image"),
    "path is empty": _bad(_parts(image("")), "messages[1].content[0].image"),
    "path is a number": _bad(_parts(image(5)), "messages[1].content[0].image"),
    "path is a list": _bad(_parts(image(["1.png"])), "messages[1].content[0].image"),
    "path is an object": _bad(_parts(image({"url": "1.png"})), "messages[1].content[0].image"),
    # where pictures are said to be
    "no such picture": _path("none.png", "image_missing"),
    "a folder": _path("bad", "image_missing"),
    "a name too long": _path("x" * 5000, "image_missing"),
    "a URL": _path("https://example.org/1.png", "image_missing"),
    "an absolute path": _path("/etc/hostname", "image_path"),
    "a path that climbs": _path("../outside.png", "image_path"),
    "a path that climbs inside": _path("bad/../../outside.png", "image_path"),
    "a drive": _path("C:\\1.png", "image_path"),
    "a share": _path("\\\\host\\1.png", "image_path"),
    "a NUL in a path": _path("1.png\0.jpg", "image_path"),
    "a link outside": _path("link.png", "image_path"),
    # what pictures are
    "a damaged picture": _picture("checksum.png", "image_damaged"),
    "a blank picture": _picture("blank.png", "image_blank"),
    "a small picture": _picture("small.png", "image_too_small"),
    "a narrow picture": _picture("narrow.png", "image_aspect"),
    "a large picture": _picture("wide.png", "image_too_large"),
    # what a document is
    "nothing is said": Case(_answer([]), "read", "empty"),
    "white space is said": Case(_answer(" \n\t"), "has_answer", "no_answer", "messages"),
    "nobody answers": Case(_of(messages=[{"role": "user", "content": TEXT}]), "has_answer", "no_answer", "messages"),
    "nothing to learn": Case(
        _of(messages=[{"role": "assistant", "content": [text(), image("1.png")], "loss": False}]),
        "has_answer",
        "no_answer",
        "messages",
    ),
    "no pictures": Case(_parts(text()), "image_count", "too_few_images"),
    "200 pictures": Case(
        _parts(text(), *(image(f"{i % PICTURES}.png") for i in range(200))), "image_count", "too_many_images"
    ),
    "longer than the context": Case(_parts(text(TEXT * 60), image("1.png")), "text_length", "too_much_text"),
    "hardly any text": Case(
        _of(messages=[{"role": "assistant", "content": [text("a"), image("1.png")]}]), "text_length", "too_little_text"
    ),
    "13 sentences": Case(
        _parts(text(TEXT + " It is so." * 13), image("1.png")), "sentence_count", "too_many_sentences"
    ),
    "a picture twice": Case(
        _parts(text(), image("3.png"), image("bad/again.png")), "duplicate_images", "duplicate_image"
    ),
    "a picture that looks like another": Case(
        _parts(text(), image("3.png"), image("bad/alike.jpg")), "duplicate_images", "look_alike_image"
    ),
    "a page called unsafe": Case(_of(meta={"punsafe": 0.9}), "safety", "unsafe"),
    "a licence that is not wanted": Case(
        lambda i: line(record(i, text(), image("1.png"), meta={"images": {"1.png": {"licence": "all rights"}}})),
        "licence",
        "licence",
    ),
    "access that is not wanted": Case(_of(meta={"access": "gated"}), "licence", "access"),
    "a picture of a benchmark": Case(_parts(text(), image("bad/benchmark.png")), "decontaminate", "contaminated_image"),
    "a text of a benchmark": Case(
        _parts(text(BENCHMARK.upper()), image("1.png")), "decontaminate", "contaminated_text"
    ),
    "text of no use": Case(_parts(text("x7# " * 20), image("1.png")), "text_quality", "text_quality"),
    "an id that was there": Case(lambda i: good("first"), "unique", "duplicate_id", "id"),
    # marks for pictures
    "a mark too many": _swift(f"{TEXT} <image> and <image>", ["1.png"], "count_mismatch", "images"),
    "a mark too few": _swift(f"{TEXT} <image>", ["1.png", "2.png"], "count_mismatch", "images"),
    "marks without pictures": _swift(f"{TEXT} <image>", [], "count_mismatch", "images"),
    "a picture that is a number": _swift(f"{TEXT} <image>", [5], "wrong_type", "images[0]"),
    "a picture that is null": _swift(f"{TEXT} <image>", [None], "wrong_type", "images[0]"),
    "text that is a list": _swift([TEXT], ["1.png"], "wrong_type", "messages[1].content"),
    "a video": Case(
        lambda i: line({**swift(i, TEXT, []), "videos": ["a.mp4"]}), "read", "other_media", "videos", "swift"
    ),
    "another role": Case(
        lambda i: line({"id": i, "messages": [{"role": "robot", "content": TEXT}]}),
        "read",
        "unknown_role",
        "messages[0].role",
        "swift",
    ),
}
ONCE = {"a line of 17 MB": Case(lambda i: good(i)[:-1] + b" " * 17_000_000 + b"\n", "read", "too_large")}
"""Too large to be planted often."""

ODDITIES: dict[str, Case] = {
    "a byte order mark": Case(lambda i: b"\xef\xbb\xbf" + good(i)),
    "a carriage return": Case(lambda i: good(i)[:-1] + b"\r\n"),
    "spaces around": Case(lambda i: b" \t" + good(i)[:-1] + b"  \n"),
    "escapes": Case(
        lambda i: json.dumps(json.loads(good(i)), ensure_ascii=True).encode().replace(b"sea", b"\\u0073ea") + b"\n"
    ),
    "right to left": Case(_parts(text(f"\u202e{TEXT}\u202c \u05e9\u05dc\u05d5\u05dd"), image("1.png"))),
    "zero width": Case(_parts(text(f"{TEXT}\u200b\u200d\ufeff"), image("1.png"))),
    "special tokens": Case(_parts(text(f"{TEXT} <image></s><|endoftext|>[IMG]<s>[INST]"), image("1.png"))),
    "NUL in a text": Case(_parts(text(f"{TEXT} \0"), image("1.png"))),
    "decomposed letters": Case(_parts(text(unicodedata.normalize("NFD", f"{TEXT} Ünïcödé")), image("1.png"))),
    "an assistant first": Case(_of(messages=[{"role": "assistant", "content": [text(), image("1.png")]}])),
    "a system turn": Case(
        _of(messages=[{"role": "system", "content": "Be kind."}, *record("", text(), image("1.png"))["messages"]])
    ),
    "keys that nobody knows": Case(_of(nobody={"knows": [1, None, {"a": "b"}]})),
    "a name in other letters": Case(_parts(text(), image("bild ü\n😀.png"))),
    "a name in capitals": Case(_parts(text(), image("UPPER.PNG"))),
    "a name without an ending": Case(_parts(text(), image("no_ending"))),
    "the same content": Case(_parts(text(), image("1.png"))),
    "pictures without a mark": Case(lambda i: line(swift(i, TEXT, ["1.png", "2.png"])), into="swift"),
    "one picture that is no list": Case(lambda i: line(swift(i, f"{TEXT} <image>", "1.png")), into="swift"),
}

FILTERS = (
    {"kind": "has_answer"},
    {"kind": "image_count", "min": 1, "max": 6},
    {"kind": "text_length", "min": 20, "max": 4000},
    {"kind": "image_limits", "on_bad_image": "record", "min_side": 16, "max_side": 200},
    {"kind": "sentence_count", "max": 12},
    {"kind": "safety"},
    {"kind": "licence", "access": "open", "pictures": ["cc-by"], "on_other_licence": "record"},
    {"kind": "duplicate_images"},
    {"kind": "text_quality"},
)


@dataclass(frozen=True)
class Corpus:
    recipe: dict[str, Any]
    """Sources and filters of a build."""
    dropped: dict[tuple[int, int], Case]
    """Source and line of every record that must go."""
    kept: int
    names: dict[tuple[int, int], str]
    """Of the kinds of all but good records."""


def write_corpus(folder: Path, number: int, each: int, seed: int = 0) -> Corpus:
    """Write about `number` records, `each` of every kind among them; a fifth of them in the second source."""
    rng = random.Random(seed)
    pictures = {f"{i}.png": encoded(picture(i, (32, 32))) for i in range(PICTURES)}
    odd = dict.fromkeys(("bild ü\n😀.png", "UPPER.PNG", "no_ending"), pictures["1.png"])
    bad = {f"bad/{name}": data for name, data in BAD_PICTURES.items()}
    for into in ("chat", "swift"):
        write(folder / into, {**pictures, **odd, **bad})
    write(folder, {"outside.png": pictures["1.png"]})
    (folder / "chat" / "link.png").symlink_to("../outside.png")
    benchmark = Document((assistant(BENCHMARK),)), Document((assistant(_image("benchmark.png")),))
    listed = [entry for entry in hashes_of(benchmark) if not entry.startswith("look")]
    (folder / "benchmark.txt").write_text("\n".join(listed) + "\n")

    kinds = [*FAULTS.items(), *ODDITIES.items()]
    planted = [(name, case) for name, case in kinds for _ in range(each)] + list(ONCE.items())
    dropped, names, kept = {}, {}, 0
    for source, into in enumerate(("chat", "swift")):
        cases = [(name, case) for name, case in planted if case.into == into]
        plain = good if into == "chat" else good_swift
        room = max((number - len(planted)) * (4 if into == "chat" else 1) // 5, 1)
        lines = [*((None, Case(plain)) for _ in range(room)), *cases]
        rng.shuffle(lines)
        if into == "chat":
            lines.insert(0, (None, Case(lambda _: good("first"))))
        with open(folder / into / "documents.jsonl", "wb") as file:
            for at, (name, case) in enumerate(lines, start=1):
                file.write(case.make(f"{into}-{at}"))
                if name is not None:
                    names[source, at] = name
                if case.reason is None:
                    kept += 1
                else:
                    dropped[source, at] = case
    sources = (
        {"kind": "chat_jsonl", "path": str(folder / "chat" / "documents.jsonl")},
        {"kind": "swift", "path": str(folder / "swift" / "documents.jsonl")},
    )
    last = {"kind": "decontaminate", "hashes": str(folder / "benchmark.txt")}
    return Corpus({"sources": sources, "filters": (*FILTERS, last)}, dropped, kept, names)


def _image(name: str) -> Any:
    from weft.document import Image

    return Image(BAD_PICTURES[name], name)
