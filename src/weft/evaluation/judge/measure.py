"""A rubric as a metric: rules where an answer lacks what is judged, the judge for the rest."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from weft.evaluation.judge import Judge, Question, Verdict
from weft.evaluation.judge.rubric import Criterion, Rubric
from weft.evaluation.metric import Aggregate, Answered, Context, Measured, Metric, means
from weft.evaluation.metrics import interleaved, length
from weft.evaluation.metrics.replies import Reading, Scale, read_score, read_score_of
from weft.evaluation.records import Record, Status

WINDOW = 16
"""Answers whose pictures are in memory at once."""


def rubric_metric(rubric: Rubric) -> Metric:
    """The row of a rubric; see `figures` for its numbers."""

    def measure(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
        for start in range(0, len(answers), WINDOW):
            yield from _window(rubric, answers[start : start + WINDOW], context.judge)

    return Metric(
        rubric.source, measure, figures(rubric), version=rubric.version, judged=True, beside=("prose/length",)
    )


def figures(rubric: Rubric) -> Aggregate:
    """What a table of the rubric holds, from records:

    <criterion>              the mean over the answers that it applies to
    overall                  the mean of those means; absent where one of them is, which no published table averages
    <criterion>_per_doubling how many points more an answer of twice the words has, of criteria that look at texts
    <criterion>_at_128_words the score at that length; both absent where no answer is shorter or none is longer
    """

    def aggregate(records: Sequence[Record]) -> dict[str, float]:
        found = means(records)
        if all(each.name in found for each in rubric.criteria):
            found["overall"] = interleaved.overall([found[c.name] for c in rubric.criteria], digits=rubric.digits)
        for name in rubric.of_texts:
            judged = [r for r in records if r.values.get(name) is not None and name not in r.status]
            texts = [(r.extra["words"], r.values[name] or 0.0) for r in judged if r.extra["words"]]
            fit = length.at_length([each for each, _ in texts], [score for _, score in texts])
            if fit is not None:
                found[f"{name}_per_doubling"], found[f"{name}_at_{length.AT_WORDS}_words"] = fit
        return found

    return aggregate


def by_rule(criterion: Criterion, answer: Answered, judge: Judge) -> Status | None:
    """`not_applicable`, or `by_rule` where the answer gets the lowest score unasked; None: the judge is asked."""
    prediction = answer.prediction
    pictures = sum(1 for _ in answer.sample.prompt.images)
    found = interleaved.treatment(
        criterion.about,
        answer.sample.reference.get("outputs", ("text", "image")),
        interleaved.Given(bool(prediction.text.strip()), len(prediction.images), pictures),
        compares=criterion.compares,
        single_image=judge.config.single_image,
    )
    return None if found == "judge" else found


def _window(rubric: Rubric, answers: Sequence[Answered], judge: Judge) -> Iterator[Measured]:
    rules = {(a.id, c.name): by_rule(c, a, judge) for a in answers for c in rubric.criteria}
    asked_of = {a.id: [c for c in rubric.criteria if rules[a.id, c.name] is None] for a in answers}
    scale, decimals = Scale(rubric.low, rubric.high), judge.config.samples > 1
    verdicts: dict[str, Verdict] = {}
    if judge.config.together:
        # one request for all of an answer's criteria: the judge's cache answers it for all but the first
        for criterion in rubric.criteria:
            questions = [
                _question(rubric, criterion, asked_of[a.id], a, judge) for a in answers if criterion in asked_of[a.id]
            ]
            read = partial(read_score_of, criterion.title, scale=scale, decimals=decimals)
            verdicts |= _asked(judge, questions, read)
    else:
        questions = [_question(rubric, c, [c], a, judge) for a in answers for c in asked_of[a.id]]
        verdicts |= _asked(judge, questions, partial(read_score, scale=scale, decimals=decimals))
    for answer in answers:
        asked = {c.name: f"{answer.id}\0{c.name}" for c in asked_of[answer.id]}
        if all(each in verdicts for each in asked.values()):
            said = {name: verdicts[each] for name, each in asked.items()}
            yield _measured(rubric, answer, {c.name: rules[answer.id, c.name] for c in rubric.criteria}, said)


def _asked(judge: Judge, questions: Sequence[Question], read: Callable[[str], Reading]) -> dict[str, Verdict]:
    return {question.id: verdict for question, verdict in judge.ask(questions, lambda reply: read(reply).score)}


def _question(
    rubric: Rubric, criterion: Criterion, told: Sequence[Criterion], answer: Answered, judge: Judge
) -> Question:
    """
    Args:
        criterion: whose score is wanted.
        told: the criteria that the judge is asked about.
    """
    prompt = [answer.place.loaded(part) for part in answer.sample.prompt.parts]
    # most benchmarks weave the instruction into the input: it is shown as the model saw it
    content = [
        {"type": "text", "text": "### Instruction"},
        *judge.content(prompt, "input"),
        {"type": "text", "text": "### Output"},
        *judge.content(answer.loaded.parts, "output"),
    ]
    messages: tuple[Mapping[str, Any], ...] = (
        {"role": "system", "content": rubric.system(told, together=judge.config.together)},
        {"role": "user", "content": content},
    )
    return Question(f"{answer.id}\0{criterion.name}", messages, rubric.reply_form(told, together=judge.config.together))


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
    extra: dict[str, Any] = {
        "replies": {name: list(each.replies) for name, each in verdicts.items()},
        "words": length.words(answer.prediction.text),
    }
    spread = {name: each.spread for name, each in verdicts.items() if each.spread is not None}
    return Measured(answer.id, values, "", status, {**extra, **({"spread": spread} if spread else {})})
