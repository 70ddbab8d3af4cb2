"""Records of stories and dialogues: CoMM, VIST, YouCook2, MMDialog, PororoSV, FlintstonesSV."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.data.corpus import write
from tests.data.records.case import CUT, JSON, Case, Damage, array, drop, lines, members, picture, put, text_of


def pictures(pattern: str, count: int, first: int = 0) -> Any:
    return lambda n: {pattern.format(n=n, i=i + first): picture(n, i) for i in range(count)}


PATHS = {
    "path climbs out": ("../x.png", "image_path"),
    "absolute path": ("/etc/hostname", "image_path"),
    "a drive": ("C:\\x.png", "image_path"),
    "NUL in the path": ("a\0b.png", "image_path"),
    "absent file": ("none.png", "image_missing"),
    "a folder": (".", "image_missing"),
}
"""Names of pictures that must not be followed, with the reason."""


def bad_paths(*path: Any, costs: str = "record") -> dict[str, Damage]:
    return {name: Damage(put(*path, value=value), reason, costs) for name, (value, reason) in PATHS.items()}


def comm_record(n: int) -> dict[str, Any]:
    def text(value: str) -> dict[str, Any]:
        return {"type": "text", "content": value}

    def image(i: int) -> dict[str, Any]:
        return {"type": "image", "content": None, "url": f"https://c.example/{n}/{i}", "image_path": f"{n}-{i}.png"}

    return {
        "data_id": n,
        "dataset_type": "wikihow",
        "title": f"How to {n}",
        "summary_info": [text("In short.")],
        "step_info": [[text("Step one."), image(0)], [text("Step two."), image(1)]],
    }


COMM_DAMAGE = {
    "no title": Damage(drop("title"), "missing_key"),
    "title is null": Damage(put("title", value=None), "wrong_type"),
    "title is blank": Damage(put("title", value=" "), "empty_value"),
    "no step_info": Damage(drop("step_info"), "missing_key"),
    "a step is an object": Damage(put("step_info", 0, value={}), "wrong_type"),
    "a content is a text": Damage(put("step_info", 0, 0, value="Step"), "wrong_type"),
    "a sound": Damage(put("step_info", 0, 0, "type", value="sound"), "unknown_type"),
    "a text is null": Damage(put("step_info", 0, 0, "content", value=None), "wrong_type"),
    "no image_path": Damage(drop("step_info", 0, 1, "image_path"), "missing_key"),
    **bad_paths("step_info", 0, 1, "image_path"),
}


def comm_document(n: int):
    answer = ["In short.", "Step one.", picture(n), "Step two.", picture(n, 1)]
    return f"comm:{n}", [("user", [f"write an illustrated document: How to {n}"]), ("assistant", answer)]


def saved_list(folder: Path, records: Sequence[Any]) -> None:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(list(records), folder / "train.pt")


COMM = Case(
    "comm", comm_record, comm_document, pictures("{n}-{i}.png", 2), lines("c.jsonl"), {**JSON, **CUT, **COMM_DAMAGE}
)
COMM_SAVED = Case(
    "comm",
    comm_record,
    comm_document,
    pictures("{n}-{i}.png", 2),
    saved_list,
    {
        **COMM_DAMAGE,
        "a number instead": Damage(lambda record: 7, "wrong_type"),
        "a set in it": Damage(put("note", value={1}), "wrong_type"),
        "half a surrogate pair": Damage(put("title", value="\ud800"), "lone_surrogate"),
    },
)


def vist_document(n: int):
    parts = [part for i in range(5) for part in (f"Sentence {i} of {n}.", picture(n, i))]
    return f"vist:{n}", [("assistant", parts)]


def vist_story(n: int) -> list[dict[str, Any]]:
    """The sentences of a story as annotations, not in order."""
    return [
        {
            "story_id": str(n),
            "storylet_id": f"{n}{i}",
            "album_id": "1",
            "photo_flickr_id": f"{n}0{i}",
            "worker_arranged_photo_order": i,
            "text": f"sentence {i} of [male].",
            "original_text": f"Sentence {i} of {n}.",
        }
        for i in (3, 0, 1, 4, 2)
    ]


def vist(folder: Path, stories: Sequence[Any]) -> None:
    photos = [{"id": f"{n}0{i}", "url_o": "https://f.example", "license": "3"} for n in range(1, 6) for i in range(5)]
    rows = [b"[" + text_of(row) + b"]" for story in stories for row in story]
    head = b'{"info": {"a": [1, "]"]}, "images": ' + json.dumps(photos).encode() + b', "albums": [], "annotations": ['
    write(folder, {"val.story-in-sequence.json": head + b", ".join(rows) + b'], "type": "sis"}'})


VIST = Case(
    "vist",
    vist_story,
    vist_document,
    pictures("val/{n}0{i}.png", 5),
    vist,
    {
        "four sentences": Damage(drop(0), "story_incomplete"),
        "six sentences": Damage(lambda s: [*s, s[0]], "story_incomplete"),
        "one place twice": Damage(put(0, "worker_arranged_photo_order", value=0), "story_incomplete"),
        "a place out of range": Damage(put(0, "worker_arranged_photo_order", value=5), "story_incomplete"),
        "no place": Damage(put(0, "worker_arranged_photo_order", value=None), "wrong_type"),
        "no photo": Damage(drop(0, "photo_flickr_id"), "wrong_type"),
        "a text is a number": Damage(put(0, "original_text", value=1), "wrong_type"),
        "no text": Damage(lambda s: [{k: v for k, v in s[0].items() if "text" not in k}, *s[1:]], "wrong_type"),
        **bad_paths(0, "photo_flickr_id"),
    },
)


def retold(n: int) -> dict[str, Any]:
    order = (3, 0, 1, 4, 2)
    rows = [{"caption": f"Sentence {i} of {n}.", "image_id": f"{n}0{i}", "sequence_index": i} for i in order]
    return {str(n): rows}


VIST_STORIES = Case(
    "vist",
    retold,
    vist_document,
    pictures("images/val_images/{n}0{i}.png", 5),
    members("val_formatted_filtered.json", b'{"annotations": {', b"}}"),
    {
        "not a list": Damage(put("2", value="story"), "wrong_type"),
        "a row is null": Damage(put("2", 0, value=None), "wrong_type"),
        "four rows": Damage(drop("2", 0), "story_incomplete"),
        "no caption": Damage(drop("2", 0, "caption"), "missing_key"),
        "a caption is null": Damage(put("2", 0, "caption", value=None), "wrong_type"),
        "no image_id": Damage(drop("2", 0, "image_id"), "missing_key"),
        "no sequence_index": Damage(drop("2", 0, "sequence_index"), "missing_key"),
        "a place out of range": Damage(put("2", 0, "sequence_index", value=9), "story_incomplete"),
        "not UTF-8": Damage(lambda r: text_of(r).replace(b"Sentence", b"\xff", 1), "not_utf8"),
        "a number that is none": Damage(lambda r: text_of(r).replace(b": 3}", b": NaN}"), "bad_number"),
        "broken": Damage(lambda r: text_of(r).replace(b'"caption":', b'"caption"', 1), "broken_json"),
        **bad_paths("2", 0, "image_id"),
    },
)


def recipe(n: int) -> dict[str, Any]:
    rows = [{"id": i, "segment": [10 * i, 10 * i + 5], "sentence": f"Do {i} of {n}."} for i in (1, 0)]
    return {f"vid{n}": {"subset": "training", "recipe_type": "101", "duration": 90.5, "annotations": rows}}


YOUCOOK2 = Case(
    "youcook2",
    recipe,
    lambda n: (
        f"youcook2:vid{n}",
        [("assistant", [f"Do 0 of {n}.", picture(n), f"Do 1 of {n}.", picture(n, 1)])],
    ),
    pictures("vid{n}/{i}.jpg", 2),
    members("youcookii_annotations_trainval.json", b'{"database": {', b"}}"),
    {
        "a recipe is a list": Damage(put("vid2", value=[]), "wrong_type"),
        "no annotations": Damage(drop("vid2", "annotations"), "missing_key"),
        "annotations are empty": Damage(put("vid2", "annotations", value=[]), "empty_value"),
        "no sentence": Damage(drop("vid2", "annotations", 0, "sentence"), "missing_key"),
        "a sentence is null": Damage(put("vid2", "annotations", 0, "sentence", value=None), "wrong_type"),
        "a sentence is blank": Damage(put("vid2", "annotations", 0, "sentence", value=""), "empty_text", "text"),
        "no segment": Damage(drop("vid2", "annotations", 0, "segment"), "missing_key"),
        "a segment of one": Damage(put("vid2", "annotations", 0, "segment", value=[1]), "bad_segment"),
        "a segment backwards": Damage(put("vid2", "annotations", 0, "segment", value=[9, 1]), "bad_segment"),
        "no id": Damage(drop("vid2", "annotations", 0, "id"), "missing_key"),
        "an absent frame": Damage(put("vid2", "annotations", 0, "id", value=77), "image_missing"),
        "an id that climbs out": Damage(put("vid2", "annotations", 0, "id", value="../../x"), "image_path"),
        "not UTF-8": Damage(lambda r: text_of(r).replace(b"Do", b"\xff", 1), "not_utf8"),
    },
)


def dialogue(n: int) -> dict[str, Any]:
    return {
        "conversation_id": f"train-{n}",
        "conversation": [
            {"turn": [{"__TEXT__": f"Hello {n} :waving_hand:"}]},
            {"turn": [{"__TEXT__": "Look"}, {"__MEDIA__": f"-{n}00"}]},
        ],
        "negative_candidate_texts": ["no"],
    }


MMDIALOG = Case(
    "mmdialog",
    dialogue,
    lambda n: (f"mmdialog:train-{n}", [("user", [f"Hello {n} :waving_hand:"]), ("assistant", ["Look", picture(n)])]),
    pictures("-{n}00.jpg", 1),
    array("conversations.json"),
    {
        **JSON,
        **{name: Damage(d.change, d.reason, last=True) for name, d in CUT.items()},
        "no id": Damage(drop("conversation_id"), "missing_key"),
        "id is empty": Damage(put("conversation_id", value=""), "empty_value"),
        "no conversation": Damage(drop("conversation"), "missing_key"),
        "conversation is empty": Damage(put("conversation", value=[]), "empty_value"),
        "a turn is null": Damage(put("conversation", 0, "turn", value=None), "wrong_type"),
        "a turn is a text": Damage(put("conversation", 0, value="hello"), "wrong_type"),
        "an element of another kind": Damage(put("conversation", 0, "turn", 0, value={"x": 1}), "missing_key"),
        "a text is a list": Damage(put("conversation", 0, "turn", 0, "__TEXT__", value=["a"]), "wrong_type"),
        "a text is blank": Damage(put("conversation", 0, "turn", 0, "__TEXT__", value=""), "empty_text", "text"),
        "a text is too long": Damage(
            put("conversation", 0, "turn", 0, "__TEXT__", value="x" * (2**20 + 1)), "text_too_long", "text"
        ),
        **bad_paths("conversation", 1, "turn", 1, "__MEDIA__"),
    },
)


def followed(n: int) -> dict[str, Any]:
    return {f"clip/{n}_0": [f"clip/{n}_{i}" for i in range(1, 5)]}


def told(name: str) -> Any:
    def document(n: int):
        parts = [part for i in range(5) for part in (f"{name} is in frame {i}.", picture(n, i))]
        return f"{name.lower() if name == 'Pororo' else 'flintstones'}:clip/{n}_0", [("assistant", parts)]

    return document


def pororo(folder: Path, records: Sequence[Any]) -> None:
    captions = {f"clip/{n}_{i}": [f"PORORO  is\nin frame {i}.", "other"] for n in range(1, 6) for i in range(5)}
    captions["clip/silent"], captions["clip/number"] = [], 7
    write(folder, {"descriptions.json": json.dumps(captions).encode(), "old.npy": b"pickle"})
    members("following_cache4.json")(folder, records)


def flintstones(folder: Path, records: Sequence[Any]) -> None:
    rows = [
        {"globalID": f"clip/{n}_{i}", "description": f"Fred is in\tframe {i}.", "boxes": [[1, 2]]}
        for n in range(1, 6)
        for i in range(5)
    ]
    rows += [{"globalID": "clip/silent", "description": []}, {"globalID": "clip/number", "description": 7}]
    write(folder, {"flintstones_annotations_v1-0.json": json.dumps(rows).encode()})
    members("following_cache4.json")(folder, records)


FRAMES = {
    "followers are a text": Damage(put("clip/2_0", value="clip/2_1"), "wrong_type"),
    "followers are null": Damage(put("clip/2_0", value=None), "wrong_type"),
    "three followers": Damage(drop("clip/2_0", 0), "story_incomplete"),
    "five followers": Damage(put("clip/2_0", value=["clip/2_1"] * 5), "story_incomplete"),
    "a follower is a number": Damage(put("clip/2_0", 0, value=3), "wrong_type"),
    "a frame without a caption": Damage(put("clip/2_0", 0, value="clip/9_9"), "missing_key"),
    "a path that climbs out": Damage(put("clip/2_0", 0, value="../x"), "missing_key"),
    "an empty caption": Damage(put("clip/2_0", 0, value="clip/silent"), "wrong_type"),
    "a caption that is a number": Damage(put("clip/2_0", 0, value="clip/number"), "wrong_type"),
    "not UTF-8": Damage(lambda r: text_of(r).replace(b"2_1", b"\xff", 1), "not_utf8"),
    "broken": Damage(lambda r: text_of(r).replace(b'", "', b'" "', 1), "broken_json"),
    "half a surrogate pair": Damage(lambda r: text_of(r).replace(b"2_1", b"\\ud800", 1), "lone_surrogate"),
}

PORORO = Case("pororo", followed, told("Pororo"), pictures("clip/{n}_{i}.png", 5), pororo, FRAMES)
FLINTSTONES = Case("flintstones", followed, told("Fred"), pictures("clip/{n}_{i}.png", 5), flintstones, FRAMES)

CASES = {
    "comm": COMM,
    "comm, saved by torch": COMM_SAVED,
    "vist": VIST,
    "vist, whole stories": VIST_STORIES,
    "youcook2": YOUCOOK2,
    "mmdialog": MMDIALOG,
    "pororo": PORORO,
    "flintstones": FLINTSTONES,
}
