"""Every form gives back what it carries, says what it cannot, and is whole or not there; reading trusts nothing."""

import io
import json
import random
import tarfile

import pytest

from tests.data.corpus import encoded, picture, png, write
from tests.data.running import contents
from weft.atomic import verify_folder
from weft.data.build import BuildConfig, build
from weft.data.dataset import open_dataset
from weft.data.exchange import FORMS, transfer, webdataset
from weft.data.exchange.files import Files
from weft.data.exchange.transfer import EXPORT, LEFT_OUT, export_data, import_data
from weft.data.exchange.webdataset import index_of, read_member
from weft.data.filters.removal import about
from weft.data.sources import SOURCES
from weft.data.stage import run_stages
from weft.document import Document, Image, Text, Turn, assistant, user
from weft.errors import DocumentError, UsageError

WORDS = (
    "a fox",
    "runs\nhome",
    " left",
    "right ",
    "",
    " \n",
    "<image>",
    "<video> x",
    "<im<image>age>",
    "e\u0301",
    "\x07b",
)
PICTURES = [encoded(picture(i, (9, 7)), kind) for i, kind in enumerate(("PNG", "JPEG", "GIF", "WEBP", "BMP"))]
PICTURES.append(b"no picture at all")
PATHS = ("c.jpg", "a/b.png", "c.jpg", None, "d", None)


def random_document(number: int, rng: random.Random) -> Document:
    """Whatever a document may hold, the likely and the odd."""
    odd = number % 2
    words = WORDS if odd else WORDS[:2]

    def part():
        if rng.random() < 0.5:
            return Text(rng.choice(words))
        return Image(*rng.choice(list(zip(PICTURES, PATHS, strict=True))))

    def turn(role):
        parts = [part() for _ in range(rng.randrange(0 if odd else 1, 4))]
        if not odd:  # no two texts side by side
            parts = [p for p, q in zip(parts, [None, *parts], strict=False) if not (type(p) is type(q) is Text)]
        return Turn(role, tuple(parts), rng.choice([None, True, False]) if odd else None)

    roles = ["user", "assistant"] * rng.randrange(1, 3)
    if odd:
        roles = [rng.choice(["system", "user", "assistant"]) for _ in range(rng.randrange(1, 5))]
    known = {"c.jpg": {"licence": "4"}, "elsewhere": {"licence": "5"}}
    meta = rng.choice([{}, {"split": "a", "n": [1, {"x": None}]}, {"images": known, "access": "gated"}])
    return Document(tuple(map(turn, roles)), f"mmc4:{number}", meta)


def written(form: str, documents: list[Document], folder) -> None:
    files = Files(folder, None)
    sink = FORMS[form].write(files)
    for document in documents:
        sink.add(document)
    sink.close()
    files.close()


def read(form: str, folder) -> list[Document]:
    found = []
    for source in FORMS[form].sources(folder):
        (config,) = BuildConfig.model_validate({"sources": [source]}).sources
        for unit in SOURCES[config.kind].plan(config).units:
            for record in SOURCES[config.kind].read(config, unit):
                item = run_stages(record, ())
                assert item.drops == ()
                found.append(item.document)
    return found


def shown(document: Document):
    """All of a document but what its pictures are called."""
    turns = [
        (turn.role, turn.loss, [p.text if isinstance(p, Text) else p.data for p in turn.parts])
        for turn in document.turns
    ]
    meta = {key: value for key, value in document.meta.items() if key != "images"}
    return document.id, turns, meta, [dict(about(document, image)) for image in document.images]


@pytest.mark.parametrize("form", FORMS)
def test_what_a_form_carries_comes_back_and_the_rest_is_named(form, tmp_path):
    rng = random.Random(form)
    documents = [random_document(n, rng) for n in range(300)]
    row, fitted, untouched = FORMS[form], [], 0
    for document in documents:
        left, lacks = row.fit(document)
        assert {lack.reason for lack in lacks} <= set(row.lacks)
        if not lacks:
            assert left == document
            untouched += 1
        if left is not None:
            # what is left holds nothing more that the form lacks
            assert row.fit(left) == (left, ())
            fitted.append(left)
    assert untouched >= 30
    assert len(fitted) > untouched or form in ("chat_jsonl", "huggingface", "webdataset")
    written(form, fitted, tmp_path / "out")
    assert list(map(shown, read(form, tmp_path / "out"))) == list(map(shown, fitted))


LACKING = {
    "answer_picture": ([user("draw"), assistant("here", Image(png()))], {"llama_factory"}),
    "blank": ([user("ask", Image(png()), " "), assistant("yes")], {"llama_factory", "llava", "swift"}),
    "characters": ([user("e\u0301"), assistant("yes")], {"llama_factory", "llava", "swift"}),
    "empty_end": ([user("ask"), Turn("assistant", ())], {"chat_jsonl", "huggingface", "webdataset"}),
    "loss": ([user("ask"), Turn("assistant", (Text("a"),), False)], {"llama_factory", "llava"}),
    "mark_in_text": ([user("what is <image>?"), assistant("a mark")], {"llama_factory", "llava", "swift"}),
    "order": ([assistant("only said")], {"llama_factory", "llava"}),
    "side_by_side": ([user("one", "two"), assistant("yes")], {"llama_factory", "llava", "swift"}),
    "system": ([Turn("system", (Text("be kind"),)), user("ask"), assistant("a")], {"llava"}),
    "system_picture": (
        [Turn("system", (Text("like"), Image(png()))), user("ask"), assistant("a")],
        {"llama_factory", "swift"},
    ),
    "text_too_long": ([user("x" * (2**20 + 1)), assistant("a")], {"llama_factory", "llava", "swift"}),
    "too_large": (
        [user("ask"), assistant("a")],
        {"chat_jsonl", "llama_factory", "llava", "swift", "webdataset"},
    ),
    "too_many_pictures": ([user(*[Image(png())] * 64), assistant("a")], {"webdataset"}),
    "white_space": ([user("see ", Image(png())), assistant("a")], {"llama_factory", "llava", "swift"}),
}
"""Reason -> turns, and the forms that have no place for them."""


@pytest.mark.parametrize("reason", LACKING)
def test_a_form_says_what_it_cannot_carry(reason):
    turns, forms = LACKING[reason]
    document = Document(tuple(turns), "d", {"page": "\x01" * (3 * 2**20)} if reason == "too_large" else {})
    found = {form for form, row in FORMS.items() if reason in {lack.reason for lack in row.fit(document)[1]}}
    assert found == forms
    assert all(reason in FORMS[form].lacks for form in forms)


def test_every_lack_is_tried():
    assert {reason for row in FORMS.values() for reason in row.lacks} == set(LACKING)


@pytest.fixture
def dataset(tmp_path):
    """Eleven documents; the answers of four of them hold pictures."""
    records = []
    for i in range(11):
        answer = [{"type": "text", "text": f"answer {i}"}]
        if i % 3 == 2 or i == 0:
            answer.append({"type": "image", "image": f"{i}.png"})
        ask = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "ask"}]
        messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        about = {"images": {f"{i}.png": {"licence": "CC"}}}
        records.append(json.dumps({"id": f"mmdialog:{i}", "messages": messages, "meta": about}) + "\n")
    write(tmp_path / "in", {f"{i}.png": png(i) for i in range(11)} | {"a.jsonl": "".join(records).encode()})
    build(BuildConfig.model_validate({"sources": [{"kind": "auto", "path": tmp_path / "in"}]}), tmp_path / "d")
    return tmp_path / "d"


@pytest.mark.parametrize("form", FORMS)
def test_a_dataset_goes_out_and_comes_in(form, dataset, tmp_path):
    done = export_data(dataset, form, tmp_path / "out", on_lack="document")
    verify_folder(tmp_path / "out")
    import_data(form, tmp_path / "out", tmp_path / "again")
    whole, again = open_dataset(dataset), open_dataset(tmp_path / "again")
    without = {0, 2, 5, 8} if form == "llama_factory" else set()
    left = [whole[i] for i in range(11) if i not in without]
    assert (done.read, done.written) == (11, len(left))
    assert [shown(again[i]) for i in range(len(again))] == list(map(shown, left))
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "**non_commercial**" in readme
    assert FORMS[form].usage.format(name="out") in readme
    first = contents(tmp_path / "out")
    export_data(dataset, form, tmp_path / "out", on_lack="document")
    assert contents(tmp_path / "out") == first
    assert not list(tmp_path.glob(".out.*"))


def test_the_data_files_of_a_dataset_are_those_for_the_hub(dataset, tmp_path):
    export_data(dataset, "huggingface", tmp_path / "out")
    made = {file.name: file.read_bytes() for file in (tmp_path / "out" / "data").iterdir()}
    assert made == {file.name: file.read_bytes() for file in dataset.glob("*.parquet")}


def test_what_is_lacking_is_refused_or_left_out_with_counts(dataset, tmp_path):
    with pytest.raises(DocumentError, match="of 11 documents answer_picture in 4; the first is mmdialog:0"):
        export_data(dataset, "llama_factory", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))

    export_data(dataset, "llama_factory", tmp_path / "out", on_lack="document")
    left_out = [json.loads(line) for line in (tmp_path / "out" / LEFT_OUT).read_text().splitlines()]
    assert [entry["id"] for entry in left_out] == ["mmdialog:0", "mmdialog:2", "mmdialog:5", "mmdialog:8"]
    assert {lack["reason"] for entry in left_out for lack in entry["lacks"]} == {"answer_picture"}

    done = export_data(dataset, "llama_factory", tmp_path / "out", on_lack="part")
    assert (done.written, done.lacks, done.documents) == (11, {"answer_picture": 4}, {"answer_picture": 4})
    assert json.loads((tmp_path / "out" / EXPORT).read_text()) == done.to_json()
    assert "| answer_picture |" in (tmp_path / "out" / "README.md").read_text()
    records = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [len(record["images"]) for record in records] == [1] * 11
    assert not (tmp_path / "out" / LEFT_OUT).exists()


def test_nothing_is_written_where_nothing_fits(dataset, tmp_path):
    export_data(dataset, "chat_jsonl", tmp_path / "chat")
    lines = (tmp_path / "chat" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "chat" / "only.jsonl").write_text(lines[0])
    with pytest.raises(DocumentError, match="no document fits"):
        export_data(tmp_path / "chat" / "only.jsonl", "llama_factory", tmp_path / "out", on_lack="document")
    assert not list(tmp_path.glob("*out*"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "form", ["chat_jsonl", pytest.param("llama_factory", marks=pytest.mark.slow), "webdataset", "huggingface"]
)
def test_a_killed_export_goes_on_to_the_same_bytes(form, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_MARK_DOCUMENTS", 3)
    monkeypatch.setattr(webdataset, "SHARD_BYTES", 12_000)
    export_data(dataset, form, tmp_path / "0" / "out", on_lack="document")
    expected = contents(tmp_path / "0" / "out")
    for stop in range(1, 12):
        out = tmp_path / str(stop) / "out"

        def die(done, of, stop=stop):
            if done == stop:
                raise Killed

        with pytest.raises(Killed):
            export_data(dataset, form, out, on_lack="document", on_progress=die)
        assert not out.exists()
        for file in (out.parent / ".out.exporting" / "files").glob("train*"):
            if file.is_file():
                file.write_bytes(file.read_bytes() + b"half of a record")
        seen = []
        export_data(dataset, form, out, on_lack="document", on_progress=lambda done, of, seen=seen: seen.append(done))
        assert seen[0] == (1 if form == "huggingface" else stop // 3 * 3 + 1)
        assert contents(out) == expected


def test_another_dataset_does_not_go_on_with_the_files_of_the_first(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "_MARK_DOCUMENTS", 1)

    def die(done, of):
        raise Killed

    with pytest.raises(Killed):
        export_data(dataset, "chat_jsonl", tmp_path / "out", on_progress=die)
    export_data(dataset, "chat_jsonl", tmp_path / "other")
    lines = (tmp_path / "other" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other" / "some.jsonl").write_text("".join(lines[5:7]))
    done = export_data(tmp_path / "other" / "some.jsonl", "chat_jsonl", tmp_path / "out")
    assert done.written == 2
    assert "**non_commercial**" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "train.jsonl").read_text() == "".join(lines[5:7])
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 2


def test_folders_that_are_no_exports_are_not_replaced(dataset, tmp_path):
    write(tmp_path / "mine", {"letter.txt": b"dear"})
    for out in (tmp_path / "mine", tmp_path / "mine" / "letter.txt", dataset, tmp_path):
        with pytest.raises(UsageError):
            export_data(dataset, "chat_jsonl", out)
    with pytest.raises(UsageError, match="no form is called"):
        export_data(dataset, "excel", tmp_path / "out")
    assert (tmp_path / "mine" / "letter.txt").read_bytes() == b"dear"
    verify_folder(dataset)


def test_two_exports_into_one_folder_do_not_mix(dataset, tmp_path):
    def second(done, of):
        if done == 1:
            with pytest.raises(UsageError, match="another export"):
                export_data(dataset, "chat_jsonl", tmp_path / "out")

    export_data(dataset, "chat_jsonl", tmp_path / "out", on_progress=second)
    verify_folder(tmp_path / "out")


def test_a_member_of_an_archive_is_read_by_its_index(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "SHARD_BYTES", 12_000)
    export_data(dataset, "webdataset", tmp_path / "out")
    archives = sorted((tmp_path / "out").glob("*.tar"))
    assert len(archives) > 2
    documents, pictures = {}, {}
    for archive in archives:
        assert archive.stat().st_size <= 12_000
        with tarfile.open(archive) as opened:
            members = {member.name: opened.extractfile(member).read() for member in opened.getmembers()}
        found = {name: read_member(archive, *place) for name, place in index_of(archive).items()}
        assert found == members
        documents |= {name: json.loads(data) for name, data in found.items() if name.endswith(".json")}
        pictures |= {name: data for name, data in found.items() if not name.endswith(".json")}
    assert list(documents) == [f"{i:09d}.json" for i in range(11)]
    assert documents["000000004.json"]["messages"][0]["content"][0]["image"] == "000000004.0.png"
    assert pictures["000000004.0.png"] == png(4)


CHAT = json.dumps({"id": "d", "messages": [{"role": "assistant", "content": [{"type": "image", "image": "0.0.png"}]}]})


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def archive(*members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for info, data in members:
            opened.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


GOOD = member("0.json", CHAT.encode()), member("0.0.png", png())
HOSTILE = {
    "a link to a file": (
        archive(GOOD[0], member("0.0.png", type=tarfile.SYMTYPE, linkname="/etc/hostname")),
        "archive_link",
    ),
    "a hard link": (
        archive(GOOD[0], member("0.0.png", type=tarfile.LNKTYPE, linkname="../secret.png")),
        "archive_link",
    ),
    "a device": (archive(GOOD[0], member("0.0.png", type=tarfile.CHRTYPE)), "archive_link"),
    "a pipe": (archive(GOOD[0], member("0.0.png", type=tarfile.FIFOTYPE)), "archive_link"),
    "a pickle": (archive(*GOOD, member("0.pkl", b"cos\nsystem\n(S'touch pwned'\ntR.")), "pickled"),
    "a pickle of torch": (archive(*GOOD, member("0.mask.pth", b"cos\nsystem\n(S'touch pwned'\ntR.")), "pickled"),
    "an array of objects": (archive(*GOOD, member("0.npy", b"\x93NUMPY")), "pickled"),
    "a picture elsewhere": (
        archive(member("0.json", CHAT.replace("0.0.png", "../secret.png").encode()), GOOD[1]),
        "image_missing",
    ),
    "a picture of another sample": (archive(GOOD[0], member("1.0.png", png())), "image_missing"),
    "a picture behind a command": (
        archive(member("0.json", CHAT.replace("0.0.png", "pipe:touch pwned").encode()), GOOD[1]),
        "image_missing",
    ),
    "the same member twice": (archive(*GOOD, member("0.0.png", png(1))), "duplicate_key"),
    "no documents": (archive(member("0.txt", b"a fox"), GOOD[1]), "missing_key"),
    "no JSON": (archive(member("0.json", b"(1, 2)"), GOOD[1]), "broken_json"),
    "a list": (archive(member("0.json", b"[]"), GOOD[1]), "wrong_type"),
    "no messages": (archive(member("0.json", b"{}"), GOOD[1]), "missing_key"),
    "no turns": (archive(member("0.json", b'{"messages": []}'), GOOD[1]), "bad_record"),
    "a cut archive": (archive(*GOOD)[:1100], "damaged_file"),
    "no archive": (b"pipe:touch pwned", "damaged_file"),
    "names that climb": (archive(member("../../0.json", b"[]"), member("/0.0.png", png())), "wrong_type"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_archives_are_not_trusted(name, tmp_path, monkeypatch):
    data, reason = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"in/a.tar": data, "in/b.tar": archive(*GOOD), "secret.png": png(7)})
    summary = import_data("webdataset", tmp_path / "in", tmp_path / "out")
    assert reason in {why for _, what, why in summary.total.reasons if what in ("record", "image")}
    kept = open_dataset(tmp_path / "out")
    assert len(kept) >= 1
    assert all(image.data == png() for i in range(len(kept)) for image in kept[i].images)
    assert sorted(file.name for file in tmp_path.iterdir() if file.name[0] != ".") == ["in", "out", "secret.png"]


def test_commands_are_no_archives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        import_data("webdataset", "pipe:touch pwned", tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


def test_rows_are_not_trusted(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def row(identity, *images, content=None):
        shown = content or [{"type": "image", "text": None, "image": i} for i in range(len(images))]
        return {"id": identity, "messages": [{"role": "assistant", "content": shown}], "images": list(images)}

    rows = [
        row("inside", {"bytes": png(1), "path": "a/b.png"}),
        row("named outside", {"bytes": png(2), "path": "../../b.png"}),
        row("relative", {"bytes": None, "path": "there.png"}),
        row("next ones", {"bytes": png(3), "path": None}, content=[{"type": "image", "text": None, "image": None}]),
        row("outside", {"bytes": None, "path": "../secret.png"}),
        row("absolute", {"bytes": None, "path": "/etc/hostname"}),
        row("nothing", {"bytes": None, "path": None}),
        row("too far", content=[{"type": "image", "text": None, "image": 9}]),
        row("below zero", {"bytes": png(), "path": None}, content=[{"type": "image", "text": None, "image": -1}]),
        row("no more", content=[{"type": "image", "text": None, "image": None}]),
    ]
    write(tmp_path, {"secret.png": png(7), "in/there.png": png(4)})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "rows.parquet")
    summary = import_data("huggingface", tmp_path / "in", tmp_path / "out")
    kept = open_dataset(tmp_path / "out")
    found = {kept[i].id: [(image.data, image.path) for image in kept[i].images] for i in range(len(kept))}
    assert found == {
        "inside": [(png(1), "a/b.png")],
        "named outside": [(png(2), None)],
        "relative": [(png(4), "there.png")],
        "next ones": [(png(3), None)],
    }
    reasons = {reason: n for (_, what, reason), n in summary.total.reasons.items() if what == "record"}
    assert reasons == {"image_path": 2, "image_missing": 4}


def test_rows_of_marked_texts_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "a fox"}]
    row = {"messages": messages, "images": [{"bytes": png(), "path": "x.png"}]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "in" / "rows.parquet")
    import_data("huggingface", tmp_path / "in", tmp_path / "out")
    document = open_dataset(tmp_path / "out")[0]
    assert shown(document)[1] == [("user", None, [png(), "what?"]), ("assistant", None, ["a fox"])]


def test_datasets_of_a_dataset_info_are_read(tmp_path):
    record = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]}
    info = {"one": {"file_name": "one.json"}, "hub": {"hf_hub_url": "a/b"}, "two": {"file_name": "two.jsonl"}}
    files = {"dataset_info.json": info, "one.json": [{"id": "a", **record}], "two.jsonl": {"id": "b", **record}}
    write(tmp_path / "in", {name: json.dumps(value).encode() for name, value in files.items()})
    import_data("llama_factory", tmp_path / "in", tmp_path / "out")
    made = open_dataset(tmp_path / "out")
    assert [made[i].id for i in range(len(made))] == ["a", "b"]
    for text in ('{"x": {"file_name": "../one.json"}}', "[]", '{"x": 1}', "{", "{}"):
        (tmp_path / "in" / "dataset_info.json").write_text(text)
        with pytest.raises(UsageError):
            import_data("llama_factory", tmp_path / "in", tmp_path / "out2")
