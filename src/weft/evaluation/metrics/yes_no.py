"""Questions with the answers yes and no.

POPE   Li et al. 2023, arXiv:2305.10355: does the model see objects that are not there? Whatever does not say no
       says yes, so `NO`, `none` and `isn't` do
MME    Fu et al. 2023, arXiv:2306.13394: two questions per picture; a score per task, of 200
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from weft.errors import UsageError
from weft.evaluation.metrics.scores import Scores, mean_of, same_length

YesNo = Literal["yes", "no"]
POPE_SPLITS = ("random", "popular", "adversarial")
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_pope(reply: str) -> YesNo:
    """No if `No`, `no` or `not` is a word, between blanks, of the first sentence without commas; otherwise yes."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_figures(true_yes: float, false_yes: float, true_no: float, false_no: float) -> dict[str, float]:
    """Of one split, from how many answers were what; `yes` is the positive class. A share of nothing is 0."""
    n = true_yes + false_yes + true_no + false_no
    precision, recall = _share(true_yes, true_yes + false_yes), _share(true_yes, true_yes + false_no)
    return {
        "accuracy": _share(true_yes + true_no, n),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(true_yes + false_yes, n),
    }


@dataclass(frozen=True)
class Pope:
    """Of one split."""

    true_yes: int
    false_yes: int
    true_no: int
    false_no: int
    accuracy: Scores

    @property
    def figures(self) -> dict[str, float]:
        return pope_figures(self.true_yes, self.false_yes, self.true_no, self.false_no)


def pope(replies: Sequence[str], labels: Sequence[str]) -> Pope:
    """Scores of one split. A label that is not `no` is yes."""
    same_length("pope", replies=replies, labels=labels)
    pairs = [(read_pope(reply), "no" if label == "no" else "yes") for reply, label in zip(replies, labels, strict=True)]
    return Pope(
        true_yes=pairs.count(("yes", "yes")),
        false_yes=pairs.count(("yes", "no")),
        true_no=pairs.count(("no", "no")),
        false_no=pairs.count(("no", "yes")),
        accuracy=mean_of([float(said == label) for said, label in pairs]),
    )


def pope_mean(splits: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the three splits of their figures."""
    if set(splits) != set(POPE_SPLITS):
        raise UsageError(
            f"POPE is the mean of {', '.join(POPE_SPLITS)}, not of {', '.join(splits) or 'nothing'}",
            where="pope_mean",
            fix="score the three splits, or report each by its own name",
        )
    return {name: sum(each[name] for each in splits.values()) / len(splits) for name in splits[POPE_SPLITS[0]]}


def read_mme(reply: str) -> Literal["yes", "no", "other"]:
    """What the lower-cased reply is, or holds in its first four characters; `yes` is looked for first."""
    start = reply.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


@dataclass(frozen=True)
class MmeQuestion:
    task: str
    image: str
    answer: YesNo


@dataclass(frozen=True)
class MmeTask:
    """`score` is 100 x accuracy + 100 x share of pictures with both questions right, so 200 at most."""

    accuracy: Scores
    both: Scores
    other: int
    """Replies that are neither yes nor no; they are wrong."""

    @property
    def score(self) -> float:
        return 100 * self.accuracy.value + 100 * self.both.value

    @classmethod
    def of(cls, pictures: Sequence[Sequence[float]], other: int = 0) -> "MmeTask":
        """
        Args:
            pictures: of each its two questions, 1 where the answer is right.
        """
        return cls(
            mean_of([hit for pair in pictures for hit in pair]), mean_of([min(pair) for pair in pictures]), other
        )


@dataclass(frozen=True)
class Mme:
    tasks: Mapping[str, MmeTask]

    @property
    def perception(self) -> float | None:
        """Sum over its ten tasks, of 2000; None where one is missing."""
        return self._sum(PERCEPTION)

    @property
    def cognition(self) -> float | None:
        """Sum over its four tasks, of 800; None where one is missing."""
        return self._sum(COGNITION)

    def _sum(self, names: Sequence[str]) -> float | None:
        return sum(self.tasks[name].score for name in names) if set(names) <= set(self.tasks) else None


def mme(replies: Sequence[str], questions: Sequence[MmeQuestion]) -> Mme:
    """Scores per task and the two sums.

    Raises:
        UsageError: an unknown task, or a picture of a task that has not two questions.
    """
    same_length("mme", replies=replies, questions=questions)
    by_task: dict[str, dict[str, list[tuple[str, YesNo]]]] = {}
    for reply, question in zip(replies, questions, strict=True):
        if question.task not in (*PERCEPTION, *COGNITION):
            raise UsageError(
                f"MME has no task {question.task!r}", where="mme", fix=f"one of {', '.join(PERCEPTION + COGNITION)}"
            )
        pictures = by_task.setdefault(question.task, {})
        pictures.setdefault(question.image, []).append((read_mme(reply), question.answer))
    tasks = {}
    for task, pictures in by_task.items():
        for image, pairs in pictures.items():
            if len(pairs) != 2:
                raise UsageError(
                    f"picture {image!r} has {len(pairs)} questions instead of two", where=f"mme, {task}",
                    fix="score whole tasks: half of the score is over pictures",
                )  # fmt: skip
        tasks[task] = MmeTask.of(
            [[float(said == answer) for said, answer in pairs] for pairs in pictures.values()],
            other=sum(said == "other" for pairs in pictures.values() for said, _ in pairs),
        )
    return Mme(MappingProxyType(tasks))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
