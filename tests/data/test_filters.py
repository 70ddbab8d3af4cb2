"""Every filter drops what it should, with the value and the limit in its message, and keeps what is at the limit."""

import io
import logging
import math
from pathlib import Path

import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from safetensors.torch import save_file

from tests.data.corpus import DAMAGED, REASONS, encoded, png_header
from tests.test_scorers import save_clip
from weft.config import load_config
from weft.data.build import BuildConfig
from weft.data.filters import (
    FILTERS,
    coherence,
    decontaminate,
    duplicate_images,
    image_diversity,
    image_limits,
    licence,
    safety,
    sentence_count,
)
from weft.data.filters.calibrate import STEPS, calibrate
from weft.data.stage import Outcome
from weft.document import Document, Image, Turn, assistant, user
from weft.errors import UsageError
from weft.scorers import CLIP, LPIPS

RECIPES = Path(__file__).parents[2] / "recipes"


def photo(seed: int, size: tuple[int, int] = (96, 80)) -> PILImage.Image:
    """Large smooth blocks: pictures of different seeds look nothing alike."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PILImage.fromarray(blocks).resize(size, PILImage.Resampling.BICUBIC)


def image(seed: int, name: str | None = None, kind: str = "PNG", **options: object) -> Image:
    return Image(encoded(photo(seed), kind, **options), name or f"{seed}.png")


def of(data: bytes, name: str = "x.png") -> Image:
    return Image(data, name)


def page(*parts: str | Image, identity: str = "mmc4:1", **meta: object) -> Document:
    return Document((assistant(*parts),), identity, meta)


def drop(outcome: Outcome) -> tuple[str, str]:
    """Reason and message of a record's only loss."""
    left, (loss,) = outcome
    assert left is None
    assert loss.what == "record"
    return loss.reason, loss.message


# Limits of single pictures


def plain(mode: str, size: tuple[int, int], colour: object = 0) -> bytes:
    made = PILImage.new(mode, size, colour)
    made.putpixel((0, 0), 7 if isinstance(colour, int) else (7,) * len(colour))
    return encoded(made)


LIMITS = {
    "side": (photo(0, (64, 63)), "image_too_small", "64 x 63", "64"),
    "aspect": (photo(0, (193, 64)), "image_aspect", "3.02", "3"),
    "tall": (photo(0, (64, 193)), "image_aspect", "3.02", "3"),
    "long": (photo(0, (401, 300)), "image_too_large", "401 x 300", "400"),
    "white": (PILImage.new("RGB", (80, 80), "white"), "image_blank", "0 values", "1"),
    "transparent": (PILImage.new("RGBA", (80, 80), (200, 10, 10, 0)), "image_blank", "0 values", "1"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_picture_beyond_a_limit_is_named_with_value_and_limit(name):
    made, reason, value, limit = LIMITS[name]
    stage = image_limits.build(image_limits.ImageLimits(on_bad_image="record", max_side=400))
    found, message = drop(stage(page("a", of(encoded(made)))))
    assert found == reason
    assert value in message
    assert limit in message


@pytest.mark.parametrize("size", [(64, 64), (192, 64), (64, 192), (400, 400)])
def test_a_picture_at_the_limits_passes(size):
    document = page("a", of(encoded(photo(0, size))))
    assert image_limits.build(image_limits.ImageLimits(max_side=400))(document) == (document, ())


def test_pictures_of_other_modes_are_judged_by_what_is_seen():
    stage = image_limits.build(image_limits.ImageLimits(on_bad_image="record"))
    for mode, colour in (("L", 90), ("1", 1), ("P", 3), ("LA", (90, 255)), ("CMYK", (1, 2, 3, 4)), ("I;16", 8000)):
        data = encoded(PILImage.new(mode, (80, 80), colour), "JPEG" if mode == "CMYK" else "PNG")
        assert drop(stage(page("a", of(data))))[0] == "image_blank"
    document = page("a", of(encoded(photo(0).convert("L"))), of(encoded(photo(0), "GIF")), of(encoded(photo(0), "BMP")))
    assert stage(document) == (document, ())


@pytest.mark.parametrize("name", DAMAGED)
def test_a_picture_that_cannot_be_decoded_is_lost(name):
    stage = image_limits.build(image_limits.ImageLimits())
    good = image(1)
    left, (loss,) = stage(page("a", of(DAMAGED[name], name), good))
    assert list(left.images) == [good]
    assert (loss.what, loss.reason, loss.image) == ("image", REASONS[name], name)
    assert loss.field == "messages[0].content[1]"


def test_only_wanted_formats_pass():
    stage = image_limits.build(image_limits.ImageLimits(formats=("jpeg", "png"), on_bad_image="record"))
    document = page("a", image(0), image(1, kind="JPEG"))
    assert stage(document) == (document, ())
    assert drop(stage(page("a", image(0, kind="WEBP")))) == ("image_format", "webp, none of jpeg, png")


def test_the_header_decides_before_anything_is_decoded():
    stage = image_limits.build(image_limits.ImageLimits(max_pixels=10_000, on_bad_image="record"))
    assert "101 x 100" in drop(stage(page("a", of(png_header(101, 100)))))[1]


# Numbers of sentences


@pytest.mark.parametrize(
    "texts, source, reason",
    [
        (["One. Two."] * 6, "obelics", None),
        (["One. Two."] * 6 + ["One."], "obelics", "too_many_sentences"),
        (["One. Two."] * 12, "mmc4", None),
        (["One. Two."] * 13, "mmc4", "too_many_sentences"),
        (["  "], "obelics", "too_few_sentences"),
    ],
)
def test_sentences_are_counted_in_the_units_of_the_source(texts, source, reason):
    stage = sentence_count.build(sentence_count.SentenceCount())
    document = Document((user("Do this. And that. " * 9), assistant(*texts)), f"{source}:1")
    if reason is None:
        assert stage(document) == (document, ())
    else:
        found, message = drop(stage(document))
        assert found == reason
        assert message.startswith(f"{13 if reason == 'too_many_sentences' else 0} sentences")


@given(
    st.lists(st.text(alphabet='aB.!…"\n。 ', max_size=12), max_size=4),
    st.integers(0, 4),
    st.none() | st.integers(0, 5),
    st.sampled_from(["", "mmc4"]),
)
def test_what_is_within_limits_without_counting_is_so_by_counting(texts, least, most, source):
    config = sentence_count.SentenceCount(min=least, max=most)
    n = sentence_count.count_sentences(texts, source, config)
    is_within = least <= n and (most is None or n <= most)
    assert (sentence_count.judge(texts, source, config) is None) == is_within


# The same picture twice


def test_the_same_bytes_are_found_without_decoding():
    stage = duplicate_images.build(duplicate_images.DuplicateImages(max_bits=None))
    broken = of(b"no picture")
    assert drop(stage(page(broken, "a", broken)))[0] == "duplicate_image"
    document = page(broken, "a", of(b"another"))
    assert stage(document) == (document, ())


def test_the_same_look_is_found_in_other_bytes():
    stage = duplicate_images.build(duplicate_images.DuplicateImages())
    smaller = of(encoded(photo(1).resize((72, 60)), "JPEG", quality=80), "small.jpg")
    left, (loss,) = stage(page(image(1), "a", image(2), smaller))
    assert left is None
    assert (loss.reason, loss.image) == ("look_alike_image", "small.jpg")
    assert "picture 2 differs from picture 0 in" in loss.message
    assert "at most 10" in loss.message
    document = page(*(image(seed) for seed in range(6)))
    assert stage(document) == (document, ())


def test_even_pictures_are_not_taken_for_the_same():
    """A hash of next to no bits says nothing."""
    stage = duplicate_images.build(duplicate_images.DuplicateImages())
    first, second = (PILImage.new("RGB", (80, 80), "white") for _ in range(2))
    first.paste((0, 0, 0), (0, 0, 4, 4))
    second.paste((250, 0, 0), (70, 70, 80, 80))
    document = page(of(encoded(first)), of(encoded(second)))
    assert stage(document) == (document, ())


# Pictures that are too much alike


def diversity(**fields: object) -> image_diversity.ImageDiversity:
    return image_diversity.ImageDiversity.model_validate(fields)


LPIPS_FIELDS = {"lpips": {"backbone": "b.safetensors", "linear": "l.safetensors"}}


def test_presets_are_spelled_out():
    for name in "AB":
        made = diversity(preset=name, **LPIPS_FIELDS)
        assert {key: getattr(made, key) for key in image_diversity.PRESETS[name]} == image_diversity.PRESETS[name]
        assert "preset" not in made.model_dump()
        assert diversity(**made.model_dump()) == made
    assert diversity(**LPIPS_FIELDS) == diversity(preset="A", **LPIPS_FIELDS)
    assert (diversity().metric, diversity().space, diversity().discard) == ("phash", "distance", "below")


@pytest.mark.parametrize(
    "fields, what",
    [
        ({"preset": "C", **LPIPS_FIELDS}, "allow_inverted"),
        ({"space": "distance", "discard": "above"}, "allow_inverted"),
        ({"space": "similarity", "discard": "below"}, "allow_inverted"),
        ({"preset": "A"}, "needs weights"),
        ({"preset": "A", "threshold": 0.5, **LPIPS_FIELDS}, "one or the other"),
        ({"preset": "D"}, "preset must be"),
        ({"metric": "clip"}, "needs model"),
        ({"metric": "dino"}, "needs model"),
        ({"threshold": math.nan}, "finite"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, what):
    with pytest.raises(pydantic.ValidationError, match=what):
        diversity(**fields)


def test_the_inverted_reading_warns(caplog):
    with caplog.at_level(logging.WARNING):
        image_diversity.build(diversity(space="distance", discard="above", allow_inverted=True))
    assert "keeps look-alikes" in caplog.text


def like(distance: float) -> list[Image]:
    """Two pictures, one of them with noise, so that their hashes differ in about that fraction."""
    first = photo(1, (170, 160)).convert("L")
    values = np.asarray(first).astype(int)
    side = int(16 * distance)
    values[: 10 * side] = 255 - values[: 10 * side]
    return [of(encoded(first)), of(encoded(PILImage.fromarray(values.astype(np.uint8))))]


@pytest.mark.parametrize("limit", [0.2, 0.45, 0.7])
def test_distance_and_similarity_are_two_ways_to_say_one_thing(limit):
    by_distance = image_diversity.build(diversity(space="distance", discard="below", threshold=limit))
    by_similarity = image_diversity.build(diversity(space="similarity", discard="above", threshold=1 - limit))
    inverted = image_diversity.build(diversity(space="distance", discard="above", threshold=limit, allow_inverted=True))
    sides = set()
    for distance in (0.0, 0.25, 0.5, 0.75, 1.0):
        document = page(*like(distance), "a")
        kept = by_distance(document)[0] is not None
        assert kept == (by_similarity(document)[0] is not None)
        assert kept != (inverted(document)[0] is not None)
        sides.add(kept)
    assert sides == {True, False}


@pytest.mark.parametrize(
    "fields, value",
    [
        ({"space": "distance", "discard": "below", "threshold": 0.2}, "distance 0.0000, below 0.2"),
        ({"space": "similarity", "discard": "above", "threshold": 0.8}, "similarity 1.0000, above 0.8"),
    ],
)
def test_one_pair_of_many_is_enough_and_is_named(fields, value):
    stage = image_diversity.build(diversity(**fields))
    document = page(image(1), image(2), "a", image(3), of(encoded(photo(2), "BMP")))
    assert drop(stage(document)) == ("alike_images", f"pictures 1 and 3 have phash {value}")
    document = page(image(1), image(2), "a", image(3), image(4))
    assert stage(document) == (document, ())


def test_documents_with_more_pictures_than_are_compared_are_dropped():
    stage = image_diversity.build(diversity(max_images=3))
    document = page(*(image(seed) for seed in range(3)))
    assert stage(document) == (document, ())
    assert drop(stage(page(*(image(seed) for seed in range(4))))) == (
        "too_many_to_compare",
        "4 pictures, more than the 3 that are compared",
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """Random ones, of the published shapes and names."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    made = LPIPS("alex")
    save_file({f"features.{key}": tensor for key, tensor in made.features.state_dict().items()}, folder / "b")
    save_file({f"lin{i}.model.1.weight": w.data.view(1, -1, 1, 1) for i, w in enumerate(made.weights)}, folder / "l")
    return {"backbone": str(folder / "b"), "linear": str(folder / "l"), "side": 64}


def test_lpips_drops_look_alikes_and_keeps_others(weights):
    noisy = np.asarray(photo(1)).astype(int) + np.random.default_rng(0).integers(-3, 4, (80, 96, 3))
    alike = page(image(1), "a", of(encoded(PILImage.fromarray(noisy.clip(0, 255).astype(np.uint8)))))
    other = page(image(1), "a", image(2))
    pictures = [[photo(1), photo(2)], [PILImage.open(io.BytesIO(i.data)) for i in alike.images]]
    config = diversity(lpips=weights)
    far, near = (image_diversity.distances_of(config)(pair)[0, 1].item() for pair in pictures)
    assert 0 < near < far / 2
    between = {"metric": "lpips", "space": "distance", "threshold": (near + far) / 2, "lpips": weights}
    stage = image_diversity.build(diversity(discard="below", **between))
    assert drop(stage(alike))[0] == "alike_images"
    assert stage(other) == (other, ())
    literal = image_diversity.build(diversity(discard="above", allow_inverted=True, **between))
    assert literal(alike) == (alike, ())
    assert drop(literal(other))[0] == "unlike_images"


def test_calibration_tells_beforehand_what_a_threshold_keeps():
    documents = [page(*like(i / 15), "a", identity=f"mmc4:{i}") for i in range(16)]
    documents += [page(image(0), "only one"), page(of(b"broken"), image(1))]
    found = calibrate(diversity(), documents)
    assert (found.documents, found.pairs, sum(found.histogram)) == (16, 16, 16)
    assert len(found.edges) == STEPS + 1
    kept = {}
    for name, fields in image_diversity.PRESETS.items():
        config = diversity(**{**fields, "metric": "phash", "allow_inverted": True})
        stage = image_diversity.build(config)
        kept[name] = sum(stage(document)[0] is not None for document in documents[:16]) / 16
    assert found.at_preset == kept
    assert kept["A"] > kept["B"] > 0
    assert found.kept["A"] == found.kept["B"]  # at the same distance they are the same rule
    assert found.kept["A"][0] == 1
    assert all(a >= b for a, b in zip(found.kept["B"], found.kept["B"][1:], strict=False))
    assert all(a <= b for a, b in zip(found.kept["C"], found.kept["C"][1:], strict=False))
    text = str(found)
    assert "16 pairs of pictures in 16 documents" in text
    assert len(text.splitlines()) == STEPS + 3


# Pictures and the text around them


def scored(*similarities: float | None, model: str = "clip-vit-large-patch14", identity: str = "mmc4:1") -> Document:
    images = [image(i, f"{i}.png") for i in range(len(similarities))]
    about = {f"{i}.png": {"similarity": s} for i, s in enumerate(similarities) if s is not None}
    return page(
        *(part for i in images for part in ("a text.", i)), identity=identity, similarity_model=model, images=about
    )


@pytest.mark.parametrize(
    "aggregate, value", [("mean", 0.25), ("min", 0.125), ("max", 0.375)], ids=["mean", "min", "max"]
)
def test_cosines_that_the_source_gives_are_used(aggregate, value):
    document = scored(0.125, 0.25, 0.375)
    for threshold, keeps in ((value, True), (value + 0.001, False)):
        stage = coherence.build(coherence.Coherence(aggregate=aggregate, threshold=threshold))
        if keeps:
            left, losses = stage(document)
            assert losses == ()
            assert left.turns == document.turns
            about = {"model": "clip-vit-large-patch14", "cosines": [0.125, 0.25, 0.375]}
            assert left.meta["coherence"] == about
        else:
            reason, message = drop(stage(document))
            assert reason == "incoherent"
            assert f"{aggregate} of the cosines is {value:.4f}" in message
            assert f"{threshold:g}" in message


def test_a_threshold_can_be_a_clip_score():
    """0.60 of these is 0.24 of those."""
    assert coherence.Coherence(threshold=0.6, units="clipscore").min_cosine == pytest.approx(0.24)


def test_single_pictures_are_lost_where_they_are_the_unit():
    document = scored(0.1, 0.3, 0.2, 0.24)
    left, losses = coherence.build(coherence.Coherence(unit="image"))(document)
    assert [i.path for i in left.images] == ["1.png", "3.png"]
    assert left.meta["coherence"]["cosines"] == [0.3, 0.24]
    assert [(loss.what, loss.reason, loss.image) for loss in losses] == [
        ("image", "incoherent_image", "0.png"),
        ("image", "incoherent_image", "2.png"),
    ]
    assert losses[0].message == "its cosine is 0.1000, below 0.24"


def test_cosines_of_another_model_or_not_of_all_are_not_used():
    stage = coherence.build(coherence.Coherence())
    assert drop(stage(scored(0.9, 0.9, model="clip-vit-base-patch32")))[0] == "no_similarity"
    assert drop(stage(scored(0.9, None)))[0] == "no_similarity"
    assert drop(stage(page("a", image(0))))[0] == "no_similarity"


def test_some_sources_and_documents_without_pictures_are_not_judged():
    stage = coherence.build(coherence.Coherence())
    for document in (scored(0.0, identity="vist:1"), scored(0.0, identity="mmdialog:1"), page("only text")):
        assert stage(document) == (document, ())


@pytest.mark.parametrize(
    "fields, what",
    [
        ({"model": "x/clip-vit-base-patch32"}, "cannot be compared"),
        ({"reuse": False}, "nothing to score with"),
        ({"unit": "image", "aggregate": "max"}, "nothing to aggregate"),
    ],
)
def test_a_threshold_belongs_to_its_model(fields, what):
    with pytest.raises(pydantic.ValidationError, match=what):
        coherence.Coherence.model_validate(fields)


class Stub:
    """A scorer that knows its cosines by heart, and what it was asked."""

    asked: list[tuple[bytes, tuple[str, ...]]]
    table: dict[tuple[bytes, str], float]

    def __init__(self, table: dict[tuple[bytes, str], float]) -> None:
        self.table, self.asked = table, []

    def __call__(self, picture: Image, texts: list[str]) -> list[float]:
        self.asked.append((picture.data, tuple(texts)))
        return [self.table.get((picture.data, text), 0.0) for text in texts]


def test_a_picture_is_compared_with_the_sentences_beside_it(monkeypatch):
    a, b, c = (image(seed) for seed in range(3))
    stub = Stub({(a.data, "Two."): 0.5, (b.data, "Three."): 0.4, (c.data, "Four."): 0.3, (a.data, "Four."): 0.9})
    monkeypatch.setattr(coherence, "cosines_of", lambda folder: stub)
    config = coherence.Coherence(model=Path("models/nano"), threshold_model="nano", aggregate="mean", threshold=0.39)
    document = page("One. Two.", a, "Three.", b, c, "Four.", similarity_model="another")
    left, losses = coherence.build(config)(document)
    assert losses == ()
    assert left.meta["coherence"] == {"model": "nano", "cosines": [0.5, 0.4, 0.3]}
    assert stub.asked == [(a.data, ("One.", "Two.", "Three.")), (b.data, ("Three.",)), (c.data, ("Four.",))]


def test_a_real_clip_scores_what_no_source_has(tmp_path):
    folder = tmp_path / "clip-nano"
    save_clip(folder)
    fields = {"model": folder, "threshold_model": "clip-nano", "threshold": -1.0}
    left, _ = coherence.build(coherence.Coherence(**fields))(page("a red house. the sea", image(0), image(1), "no"))
    scorer = CLIP(folder)
    wanted = [
        scorer.cosines([photo(0)], ["a red house.", "the sea"]).max().item(),
        scorer.cosines([photo(1)], ["no"]).item(),
    ]
    assert left.meta["coherence"]["cosines"] == pytest.approx(wanted, abs=1e-4)
    limit = {"threshold": sum(wanted) / 2 + 0.001}
    assert drop(coherence.build(coherence.Coherence(**{**fields, **limit}))(left))[0] == "incoherent"
    broken = page("a", of(b"broken"))
    assert drop(coherence.build(coherence.Coherence(**fields))(broken))[0] == "image_unidentified"


def test_pictures_that_stand_together_are_compared_with_the_nearest_text():
    a, b, c = (image(seed) for seed in range(3))
    parts = page("One.", a, b, c, "Two.").turns[0].parts
    assert [coherence.beside(parts, i) for i in (1, 2, 3)] == [["One."], ["One.", "Two."], ["Two."]]


def test_pictures_without_any_text_cannot_be_judged(monkeypatch):
    monkeypatch.setattr(coherence, "cosines_of", lambda folder: Stub({}))
    stage = coherence.build(coherence.Coherence(model=Path("nano"), threshold_model="nano"))
    assert drop(stage(page(image(0), " ", image(1))))[0] == "no_text"


# Flags


@pytest.mark.parametrize("score, keeps", [(0.49, True), (0.5, False), (1.0, False), (None, True), ("0.9", True)])
def test_unsafe_pages_and_pictures_are_dropped(score, keeps):
    stage = safety.build(safety.Safety())
    of_page = page("a", image(0), porn_prob=score)
    of_picture = page("a", image(0), images={"0.png": {"unsafe_prob": score}})
    for document, reason in ((of_page, "unsafe"), (of_picture, "unsafe_image")):
        if keeps:
            assert stage(document) == (document, ())
        else:
            found, message = drop(stage(document))
            assert found == reason
            assert f"{score:.3f}, not below 0.5" in message


def test_an_unsafe_picture_can_go_alone_and_faces_too():
    known = {"0.png": {"unsafe_prob": 0.9}, "1.png": {"faces": True}}
    config = safety.Safety(on_unsafe_image="image", faces=False)
    left, losses = safety.build(config)(page("a", image(0), image(1), image(2), images=known))
    assert [i.path for i in left.images] == ["2.png"]
    assert [loss.reason for loss in losses] == ["unsafe_image", "faces"]


def test_flags_drop_where_they_are_named():
    document = page("a", flags=["bidi_override"])
    assert safety.build(safety.Safety())(document) == (document, ())
    assert drop(safety.build(safety.Safety(flags=("bidi_override",)))(document))[0] == "flagged"


def test_access_is_noted_and_limits_what_is_kept():
    documents = {
        "open": page("a", identity="mmc4:1"),
        "gated": page("a", access="gated"),
        "non_commercial": page("a", identity="mmdialog:1"),
    }
    for most, kept in (("open", 1), ("gated", 2), ("non_commercial", 3)):
        stage = licence.build(licence.Licence(access=most))
        left = {name: stage(document) for name, document in documents.items()}
        assert [name for name, (found, _) in left.items() if found] == list(documents)[:kept]
        assert all(found.meta["access"] == name for name, (found, _) in left.items() if found)
        assert all(drop(outcome)[0] == "access" for outcome in left.values() if outcome[0] is None)


def test_pictures_with_other_licences_are_lost():
    known = {"0.png": {"license": "4"}, "1.png": {"license": "1"}}
    stage = licence.build(licence.Licence(pictures=("4", "5")))
    left, (loss,) = stage(page("a", image(0), image(1), image(2), images=known))
    assert [i.path for i in left.images] == ["0.png", "2.png"]
    assert (loss.reason, loss.message) == ("licence", "licence 1, none of 4, 5")


# Benchmarks

BENCHMARK = "The quick brown fox jumps over the lazy dog, again and again."


@pytest.fixture
def hashes(tmp_path) -> Path:
    file = tmp_path / "hashes"
    lines = decontaminate.hashes_of([page(BENCHMARK, image(50), "short text", of(b"broken"))])
    file.write_text("# of a benchmark\n\n" + "\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize(
    "document, reason",
    [
        (page("a", image(50, "renamed.png")), "contaminated_image"),
        (page("a", of(encoded(photo(50).resize((192, 160)), "JPEG", quality=85))), "contaminated_look"),
        (page("the QUICK brown fox\n jumps over the lazy dog  again, and again", image(1)), "contaminated_text"),
        (Document((user(BENCHMARK), assistant("a"))), "contaminated_text"),
        (page("a", of(b"broken")), "contaminated_image"),
        (page("short text", image(1), image(2), image(3), of(b"broken too")), None),
        (page(BENCHMARK + " And more.", image(1)), None),
    ],
)
def test_benchmarks_are_found_by_their_hashes(hashes, document, reason):
    outcome = decontaminate.build(decontaminate.Decontaminate(hashes=hashes))(document)
    if reason is None:
        assert outcome == (document, ())
    else:
        assert drop(outcome)[0] == reason


@pytest.mark.parametrize("line", ["image 12", "sound " + "0" * 64, "text " + "g" * 64, "0" * 64])
def test_a_list_with_a_bad_line_is_refused(tmp_path, line):
    (tmp_path / "hashes").write_text(f"# fine\n{line}\n")
    with pytest.raises(UsageError, match="no hash") as error:
        decontaminate.build(decontaminate.Decontaminate(hashes=tmp_path / "hashes"))
    assert error.value.where.endswith("line 2")


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        decontaminate.build(decontaminate.Decontaminate(hashes=tmp_path / "none"))


# The table and the recipe


def test_the_recipe_is_the_papers_pipeline():
    config = load_config(BuildConfig, RECIPES / "leafinstruct.yaml")
    filters = {filter.kind: filter for filter in config.filters}
    assert set(filters) == set(FILTERS) - {"decode"}
    assert {source.kind for source in config.sources} == {"mmc4", "mmdialog", "vist", "wikiweb2m", "youcook2"}
    assert (filters["image_count"].min, filters["image_count"].max) == (3, 6)
    assert filters["enough_images"].min == 3
    assert filters["sentence_count"].max == 12
    diverse = filters["image_diversity"]
    assert (diverse.metric, diverse.space, diverse.threshold, diverse.discard) == ("lpips", "similarity", 0.6, "above")
    assert filters["coherence"].min_cosine == 0.24
    assert filters["text_quality"].prompt == filters["instruct"].prompt == "paper"
    assert filters["instruct"].temperature == 1


def test_a_turn_that_loses_its_last_picture_is_still_a_turn():
    document = Document((user("draw"), Turn("assistant", (of(b"broken"),))))
    left, losses = image_limits.build(image_limits.ImageLimits())(document)
    assert [turn.role for turn in left.turns] == ["user", "assistant"]
    assert len(losses) == 1
