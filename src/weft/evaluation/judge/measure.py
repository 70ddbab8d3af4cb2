"""A rubric as a metric: rules where an answer lacks what is judged, the judge for the rest."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weft.evaluation.judge import Judge, Question, Verdict
from weft.evaluation.judge.rubric import Criterion, Modality, Rubric
from weft.evaluation.metric import Answered, Context, Measured, Metric, means
from weft.evaluation.metrics.replies import Scale, read_score
from weft.evaluation.records import Record, Status

WINDOW = 16
"""Answers whose pictures are in memory at once."""


def rubric_metric(rubric: Rubric) -> Metric:
    """The row of a rubric. `overall` is the plain mean of the means of its criteria."""

    def measure(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
        for start in range(0, len(answers), WINDOW):
            yield from _window(rubric, answers[start : start + WINDOW], context.judge)

    return Metric(rubric.source, measure, overall, version=rubric.version, judged=True)


def overall(records: Sequence[Record]) -> dict[str, float]:
    """The mean of each criterion over the answers it applies to, and the mean of those means."""
    found = means(records)
    return {**found, "overall": sum(found.values()) / len(found)} if found else {}


def by_rule(criterion: Criterion, answer: Answered, judge: Judge) -> Status | None:
    """`not_applicable`, or `by_rule` where the answer gets the lowest score unasked; None: the judge is asked."""
    prediction = answer.prediction
    wanted: Sequence[str] = answer.sample.reference.get("outputs", ("text", "image"))
    if any(each not in wanted for each in criterion.about):
        return "not_applicable"
    has: dict[Modality, bool] = {"text": bool(prediction.text.strip()), "image": bool(prediction.images)}
    if prediction.is_empty or any(not has[each] for each in criterion.about):
        return "by_rule"
    is_single = len(prediction.images) == 1 and not any(True for _ in answer.sample.prompt.images)
    if criterion.compares and is_single and judge.config.single_image == "not_applicable":
        return "not_applicable"
    return None


def _window(rubric: Rubric, answers: Sequence[Answered], judge: Judge) -> Iterator[Measured]:
    rules = {(a.id, c.name): by_rule(c, a, judge) for a in answers for c in rubric.criteria}
    questions = [
        _question(rubric, criterion, answer, judge)
        for answer in answers
        for criterion in rubric.criteria
        if rules[answer.id, criterion.name] is None
    ]
    scale, decimals = Scale(rubric.low, rubric.high), judge.config.samples > 1

    def read(reply: str) -> float | None:
        return read_score(reply, scale, decimals=decimals).score

    verdicts = {question.id: verdict for question, verdict in judge.ask(questions, read)}
    for answer in answers:
        asked = {c.name: f"{answer.id}\0{c.name}" for c in rubric.criteria if rules[answer.id, c.name] is None}
        if all(each in verdicts for each in asked.values()):
            said = {name: verdicts[each] for name, each in asked.items()}
            yield _measured(rubric, answer, {c.name: rules[answer.id, c.name] for c in rubric.criteria}, said)


def _question(rubric: Rubric, criterion: Criterion, answer: Answered, judge: Judge) -> Question:
    prompt = [answer.place.loaded(part) for part in answer.sample.prompt.parts]
    # most benchmarks weave the instruction into the input: it is shown as the model saw it
    content = [
        {"type": "text", "text": "### Instruction"},
        *judge.content(prompt, "input"),
        {"type": "text", "text": "### Output"},
        *judge.content(answer.loaded.parts, "output"),
    ]
    messages: tuple[Mapping[str, Any], ...] = (
        {"role": "system", "content": rubric.system(criterion)},
        {"role": "user", "content": content},
    )
    return Question(f"{answer.id}\0{criterion.name}", messages, rubric.reply_form)


def _measured(
    rubric: Rubric, answer: Answered, rules: Mapping[str, Status | None], verdicts: Mapping[str, Verdict]
) -> Measured:
    values: dict[str, float | None] = {}
    status: dict[str, Status] = {}
    for name, rule in rules.items():
        if rule is not None:
            values[name] = float(rubric.low) if rule == "by_rule" else None
            status[name] = rule
        else:
            values[name] = verdicts[name].value
            if verdicts[name].value is None:
                status[name] = "unparsed"
    extra: dict[str, Any] = {"replies": {name: list(each.replies) for name, each in verdicts.items()}}
    spread = {name: each.spread for name, each in verdicts.items() if each.spread is not None}
    return Measured(answer.id, values, "", status, {**extra, **({"spread": spread} if spread else {})})
