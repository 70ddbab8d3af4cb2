"""MM-Vet: a language model grades each answer against the known one, in steps of 0.1."""

import statistics
from collections.abc import Iterable, Iterator, Sequence

from weft.evaluation.judge import Question
from weft.evaluation.metric import Answered, Context, Measured, Metric
from weft.evaluation.metrics.mm_vet import TRIES, Grade, MmVet, mm_vet, over_runs, read_grade
from weft.evaluation.records import Record, Status

SYSTEM = (
    "You compare a prediction with the ground truth of a question and reply with how right it is, one number from 0.0 "
    "(wrong) to 1.0 (right) in steps of 0.1, and nothing else. In the ground truth <AND> means that the prediction "
    "must say all of the parts, <OR> that one of them is enough.\n\n"
    "Question: What is x in the equation? | Ground truth: -1 <AND> -5 | Prediction: x = 3 | 0.0\n"
    "Question: What is x in the equation? | Ground truth: -1 <AND> -5 | Prediction: x = -1 | 0.5\n"
    "Question: What is x in the equation? | Ground truth: -1 <AND> -5 | Prediction: x = -1 or x = -5 | 1.0\n"
    "Question: Which bird is it? | Ground truth: a robin <OR> a European robin | Prediction: a robin | 1.0"
)
WINDOW = 64


def measure(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
    """A reply that cannot be read is asked for again, warmer each time; after five the grade is 0 by default.

    With several samples each is a run of its own, as the paper grades five times.
    """
    for start in range(0, len(answers), WINDOW):
        some = {answer.id: answer for answer in answers[start : start + WINDOW]}
        questions = [_question(answer) for answer in some.values()]
        for question, verdict in context.judge.ask(questions, read_grade, tries=TRIES, warmer=True):
            answer = some[question.id]
            status: dict[str, Status] = {"grade": "default"} if None in verdict.samples else {}
            runs = [grade or 0.0 for grade in verdict.samples]
            extra = {"replies": list(verdict.replies), "capabilities": answer.sample.reference["capabilities"]}
            yield Measured(answer.id, {"grade": statistics.fmean(runs)}, "", status, {**extra, "runs": runs})


def _question(answer: Answered) -> Question:
    reference = answer.sample.reference
    said = f"Question: {reference['question']} | Ground truth: {reference['answer']} | Prediction: {answer.text} |"
    return Question(answer.id, ({"role": "system", "content": SYSTEM}, {"role": "user", "content": said}), "")


def aggregate(records: Sequence[Record]) -> dict[str, float]:
    """Mean grades, in total and of the questions that need a capability, whatever else they need.

    Of several runs `deviation` is that of their totals, dividing by their number.
    """
    needs = [record.extra["capabilities"] for record in records]

    def graded(grades: Iterable[float]) -> MmVet:
        return mm_vet([Grade(value, by_default=False) for value in grades], needs)

    means = graded(record.values["grade"] or 0.0 for record in records)
    found = {"total": means.total.value, **{name: each.value for name, each in means.capabilities.items()}}
    runs = [graded(grades) for grades in zip(*(record.extra["runs"] for record in records), strict=True)]
    return {**found, "deviation": over_runs(runs)[1]} if len(runs) > 1 else found


METRICS = {
    "mm-vet/v1": Metric(
        "grades of a language model, in total and by capability",
        measure,
        aggregate,
        scale=100.0,
        digits=1,
        judged=True,
        beside=("prose/length",),
    )
}
