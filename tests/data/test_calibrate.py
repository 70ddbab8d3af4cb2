"""What a calibration says of a threshold is what the filter with that threshold does."""

import functools
import json
import random
import re

import numpy as np
import pytest
import yaml
from PIL import Image as PILImage
from pydantic import TypeAdapter

from tests.data.corpus import chat, encoded, line, write
from tests.data.running import config
from tests.data.test_commands import run
from tests.data.test_filters import weights
from tests.test_scorers import save_clip
from weft.data.calibrate import DEFAULT, Report, calibrate, fragment_of, sample, write_fragment
from weft.data.calibrate_page import write_page
from weft.data.filters import FILTERS, FilterConfig
from weft.data.stage import Record, count
from weft.document import Document, Image, Text, assistant
from weft.errors import UsageError

__all__ = ["weights"]

SPECS = TypeAdapter(tuple[FilterConfig, ...])
MODEL = "clip-vit-large-patch14"


def photo(seed: int, noise: float = 0.0, of: int = 0) -> bytes:
    """A smooth picture, with another one mixed in."""
    mixed = (1 - noise) * smooth(seed) + noise * smooth(1000 + of)
    return encoded(PILImage.fromarray(mixed.astype(np.uint8)))


def smooth(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(PILImage.fromarray(small).resize((72, 72), PILImage.Resampling.BICUBIC)).astype(float)


@functools.cache
def documents(n: int = 40) -> list[Document]:
    """Each has two pictures that are the less alike the higher its number, more text, and a better cosine."""
    found = []
    for i in range(n):
        pictures = [Image(photo(i), "a.png"), Image(photo(i, i / n, i), "b.png")]
        meta = {"similarity_model": MODEL, "images": {name: {"similarity": i / 100} for name in ("a.png", "b.png")}}
        parts = [Text("A sentence. " * (i + 1)), *pictures]
        found.append(Document((assistant(*parts),), f"web:{i}", meta))
    random.Random(0).shuffle(found)
    return found


def records(found: list[Document]) -> list[Record]:
    return [Record("a.jsonl", i, document, count(document)) for i, document in enumerate(found)]


@pytest.fixture(scope="module")
def report() -> Report:
    return calibrate(DEFAULT, [*records(documents()), Record("a.jsonl", 99, None, count(documents(1)[0]))], 0.9)


def kept(spec: FilterConfig) -> float:
    stage = FILTERS[spec.kind](spec)
    return sum(stage(document)[0] is not None for document in documents()) / 40


def test_a_filter_keeps_what_the_calibration_says(report):
    assert (report.read, report.sampled) == (41, 40)
    assert {score.filter for score in report.scores} == {each.kind for each in DEFAULT}
    for score in report.scores:
        (spec,) = (each for each in DEFAULT if each.kind == score.filter)
        open_ended = {"min": 0, "max": None} if score.field in ("min", "max") else {}
        for threshold in {score.now, score.proposed}:
            changed = spec.model_copy(update={**open_ended, score.field: threshold})
            assert kept(changed) == pytest.approx(score.kept(threshold)), (score.filter, score.field)


def test_the_fragment_is_a_recipe_that_keeps_the_share(report, tmp_path):
    for score in report.scores:
        assert score.kept(score.proposed) >= 0.9, score.what
    write_fragment(report, tmp_path / "thresholds.yaml", tmp_path / "in")
    text = (tmp_path / "thresholds.yaml").read_text()
    filters = SPECS.validate_python(tuple(yaml.safe_load(text)["filters"]))
    assert [each.kind for each in filters] == [each.kind for each in DEFAULT]
    assert config({"kind": "picturebook", "n": 1}, filters=fragment_of(report)).filters == filters
    (cosine,) = (score for score in report.scores if score.filter == "coherence")
    assert cosine.proposed == 0.04
    assert "# coherence.threshold: 0.04 keeps 0.900, 0.24 keeps 0.400" in text


def test_counts_of_the_paper_are_loosened_never_tightened(report):
    by_name = {f"{score.filter}.{score.field}": score for score in report.scores}
    assert by_name["image_count.max"].proposed == 6
    assert by_name["image_count.min"].proposed == 2
    assert by_name["sentence_count.max"].proposed == 36


def test_a_proposal_stays_below_what_unrelated_pictures_have_in_common():
    far = [Document((assistant(Image(photo(2 * i)), Image(photo(2 * i + 1))),), f"web:{i}") for i in range(30)]
    found = calibrate(DEFAULT[-2:-1], records(far), 0.2)
    (score,) = found.scores
    assert score.kept(score.proposed, score.unrelated) >= 0.99
    assert score.kept(score.proposed) > 0.2


def test_the_page_shows_which_way_the_distance_runs(report, tmp_path):
    assert [pair.distance for pair in report.pairs] == sorted(pair.distance for pair in report.pairs)
    write_page(report, tmp_path / "page.html", "Calibration of <b>&")
    page = (tmp_path / "page.html").read_text()
    assert "Calibration of &lt;b&gt;&amp;" in page
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert "<script" not in page
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert "A discards" in captions[0]
    assert "C keeps" in captions[0]
    assert re.search(r"The most alike.*Near distance 0\.4.*Near distance 0\.6.*The most unlike", page, re.DOTALL)


@pytest.mark.slow
def test_networks_are_asked_where_the_recipe_names_their_weights(weights, tmp_path):
    save_clip(tmp_path / "clip-nano")
    spec = {"kind": "coherence", "model": tmp_path / "clip-nano", "threshold_model": "clip-nano", "threshold": -1.0}
    filters = SPECS.validate_python(({"kind": "image_diversity", "preset": "A", "lpips": weights}, spec))
    found = calibrate(filters, records(documents()[:6]), 0.5)
    alike, fits = found.scores
    assert (alike.keeps, alike.now, len(alike.values), len(alike.unrelated)) == ("at most", 0.6, 6, 15)
    assert found.presets.metric == "lpips"
    assert alike.kept(0.6) == found.presets.at_preset["A"]
    assert (len(fits.values), len(fits.unrelated)) == (6, 5)
    for score in found.scores:
        assert score.kept(score.proposed) >= 0.5
    (again, _) = SPECS.validate_python(tuple(yaml.safe_load(yaml.safe_dump(fragment_of(found)))))
    assert again.lpips == filters[0].lpips
    assert again.threshold == alike.proposed


def test_what_cannot_be_measured_is_said():
    bare = [Document((assistant("only a text"),), f"web:{i}") for i in range(3)]
    found = calibrate(DEFAULT, records(bare))
    assert set(found.missing) == {"duplicate_images", "image_diversity", "coherence"}
    assert "not measured, no document holds" in str(found)


@pytest.mark.parametrize("keep", [0.0, 1.5, -1.0, float("nan")])
def test_what_makes_no_sense_is_refused(keep):
    with pytest.raises(UsageError, match="keep"):
        calibrate(DEFAULT, records(documents(2)), keep)
    with pytest.raises(UsageError, match="none gave a document"):
        calibrate(DEFAULT, [Record("a", 1, None, count(documents(1)[0]))])


def test_a_sample_is_spread_over_all_files(tmp_path):
    for name in "abcde":
        write(tmp_path, {f"{name}.jsonl": b"".join(line(chat(f"{name}{i}", text="x")) for i in range(50))})
    recipe = config({"kind": "chat_jsonl", "path": str(tmp_path)})
    found = [record.document.id for record in sample(recipe.sources, 11)]
    assert len(found) == 11
    assert {identity[0] for identity in found} == set("abcde")
    assert len(list(sample(recipe.sources, 1000))) == 250
    assert len(list(sample(recipe.sources, 2))) == 2


def test_the_command_writes_a_page_and_a_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "sources: [{kind: picturebook, n: 6}]\nfilters: [{kind: image_diversity}, {kind: has_answer}]\n"
    )
    code, out, _ = run(capsys, "calibrate", "r.yaml", "--samples", 5, "--json")
    found = json.loads(out)
    assert (code, found["sampled"], len(found["scores"])) == (0, 5, 1)
    assert [each["kind"] for each in found["filters"]] == ["image_diversity"]
    assert (tmp_path / "r_calibration.html").stat().st_size > 1000
    assert yaml.safe_load((tmp_path / "r_thresholds.yaml").read_text())["filters"] == found["filters"]
    code, out, _ = run(capsys, "calibrate", "r.yaml", "--filters.0.threshold", 0.3)
    assert code == 0
    assert "now 0.3 keeps" in out
    for options in (("--samples", 0), ("--keep", 2)):
        code, _, err = run(capsys, "calibrate", "r.yaml", *options)
        assert code == 2, err
