"""All filters of the table keep their promises, in whichever order they run."""

import functools
import json
import random
import re
from collections import Counter
from typing import Any

import pytest

from tests.data.corpus import DAMAGED, encoded, write
from tests.data.test_filters import BENCHMARK, LIMITS, image, of, page, photo
from weft.data.build import BuildConfig, build
from weft.data.executor import ExecutorConfig
from weft.data.filters import FILTERS, FilterConfig, decontaminate, order
from weft.data.filters.enough_images import EnoughImages
from weft.data.ledger import Tally
from weft.data.stage import Count, Outcome, Processed, Record, Together, Writes, count, run_window
from weft.document import Document, Image, Text, assistant, user
from weft.errors import ConfigError, WeftError

GOOD = (
    "We walked down to the sea in the morning, and the water was as warm as it had been in the summer.",
    "My brother found a shell that was larger than his hand. He gave it to our mother.",
    "At noon there was bread with cheese for everybody who had helped to carry the boat.",
    "Then we went home, because it was late.",
    "The dog slept on the way, and nobody said a word.",
    "In the evening it rained so hard that the road was under water.",
)
BAD = ("buy", "12 34 56 !!", "A long day it was. " * 40, BENCHMARK, " ")
DOCUMENTS = 160


@functools.cache
def pictures() -> tuple[tuple[Image, ...], tuple[Image, ...]]:
    """Good ones, and others."""
    good = tuple(image(seed, f"good{seed}.png") for seed in range(12))
    bad = [of(encoded(made), f"{name}.png") for name, (made, *_) in LIMITS.items()]
    bad += [of(data, name) for name, data in DAMAGED.items()]
    bad += [of(encoded(photo(1).resize((120, 100)), "JPEG"), "alike.jpg"), image(50, "benchmark.png"), good[0]]
    return good, tuple(bad)


def documents(seed: int, number: int = DOCUMENTS) -> list[Document]:
    """Some without a fault, most with a few."""
    rng = random.Random(seed)
    return [_document(rng, f"{rng.choice(('mmc4', 'obelics', 'omnicorpus', 'mmdialog'))}:{i}") for i in range(number)]


def _document(rng: random.Random, identity: str) -> Document:
    good, bad = pictures()
    faulty = rng.random() < 0.6
    shown = rng.sample(good, rng.randint(1, 8) if faulty else rng.randint(3, 6))
    parts: list[str | Image] = []
    for each in shown:
        parts.append(rng.choice(BAD) if faulty and rng.random() < 0.1 else GOOD[len(parts) // 2 % len(GOOD)])
        parts.append(rng.choice(bad) if faulty and rng.random() < 0.15 else each)
    low = 0.1 if faulty else 0.3
    about: dict[str, Any] = {
        part.path: {"similarity": rng.uniform(low, 0.5), "unsafe_prob": rng.uniform(0, 0.51 if faulty else 0.4)}
        for part in parts
        if isinstance(part, Image)
    }
    turns = (user("write about the sea"), assistant(*parts)) if rng.random() < 0.3 else (assistant(*parts),)
    meta = {"similarity_model": "clip-vit-large-patch14", "images": about}
    return Document(turns, identity, {**meta, **({"porn_prob": rng.random()} if rng.random() < 0.1 else {})})


@pytest.fixture(scope="module")
def hashes(tmp_path_factory):
    file = tmp_path_factory.mktemp("lists") / "hashes"
    file.write_text("\n".join(decontaminate.hashes_of([page(BENCHMARK, image(50))])))
    return file


def configs(hashes, **changes: dict[str, Any]) -> list[FilterConfig]:
    """One of every kind, all of which drop something."""
    fields: dict[str, dict[str, Any]] = {
        "enough_images": {"min": 3}, "text_length": {"min": 100, "max": 700}, "sentence_count": {"max": 12},
        "safety": {"on_unsafe_image": "image"}, "licence": {"access": "open"}, "image_limits": {"max_side": 400},
        "decode": {"on_bad_image": "image"}, "has_answer": {}, "image_count": {"min": 3, "max": 6},
        "decontaminate": {"hashes": hashes}, "duplicate_images": {}, "image_diversity": {"threshold": 0.3},
        "coherence": {"threshold": 0.22}, "text_quality": {}, "instruct": {}, "rewrite": {"max_text_tokens": 150},
        "split": {},
    }  # fmt: skip
    assert fields.keys() == FILTERS.keys()
    values = [{"kind": kind, **each, **changes.get(kind, {})} for kind, each in fields.items()]
    build = BuildConfig.model_validate({"sources": [{"kind": "picturebook"}], "filters": values})
    return list(build.filters)


def outcomes(config: FilterConfig, taken: list[Document]) -> list[Outcome]:
    stage = FILTERS[config.kind](config)
    if isinstance(stage, Together):
        return list(stage.stage(taken))
    return [getattr(stage, "stage", stage)(document) for document in taken]


def run(filters: list[FilterConfig] | tuple[FilterConfig, ...], taken: list[Document]) -> tuple[list[Processed], Tally]:
    records = [Record("f", i, document, count(document)) for i, document in enumerate(taken)]
    processed = run_window(records, [(config.kind, FILTERS[config.kind](config)) for config in filters])
    tally = Tally()
    for item in processed:
        tally.add(item)
    tally.check()
    return processed, tally


@pytest.mark.parametrize("kind", FILTERS)
def test_filters_name_what_they_take_and_judge_every_document_alone(kind, hashes):
    config = next(each for each in configs(hashes) if each.kind == kind)
    taken = documents(1, 80)
    together = outcomes(config, taken)
    assert together == outcomes(config, taken)
    assert together[::-1] == outcomes(config, taken[::-1])
    assert together[7:9] == outcomes(config, taken[7:9])
    lost = 0
    for document, (left, losses) in zip(taken, together, strict=True):
        lost += len(losses)
        assert all(re.fullmatch(r"[a-z][a-z_]+", loss.reason) and loss.message for loss in losses)
        if left is None:
            (loss,) = losses
            assert loss.what == "record"
            continue
        images = list(document.images)
        for loss in losses:
            assert loss.what == "image"
        assert count(left).images == len(images) - len(losses)
        rest = iter(images)
        assert all(each in rest for each in left.images)  # in order
        assert count(left).texts - count(document).texts in ((0, 1) if kind == "split" else (0,))
        assert left.id == document.id
        assert document.meta.items() <= left.meta.items() or kind == "licence"
    assert lost or kind in ("has_answer", "instruct", "rewrite")


@pytest.mark.parametrize("kind", sorted(set(FILTERS) - {"instruct", "rewrite", "split"}))
def test_what_was_kept_is_kept_again(kind, hashes):
    config = next(each for each in configs(hashes) if each.kind == kind)
    kept = [left for left, _ in outcomes(config, documents(2, 80)) if left is not None]
    # a picture's place in the document, by which coherence counts scores, does not change what they are
    assert [(left, losses) for left, losses in outcomes(config, kept)] == [(document, ()) for document in kept]


@pytest.mark.parametrize("seed, unit, costs", [(0, "document", "image"), (1, "image", "image"), (2, "image", "record")])
def test_both_orders_keep_the_same_documents(seed, unit, costs, hashes):
    changes = {"coherence": {"unit": unit}, "image_limits": {"on_bad_image": costs}, "decode": {"on_bad_image": costs}}
    filters = [each for each in configs(hashes, **changes) if each.kind != "enough_images"]
    random.Random(seed).shuffle(filters)
    taken = documents(100 + seed)
    kept, tallies = {}, {}
    for name in ("cheapest", "paper"):
        processed, tallies[name] = run(order.ordered(filters, name), taken)
        kept[name] = [item.document for item in processed if item.document is not None]
    assert kept["cheapest"] == kept["paper"]
    assert DOCUMENTS / 20 < len(kept["paper"]) < DOCUMENTS / 2
    assert tallies["cheapest"].kept == tallies["paper"].kept
    assert tallies["cheapest"].dropped != tallies["paper"].dropped
    reasons = Counter(reason for _, _, reason in tallies["paper"].reasons)
    assert len(reasons) >= 12


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_between_what_removes_and_what_writes_any_order_keeps_the_same(seed, hashes):
    filters = order.ordered(configs(hashes), "paper")
    first = sum(each.kind in ("safety", "licence", "image_limits", "decode") for each in filters)
    last = len(filters) - 3
    taken = documents(200)
    wanted = [item.document for item in run(filters, taken)[0]]
    shuffled = list(filters[first:last])
    random.Random(seed).shuffle(shuffled)
    assert [item.document for item in run([*filters[:first], *shuffled, *filters[last:]], taken)[0]] == wanted


def test_the_orders_are_those_of_the_papers_and_of_cost(hashes):
    filters = configs(hashes)[::-1]
    assert order.ordered(filters, "given") == tuple(filters)
    cheapest = [each.kind for each in order.ordered(filters, "cheapest")]
    assert cheapest == [
        "enough_images", "text_length", "sentence_count", "safety", "licence", "image_limits", "decode", "has_answer",
        "image_count", "decontaminate", "duplicate_images", "image_diversity", "coherence", "text_quality",
        "instruct", "rewrite", "split",
    ]  # fmt: skip
    paper = [each.kind for each in order.ordered(filters, "paper")]
    assert paper == [
        "enough_images", "safety", "licence", "image_limits", "decode", "has_answer", "decontaminate", "image_count",
        "sentence_count", "text_length", "coherence", "text_quality", "duplicate_images", "image_diversity",
        "instruct", "rewrite", "split",
    ]  # fmt: skip
    counted = [each for each in filters if each.kind == "image_count"]
    assert order.ordered(counted, "cheapest") == (EnoughImages(min=3), *counted)
    assert order.ordered(counted, "paper") == tuple(counted)
    by_picture = [each.kind for each in order.ordered(configs(hashes, coherence={"unit": "image"}), "cheapest")]
    assert by_picture.index("coherence") < by_picture.index("image_count") < by_picture.index("duplicate_images")
    kinds = {*order.REMOVING, *order.CHEAPEST, *order.WRITING, "enough_images"}
    assert kinds == {*order.REMOVING, *order.PAPER, *order.WRITING, "enough_images"} == set(FILTERS)


@pytest.fixture
def source(tmp_path):
    """A file of documents, with their pictures beside it."""
    taken = documents(400, 120)
    write(tmp_path / "in", {each.path: each.data for document in taken for each in document.images})
    lines = "".join(json.dumps(document.to_json()) + "\n" for document in taken)
    (tmp_path / "in" / "documents.jsonl").write_text(lines)
    return tmp_path / "in" / "documents.jsonl"


def test_a_build_with_all_filters_gives_the_same_bytes_whoever_works(source, hashes, tmp_path):
    config = BuildConfig.model_validate({"sources": [{"kind": "chat_jsonl", "path": source}], "order": "cheapest"})
    config = config.model_copy(update={"filters": tuple(configs(hashes))})
    made = {}
    for workers in (1, 2):
        executor = ExecutorConfig(kind="serial" if workers == 1 else "processes", workers=workers)
        out = tmp_path / f"out{workers}"
        summary = build(config.model_copy(update={"executor": executor}), out)
        names = ["ledger.jsonl", *summary.files]
        made[workers] = [(out / name).read_bytes() for name in names]
        total = summary.total
        assert total.read == total.kept + total.lost
        assert 5 < total.kept.records < total.read.records == 120
    assert made[1] == made[2]
    reasons = {json.loads(line)["reason"] for line in made[1][0].decode().splitlines()}
    assert len(reasons) >= 12


def test_a_kind_that_is_there_twice_has_no_order(hashes):
    filters = configs(hashes)
    with pytest.raises(ConfigError, match="twice"):
        order.ordered([*filters, filters[1]], "cheapest")
    assert len(order.ordered([*filters, filters[1]], "given")) == len(filters) + 1


def test_losses_of_pictures_and_of_documents_add_up(hashes):
    filters = order.ordered(configs(hashes), "cheapest")
    taken = documents(300)
    processed, tally = run(filters, taken)
    assert tally.read == sum(map(count, taken), Count())
    assert tally.kept + tally.lost == tally.read
    assert tally.read.records == DOCUMENTS
    assert all(isinstance(part, Text | Image) for item in processed if item.document for part in item.document.parts)


def test_only_a_stage_that_says_so_may_write_and_only_texts():
    document = page("a", image(0))
    record = Record("f", 1, document, count(document))

    def adding(*parts: Text | Image) -> Any:
        return lambda document: (Document((user(*parts), *document.turns), document.id), ())

    (item,) = run_window([record], [("s", Writes(adding(Text("x"), Text("y"))))])
    assert (item.record.added, item.kept) == (2, count(document))
    for stage in (adding(Text("x")), Writes(adding(image(1))), Writes(lambda document: (page("a"), ()))):
        with pytest.raises(WeftError, match="without naming them"):
            run_window([record], [("s", stage)])
