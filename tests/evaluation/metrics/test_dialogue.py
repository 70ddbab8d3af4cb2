"""Ranks of answers: NDCG over what people found relevant, and the rank of the answer that was given."""

import json
import math
from pathlib import Path

import pytest

from weft.errors import UsageError
from weft.evaluation.metrics.dialogue import ndcg, ranks, sparse_ranks

DATA = Path(__file__).parents[4] / "shared" / "data" / "eval" / "visdial_ndcg"


@pytest.mark.skipif(not DATA.is_dir(), reason="the known answers are not here")
def test_the_known_answers():
    dialogues = json.loads((DATA / "input.json").read_text())
    expected = json.loads((DATA / "expected.json").read_text())
    scores = [each["scores"] for each in dialogues]
    dense = ndcg(scores, [each["gt_relevance"] for each in dialogues])
    assert dense.value == pytest.approx(expected["ndcg"], rel=0, abs=1e-6)
    assert dense.per_sample == pytest.approx(expected["per_dialog_ndcg"], rel=0, abs=1e-6)
    sparse = sparse_ranks(scores, [each["gt_index"] for each in dialogues])
    for name, ours in (("r@1", sparse.r_at_1), ("r@5", sparse.r_at_5), ("r@10", sparse.r_at_10), ("mrr", sparse.mrr)):
        assert ours.value == pytest.approx(expected[name], rel=0, abs=1e-6)
    # Theirs is a float32: 39.1666679 for 39 1/6.
    assert sparse.mean.value == pytest.approx(expected["mean"], rel=1e-7)


def test_ndcg_by_hand():
    # Two relevant options; the best two by score hold gains 0.4 and 0.
    value = ndcg([[3.0, 2.0, 1.0]], [[0.4, 0.0, 1.0]]).value
    assert value == pytest.approx(0.4 / (1.0 + 0.4 / math.log2(3)))


def test_equal_scores_rank_in_the_order_of_the_options():
    assert ranks([1.0, 2.0, 1.0, 2.0]) == [3, 1, 4, 2]


def test_sparse_ranks_by_hand():
    sparse = sparse_ranks([[0.1, 0.9], [float(i) for i in range(12)]], [1, 0])
    assert sparse.mean.per_sample == (1.0, 12.0)
    assert (sparse.r_at_1.value, sparse.r_at_10.value) == (0.5, 0.5)
    assert sparse.mrr.value == pytest.approx((1 + 1 / 12) / 2)


def test_what_has_no_value_is_refused():
    with pytest.raises(UsageError, match="no option is relevant"):
        ndcg([[1.0, 2.0]], [[0.0, 0.0]])
    with pytest.raises(UsageError, match="2 scores, 1 relevance"):
        ndcg([[1.0, 2.0]], [[1.0]])
    with pytest.raises(UsageError, match="none of the 2 options"):
        sparse_ranks([[1.0, 2.0]], [2])


def test_a_score_that_is_no_number_has_no_rank():
    with pytest.raises(UsageError, match="not a number"):
        ranks([1.0, float("nan"), 2.0])
