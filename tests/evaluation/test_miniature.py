"""The miniature: verdicts from known numbers, aspects from known answers, and a run that a kill does not change."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from weft.adapters import AdapterConfig, adapter_parameters, attach
from weft.backbones import load_backbone
from weft.backbones.base import encode_document
from weft.data.collate import collate
from weft.data.sources.picturebook import Reader, draw, random_scene, random_story
from weft.document import Image, Text
from weft.errors import UsageError
from weft.evaluation.miniature import jobs, page, tuning
from weft.evaluation.miniature.alphabets import MiniatureBackbone, describe, draw_empty, make
from weft.evaluation.miniature.arms import ARMS, BUDGETS, PRINTED, Budget
from weft.evaluation.miniature.aspects import ASPECTS, score
from weft.evaluation.miniature.claims import CLAIMS, Claim
from weft.evaluation.miniature.jobs import jobs_of, story_document
from weft.evaluation.miniature.run import find_budget, run_miniature
from weft.evaluation.miniature.verdicts import interval, judge
from weft.images import encode_png

SMALL = Budget(
    arms=("moss", "moe_equal"), seeds=1, steps=4, stories=2, training=6, batch=2, checked=1, save_every=2,
    resamples=200, generalist="nano",
)  # fmt: skip

RECIPES = Path(__file__).parents[2] / "recipes"
CLAIMS_BY_NAME = {claim.name: claim for claim in CLAIMS}


@pytest.fixture(scope="module")
def reader():
    return Reader()


@pytest.fixture(scope="module")
def nano():
    return load_backbone("nano")


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gain,measure,verdict",
    [
        (0.5, "overall", "holds"),
        (-0.5, "overall", "does not hold"),
        (0.0, "overall", "not resolved at this n"),
        (0.5, "image_loss", "does not hold"),
        (-0.5, "image_loss", "holds"),
    ],
)
def test_a_verdict_follows_the_interval(gain, measure, verdict):
    noise = np.random.default_rng(0).normal(size=(3, 50))
    noise -= noise.mean(1, keepdims=True)
    values = {"a": {measure: gain + noise}, "b": {measure: np.zeros((1, 50))}}
    found = judge(Claim("c", "", "", {"a": 1, "b": -1}, measure), values, resamples=500)
    assert found.verdict == verdict and found.low <= found.estimate <= found.high
    assert abs(found.estimate) == pytest.approx(abs(gain)) and (found.seeds, found.stories) == (3, 50)


def test_pairs_are_compared_and_not_means():
    hard = np.random.default_rng(1).normal(scale=10, size=(1, 40))  # how hard each story is, the same for both
    values = {"a": {"overall": hard + 0.1 + 0.01 * np.sign(hard)}, "b": {"overall": hard}}
    assert judge(Claim("c", "", "", {"a": 1, "b": -1}), values, resamples=500).verdict == "holds"


EXTRA = 0.1 * (2**0.5 - 1)
"""What two seeds that are 0.1 from their mean are stretched by."""


def test_seeds_that_disagree_settle_nothing_however_many_stories():
    values = np.array([[1.0], [-0.6]]) + np.zeros((2, 500))
    low, high = interval(values, resamples=2000)
    # two seeds have a spread of 0.8 around 0.2, stretched by sqrt(2)
    assert (low, high) == pytest.approx((0.2 - 0.8 * 2**0.5, 0.2 + 0.8 * 2**0.5))


def test_intervals_of_the_mean_cover_it_as_often_as_they_say():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(200):
        values = rng.normal(size=(6, 1)) * 0.3 + rng.normal(size=(1, 30)) + rng.normal(size=(6, 30)) * 0.5
        low, high = interval(values, resamples=300)
        hits += low < 0 < high
    assert 0.86 <= hits / 200 <= 0.995  # 95 %, less what percentiles of few seeds lose; 200 draws know it to 0.03


def test_a_claim_without_its_arms_has_no_verdict():
    assert judge(CLAIMS[0], {"base": {"overall": np.zeros((1, 2))}}, resamples=10) is None


@pytest.mark.parametrize(
    ("measure", "mean", "low", "high"),
    [("wellformed", 0.9, 0.8 - EXTRA, 1.0), ("wellformed", 0.1, 0.0, 0.2 + EXTRA), ("text_loss", 0.1, 0.0, 0.2 + EXTRA),
     ("log_image_loss", 0.1, -EXTRA, 0.2 + EXTRA)],
)  # fmt: skip
def test_the_interval_of_an_arm_holds_only_what_a_measure_can_be(measure, mean, low, high):
    values = mean + np.array([[-0.1], [0.1]]) + np.zeros((2, 50))
    assert page._cell(measure, values, 2000) == pytest.approx({"mean": mean, "low": low, "high": high}, abs=1e-6)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_every_arm_of_a_claim_exists_and_contrasts_sum_to_nothing():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert set(claim.contrast) <= set(ARMS) and sum(claim.contrast.values()) == 0, claim.name
    assert set(BUDGETS["quick"].arms) <= set(BUDGETS["full"].arms) == set(ARMS) and set(PRINTED) <= set(ARMS)


def test_equal_arms_have_the_parameters_of_moss():
    def parameters(name):
        backbone = load_backbone("tiny")
        attach(backbone, AdapterConfig.model_validate(dict(ARMS[name].adapter)))
        return sum(p.numel() for p in adapter_parameters(backbone).values())

    moss = parameters("moss")
    for name in ("lora_equal", "moe_equal", "sam_equal", "moss_k3_equal"):
        assert abs(parameters(name) / moss - 1) < 0.015, name


# --- aspects --------------------------------------------------------------------------------------------------------


def perfect(story):
    return [
        part
        for sentence, scene in zip(story.sentences(), story.scenes, strict=True)
        for part in (Text(sentence), Image(encode_png(draw(scene))))
    ]


def of(story, parts, reader):
    return {name: round(value, 3) for name, value in score(story, parts, True, reader, 40.0).items()}


def test_a_perfect_answer_has_all_of_each_aspect_and_an_empty_one_nothing(reader):
    story = random_story(random.Random(3))
    assert all(value == 1 for value in of(story, perfect(story), reader).values())
    assert not any(of(story, [], reader).values())


def test_another_story_told_well_is_good_but_not_helpful(reader):
    asked, told = (random_story(random.Random(seed)) for seed in (3, 4))
    found = of(asked, perfect(told), reader)
    assert [found[name] for name in ASPECTS[:4]] == [1, 1, 1, 1] and found["helpfulness"] == 0
    assert found["overall"] == 0.8 and found["wellformed"] == 1 and found["picture_1"] == 0


def test_each_aspect_sees_its_own_fault(reader):
    story = random_story(random.Random(3))
    good = perfect(story)
    swapped = of(story, [*good[:3], good[5], good[4], good[3]], reader)  # pictures 2 and 3
    assert swapped["text_quality"] == 1 and swapped["perceptual_quality"] == 1
    assert swapped["text_image_coherence"] == pytest.approx(1 / 3, abs=1e-3)
    nonsense = of(story, [*good[:2], Text("the cat sings."), *good[3:]], reader)
    assert nonsense["text_quality"] == nonsense["text_image_coherence"] == pytest.approx(1 / 3, abs=1e-3)
    assert nonsense["image_coherence"] == 1 and nonsense["helpfulness"] == pytest.approx(5 / 6, abs=1e-3)
    pixels = np.asarray(draw(story.scenes[0])).astype(int)
    noisy = np.clip(pixels + np.random.default_rng(0).normal(scale=20, size=pixels.shape), 0, 255).astype(np.uint8)
    from PIL import Image as PILImage

    dirty = of(story, [good[0], Image(encode_png(PILImage.fromarray(noisy))), *good[2:]], reader)
    assert dirty["perceptual_quality"] < 0.9 and dirty["helpfulness"] == 1
    long = of(story, [*good, *good], reader)
    assert long["perceptual_quality"] == 1 and long["text_quality"] == 0.5 and long["text_image_coherence"] == 0.5


# --- alphabets ------------------------------------------------------------------------------------------------------


def test_a_shuffled_order_is_the_same_picture_and_the_same_places(nano):
    scene = random_scene(random.Random(1))
    plain, shuffled = MiniatureBackbone(nano, "familiar"), MiniatureBackbone(nano, "permuted")
    for model in (plain, shuffled):
        model.write_anew()
    ours, theirs = (model.encode_images([draw(scene)], generated=True)[0] for model in (plain, shuffled))
    assert sorted(shuffled.order.tolist()) == list(range(4)) and shuffled.order.tolist() != list(range(4))
    assert theirs.ids.tolist() == ours.ids[shuffled.order].tolist()
    assert np.array_equal(plain.decode_image(ours), shuffled.decode_image(theirs))
    # the input of a patch is its code and the place it has in the picture, wherever it is written
    document = story_document(random_story(random.Random(2)))
    rows = [collate([encode_document(model, document)], nano.tokens.pad) for model in (plain, shuffled)]
    patches = [(batch.layout.inputs.image == 0)[0] for batch in rows]
    one, other = (
        (model.embed(batch.ids, batch.layout) - model.place_out(_cells(model, batch.layout)))[0][chosen]
        for model, batch, chosen in zip((plain, shuffled), rows, patches, strict=True)
    )
    inner = slice(0, 3)  # the last patch predicts a token, which has no place
    kept = [i for i in range(4) if i < 3 and shuffled.order[i] < 3]
    assert kept
    for i in kept:
        assert np.allclose(other[inner][i].detach(), one[inner][shuffled.order[i]].detach(), atol=1e-6)


def test_rows_are_written_from_right_to_left_and_read_back(nano):
    picture = PILImage.new("RGB", (16, 16), "white")
    picture.paste("black", (0, 0, 8, 16))
    plain, mirrored = MiniatureBackbone(nano, "familiar"), MiniatureBackbone(nano, "patch")
    ours = plain.encode_images([picture], generated=True)[0]
    assert mirrored.encode_images([picture], generated=True)[0].ids.tolist() == ours.ids.tolist()
    mirrored.write_anew()
    theirs = mirrored.encode_images([picture], generated=True)[0]
    assert theirs.ids.tolist() == ours.ids.reshape(2, 2).flip(1).flatten().tolist() != ours.ids.tolist()
    assert np.array_equal(plain.decode_image(ours), mirrored.decode_image(theirs))


def _cells(model, layout):
    place = (layout.outputs.row * model.form.cols + layout.outputs.col).clamp_min(0)
    return model.order[place]


@pytest.mark.parametrize("alphabet", ["field", "vector"])
def test_an_alphabet_is_learnt_and_read_back_equal(alphabet, nano, tmp_path):
    budget = Budget(arms=("base",), seeds=1, steps=2, stories=1, training=1, codec=3, base=3, pictures=40, save_every=2)
    folder, codec, said = tmp_path / alphabet, tmp_path / "codec", []
    made = make(alphabet, nano, budget, folder, codec, said.append)
    again = make(alphabet, nano, budget, folder, codec, said.append)
    assert made.fingerprint == again.fingerprint != nano.fingerprint and len(said) == 4
    pictures = [draw(random_scene(random.Random(seed))) for seed in (5, 6)]
    elements = made.encode_images(pictures, generated=True)
    assert (elements[0].features is not None) == (alphabet == "vector")
    assert made.decode_image(elements[0]).size == (16, 16)
    facts = describe(made, [random_scene(random.Random(seed)) for seed in (5, 6)])
    assert facts["reconstruction_db"] > 0


def test_the_background_of_a_scene_is_what_things_do_not_cover():
    scene = random_scene(random.Random(8))
    empty, full = (np.asarray(picture).astype(int) for picture in (draw_empty(scene), draw(scene)))
    changed = (empty != full).any(-1)
    assert 0.01 < changed.mean() < 0.5 and not changed[:10].any()


# --- runs -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_a_run_that_is_killed_and_started_again_gives_the_same_report(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "TEXT_TOKENS", 8)  # a random model does not end by itself
    whole = run_miniature(tmp_path / "whole", SMALL, workers=0)
    assert list(whole["arms"]) == ["moss", "moe_equal"] and whole["arms"]["moss"]["trained_parameters"] > 0
    assert list(whole["claims"]) == ["equal_parameters_moe", "equal_parameters_loss"]
    assert len(whole["not_run"]) == len(CLAIMS) - 2
    shown = (tmp_path / "whole" / "report.html").read_text()
    assert shown.count("<svg") == 4 and shown.count("not run in this budget") == len(CLAIMS) - 2

    out, count = tmp_path / "killed", 0
    write = tuning.write_checkpoint

    def write_or_die(*args):
        nonlocal count
        count += 1
        write(*args)
        if count in (1, 3):
            raise Killed

    monkeypatch.setattr(tuning, "write_checkpoint", write_or_die)
    monkeypatch.setattr(page, "_chart", lambda title, draw, **_: {"title": title, "svg": ""})  # seconds each
    for _ in range(2):
        with pytest.raises(Killed):
            run_miniature(out, SMALL, workers=0)
    again = run_miniature(out, SMALL, workers=0)
    assert count == 4  # nothing was done twice
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    tables = [(tmp_path / name / "table.md").read_text().split(" s. ") for name in ("whole", "killed")]
    assert tables[0][1:] == tables[1][1:]

    # nothing is left to do: not even the time changes
    before = (out / "report.json").read_bytes()
    run_miniature(out, SMALL, workers=0)
    assert (out / "report.json").read_bytes() == before
    with pytest.raises(UsageError, match="another budget"):
        run_miniature(out, BUDGETS["quick"], workers=0)


def test_a_budget_may_be_a_recipe():
    budget, name = find_budget(str(RECIPES / "miniature_locality.yaml"))
    assert set(BUDGETS["full"].arms) > set(budget.arms) >= CLAIMS_BY_NAME["locality"].contrast.keys() and name
    with pytest.raises(UsageError, match="no budget 'slow'"):
        find_budget("slow")
    with pytest.raises(ValueError, match="nearest is moss"):
        Budget(arms=("mos",))


def test_learning_lowers_the_loss(tmp_path, nano):
    model = make("patch", nano, SMALL, tmp_path, tmp_path, lambda line: None)
    attach(model, AdapterConfig(kind="full"))
    sequences = [encode_document(model, story_document(random_story(random.Random(i)))) for i in range(2)]
    before = tuning.losses_of(model, sequences[0])
    loss = tuning.document_loss(model, sequences, 2, seed=0)
    tuning.descend(adapter_parameters(model), loss, tuning.Pace(12, 1e-2, 50), tmp_path, lambda line: None)
    assert all(after < start for after, start in zip(tuning.losses_of(model, sequences[0]), before, strict=True))


def test_the_full_budget_learns_every_alphabet_before_its_arms():
    found = jobs_of(BUDGETS["full"])
    names = [job.name for job in found]
    assert len(set(names)) == len(names) and names[:2] == ["alphabet/patch", "codec"]
    for i, job in enumerate(found):
        assert all(names.index(needed) < i for needed in job.needs)
    assert sum(name.startswith("arm/") for name in names) == 3 * (len(ARMS) - 1) + 1


@pytest.mark.slow
def test_processes_give_what_one_process_gives(tmp_path):
    alone = run_miniature(tmp_path / "alone", SMALL, workers=0)
    together = run_miniature(tmp_path / "together", SMALL, workers=2)
    assert {**alone, "seconds": 0} == {**together, "seconds": 0}
    shutil.rmtree(tmp_path / "together" / "arms" / "moss" / "seed0")
    assert run_miniature(tmp_path / "together", SMALL, workers=2)["arms"] == alone["arms"]
