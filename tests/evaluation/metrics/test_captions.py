"""CIDEr-D, BLEU and ROUGE-L against the published evaluation, and their definitions term by term."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from weft.errors import UsageError
from weft.evaluation.metrics.captions import TOKENIZERS, bleu, cider_d, rouge_l

SHARED = Path(__file__).parents[4] / "shared" / "data" / "eval"
known = pytest.mark.skipif(not SHARED.is_dir(), reason="the known answers are not here")


def scores(candidates, references):
    one, two, three, four = bleu(candidates, references)
    return {
        "Bleu_1": one, "Bleu_2": two, "Bleu_3": three, "Bleu_4": four,
        "ROUGE_L": rouge_l(candidates, references), "CIDEr": cider_d(candidates, references),
    }  # fmt: skip


@known
@pytest.mark.parametrize("candidate", ["candidate_B", "candidate_C"])
@pytest.mark.parametrize("start", ["tokenized", "raw"])
def test_abstract_scenes(candidate, start):
    folder = SHARED / "abstract48s_captions"
    expected = json.loads((folder / "expected.json").read_text())[candidate]
    tokenized = json.loads((folder / "tokenized.json").read_text())
    images = list(tokenized[candidate])
    ours, theirs = [tokenized[candidate][i] for i in images], [tokenized["references"][i] for i in images]
    if start == "raw":
        raw = {each["image_id"]: each for each in json.loads((folder / "input.json").read_text())}
        ours = [TOKENIZERS["ptb"](raw[i][candidate]) for i in images]
        theirs = [[TOKENIZERS["ptb"](text) for text in raw[i]["references"]] for i in images]
    for name, score in scores(ours, theirs).items():
        assert score.value == pytest.approx(expected["corpus"][name], rel=0, abs=1e-9)
        each = [expected["per_image"][i][name] for i in images]
        assert score.per_sample == pytest.approx(each, rel=0, abs=1e-9)


@known
def test_values_published_in_a_unit_test():
    folder = SHARED / "nlg_eval_example"
    images = json.loads((folder / "input.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    ours = [TOKENIZERS["blanks"](each["candidate"]) for each in images]
    theirs = [[TOKENIZERS["blanks"](text) for text in each["references"]] for each in images]
    for name, score in scores(ours, theirs).items():
        assert score.value == pytest.approx(expected["published_5dp"][name], rel=0, abs=1e-5)
        assert score.value == pytest.approx(expected["pycocoevalcap_1.2_run"][name], rel=0, abs=1e-9)
    for each in json.loads((folder / "single_sentence.json").read_text()):
        words = TOKENIZERS["blanks"]
        for name, score in scores([words(each["candidate"])], [[words(r) for r in each["references"]]]).items():
            assert score.value == pytest.approx(each["published_5dp"][name], rel=0, abs=1e-5)


def test_cider_of_one_image_is_zero():
    assert cider_d(["a dog"], [["a dog"]]).value == 0


def test_cider_by_hand():
    # Two images share no word: every n-gram weighs its count times ln 2. The candidate of the first is one reference.
    perfect = cider_d(["a b c d", "x"], [["a b c d"], ["p q r s"]])
    assert perfect.per_sample == pytest.approx((10.0, 0.0))
    # Twice the words: the clipped cosine of each size, and a Gaussian over 7 - 3 bigrams.
    doubled = cider_d(["a b c d a b c d", "x"], [["a b c d"], ["p q r s"]]).per_sample[0]
    cosines = (
        4 / (math.sqrt(16) * 2),
        3 / (math.sqrt(3 * 4 + 1) * math.sqrt(3)),
        2 / (math.sqrt(2 * 4 + 2) * math.sqrt(2)),
        1 / math.sqrt(4 + 3),
    )
    assert doubled == pytest.approx(10 * sum(cosines) / 4 * math.exp(-16 / 72))


def by_definition(candidates, references):
    """CIDEr-D of each image, a dictionary of n-grams at a time."""

    def grams(caption, size):
        words = caption.split()
        return Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))

    values = []
    for candidate, group in zip(candidates, references, strict=True):
        total = 0.0
        for reference in group:
            apart = sum(grams(candidate, 2).values()) - sum(grams(reference, 2).values())
            for size in (1, 2, 3, 4):

                def weigh(caption, size=size):
                    counts = grams(caption, size)
                    images_with = {
                        g: sum(any(g in grams(r, size) for r in each) for each in references) for g in counts
                    }
                    return {g: n * math.log(len(references) / max(1, images_with[g])) for g, n in counts.items()}

                ours, theirs = weigh(candidate), weigh(reference)
                norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                shared = sum(min(weight, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, weight in ours.items())
                total += (shared / norms if norms else 0.0) * math.exp(-(apart**2) / 72)
        values.append(10 * total / 4 / len(group))
    return values


@pytest.mark.parametrize("seed", range(5))
def test_cider_of_any_captions_is_that_of_the_definition(seed):
    draw = random.Random(seed)

    def caption():
        return " ".join(draw.choices("abcde", k=draw.randint(0, 7)))

    candidates = [caption() for _ in range(6)]
    references = [[caption() for _ in range(draw.randint(1, 3))] for _ in candidates]
    found = cider_d(candidates, references)
    assert found.per_sample == pytest.approx(by_definition(candidates, references), rel=1e-12, abs=1e-12)
    assert max(found.per_sample) > 0.1


@pytest.mark.parametrize(
    "candidates, references",
    [(["a b", "c"], [["a"], ["c"]]), (["a b c d"], [["a b c"]]), (["a", "b"], [[""], ["b"]])],
)
def test_references_may_be_shorter_than_candidates(candidates, references):
    found = cider_d(candidates, references).per_sample
    assert found == pytest.approx(by_definition(candidates, references), rel=1e-12, abs=1e-12)


def test_cider_counts_images_not_captions_for_rarity():
    rare = cider_d(["a b", "p q", "r s"], [["a b", "a b"], ["p q"], ["r s"]])
    assert rare.per_sample == pytest.approx((5.0, 5.0, 5.0))


def test_bleu_takes_the_closest_reference_and_the_shorter_of_two_as_close():
    # Four words against references of 3 and 5: the shorter is taken, so there is no brevity penalty.
    one = bleu(["a b c d"], [["a b c", "a b c d e"]])[0]
    assert one.value == pytest.approx(1.0)
    shorter = bleu(["a b c d"], [["a b c d e"]])[0]
    assert shorter.value == pytest.approx(math.exp(1 - 5 / 4))


def test_bleu_of_a_corpus_is_not_the_mean_over_images():
    one = bleu(["a a a a", "b"], [["a x y z"], ["b"]])[0]
    assert one.value == pytest.approx(2 / 5)
    assert one.per_sample == pytest.approx((0.25, 1.0))


def test_rouge_takes_recall_and_precision_from_different_references():
    # Precision 1 with the first, recall 1 with the second.
    score = rouge_l(["a b"], [["a b c d", "a"]])
    assert score.value == pytest.approx(1.0)
    assert rouge_l(["a b"], [["c"]]).value == 0
    assert rouge_l([""], [[""]]).value == 1, "an empty caption is one empty word"


def test_nothing_scores_nothing():
    assert math.isnan(cider_d([], []).value)
    assert cider_d(["", "a"], [["b"], ["c"]]).per_sample == (0.0, 0.0)
    assert bleu([""], [["a"]])[3].value == pytest.approx(0)


@pytest.mark.parametrize("references", [[["a"], ["b"]], [[]], ["a"]])
def test_references_that_do_not_fit_are_refused(references):
    for metric in (cider_d, bleu, rouge_l):
        with pytest.raises(UsageError):
            metric(["a"], references)
