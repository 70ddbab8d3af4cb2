"""Visual dialogue: how well a model ranks 100 candidate answers (Das et al. 2017, arXiv:1611.08669).

dense    NDCG over the k best, k being the number of options that people found relevant
sparse   the rank of the one answer that was given: R@1, R@5, R@10, mean rank, mean reciprocal rank
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from weft.errors import UsageError
from weft.evaluation.metrics.scores import Scores, mean_of, same_length


def ranks(scores: Sequence[float]) -> list[int]:
    """Rank of each option from 1, by descending score; of equal scores the earlier option is first, which is ours."""
    ranked = [0] * len(scores)
    for rank, option in enumerate(_best_first(scores), start=1):
        ranked[option] = rank
    return ranked


def ndcg(scores: Sequence[Sequence[float]], relevance: Sequence[Sequence[float]]) -> Scores:
    """Normalised discounted cumulative gain, 0 to 1, the mean over dialogues.

    Args:
        scores: one per option, for each dialogue.
        relevance: what people said of the options, of the same sizes.

    Raises:
        UsageError: sizes disagree, or a dialogue has no relevant option, for which the metric has no value.
    """
    same_length("ndcg", scores=scores, relevance=relevance)
    values = []
    for i, (told, wanted) in enumerate(zip(scores, relevance, strict=True)):
        same_length(f"ndcg, dialogue {i}", scores=told, relevance=wanted)
        relevant = sum(gain != 0 for gain in wanted)
        if not relevant:
            raise UsageError(
                "no option is relevant, so there is no ideal ranking to compare with",
                where=f"ndcg, dialogue {i}",
                fix="leave this dialogue out and say so",
            )
        ideal = _gain(sorted(wanted, reverse=True)[:relevant])
        values.append(_gain([wanted[option] for option in _best_first(told)[:relevant]]) / ideal)
    return mean_of(values)


@dataclass(frozen=True)
class SparseRanks:
    """Of the answers that were given; the shares are 0 to 1."""

    r_at_1: Scores
    r_at_5: Scores
    r_at_10: Scores
    mean: Scores
    mrr: Scores


def sparse_ranks(scores: Sequence[Sequence[float]], given: Sequence[int]) -> SparseRanks:
    """Ranks of the answers that were given; `given` holds one index from 0 per dialogue."""
    same_length("sparse_ranks", scores=scores, given=given)
    for i, (told, answer) in enumerate(zip(scores, given, strict=True)):
        if not 0 <= answer < len(told):
            raise UsageError(
                f"answer {answer} is none of the {len(told)} options",
                where=f"sparse_ranks, dialogue {i}",
                fix="count options from 0",
            )
    found = [ranks(told)[answer] for told, answer in zip(scores, given, strict=True)]
    one, five, ten = (mean_of([float(rank <= k) for rank in found]) for k in (1, 5, 10))
    return SparseRanks(one, five, ten, mean_of([float(rank) for rank in found]), mean_of([1 / r for r in found]))


def _best_first(scores: Sequence[float]) -> list[int]:
    if any(math.isnan(score) for score in scores):
        raise UsageError("a score is not a number, so there is no best", where="ndcg", fix="look at the model")
    return sorted(range(len(scores)), key=lambda option: -scores[option])


def _gain(gains: Sequence[float]) -> float:
    return math.fsum(gain / math.log2(place + 1) for place, gain in enumerate(gains, start=1))
