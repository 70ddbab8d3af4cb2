"""What Weft writes for others is read by the libraries of others."""

import io
import json

import pytest
from PIL import Image as PILImage

from tests.data.corpus import encoded, picture, png, write
from weft.data.build import BuildConfig, build
from weft.data.dataset import open_dataset
from weft.data.exchange.transfer import export_data

COUNT = 5
PICTURES = [encoded(picture(i, (12, 10)), "JPEG" if i % 2 else "PNG") for i in range(COUNT)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange")
    records = []
    for i in range(COUNT):
        ask = [{"type": "image", "image": f"{i}.x"}, {"type": "text", "text": f"ask {i}"}]
        messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": f"answer {i}"}]
        records.append({"id": f"d{i}", "messages": messages, "meta": {"split": "a"} if i else {}})
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    write(folder / "in", {f"{i}.x": data for i, data in enumerate(PICTURES)} | {"a.jsonl": lines})
    build(BuildConfig.model_validate({"sources": [{"kind": "auto", "path": folder / "in"}]}), folder / "d")
    return folder / "d"


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the extra `dev` brings it")
    datasets.disable_progress_bars()
    return lambda *names, **options: datasets.load_dataset(*names, **options, cache_dir=str(tmp_path / "cache"))


def same_pixels(shown: PILImage.Image, data: bytes) -> bool:
    return shown.convert("RGB").tobytes() == PILImage.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("is_exported", [False, True])
def test_datasets_shows_a_dataset_without_a_script(is_exported, dataset, load, tmp_path):
    folder = dataset
    if is_exported:
        folder = tmp_path / "hub"
        export_data(dataset, "huggingface", folder)
    splits = load(str(folder))
    assert list(splits) == ["train"]
    rows = splits["train"]
    assert rows["id"] == [f"d{i}" for i in range(COUNT)]
    for i, row in enumerate(rows):
        assert same_pixels(row["images"][0], PICTURES[i])
        assert row["messages"][0]["content"] == [
            {"type": "image", "text": None, "image": 0},
            {"type": "text", "text": f"ask {i}", "image": None},
        ]


def test_the_card_names_the_columns_as_datasets_does(dataset):
    datasets = pytest.importorskip("datasets", reason="the extra `dev` brings it")
    import yaml

    front = yaml.safe_load((dataset / "README.md").read_text().split("---\n")[1])
    info = datasets.DatasetInfo._from_yaml_dict(front["dataset_info"])
    import pyarrow.parquet as pq

    (file,) = dataset.glob("*.parquet")
    columns = datasets.Features.from_arrow_schema(pq.read_schema(file))
    assert info.features == columns
    assert front["dataset_info"]["features"] == columns._to_yaml_list()
    assert info.splits["train"].num_examples == COUNT
    assert info.download_size == file.stat().st_size


@pytest.mark.parametrize("form, file", [("swift", "train.jsonl"), ("llama_factory", "train.json")])
def test_datasets_reads_the_files_of_trainers(form, file, dataset, load, tmp_path):
    """Both trainers load their files through it."""
    export_data(dataset, form, tmp_path / "out")
    rows = load("json", data_files=str(tmp_path / "out" / file), split="train")
    for i, row in enumerate(rows):
        assert row["messages"] == [
            {"role": "user", "content": f"<image>\nask {i}"},
            {"role": "assistant", "content": f"answer {i}"},
        ]
        assert [(tmp_path / "out" / path).read_bytes() for path in row["images"]] == [PICTURES[i]]


def test_webdataset_reads_the_archives(dataset, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="the extra `dev` brings it")
    export_data(dataset, "webdataset", tmp_path / "out")
    urls = [str(file) for file in sorted((tmp_path / "out").glob("*.tar"))]
    raw = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in raw] == [f"{i:09d}" for i in range(COUNT)]
    shown = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    for i, (sample, decoded) in enumerate(zip(raw, shown, strict=True)):
        record = decoded["json"]
        assert record["id"] == f"d{i}"
        named = record["messages"][0]["content"][0]["image"]
        kind = named.removeprefix(f"{i:09d}.")
        assert kind == ("0.jpg" if i % 2 else "0.png")
        assert sample[kind] == PICTURES[i]
        assert same_pixels(decoded[kind], PICTURES[i])


def test_archives_that_webdataset_wrote_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="the extra `dev` brings it")
    from weft.data.exchange.transfer import import_data

    (tmp_path / "in").mkdir()
    with webdataset.TarWriter(str(tmp_path / "in" / "a.tar")) as sink:
        for i in range(3):
            content = [{"type": "text", "text": "look"}, {"type": "image", "image": f"page{i}.0.png"}]
            record = {"id": f"p{i}", "messages": [{"role": "assistant", "content": content}]}
            sink.write({"__key__": f"page{i}", "json": json.dumps(record).encode(), "0.png": png(i)})
    import_data("webdataset", tmp_path / "in", tmp_path / "out")
    made = open_dataset(tmp_path / "out")
    assert [(made[i].id, next(made[i].images).data) for i in range(len(made))] == [(f"p{i}", png(i)) for i in range(3)]
