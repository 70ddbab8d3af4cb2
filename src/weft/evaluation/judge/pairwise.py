"""Which of two models' answers is better: each pair is shown in both orders, and a verdict that flips is a tie.

Beside the verdicts stand how long both models' texts are, how much they repeat, and what the first would win if both
wrote as much (the point of no difference on a line of wins over log2 of the ratio of words).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weft.atomic import write_json
from weft.errors import UsageError
from weft.evaluation.bootstrap import RESAMPLES, intervals
from weft.evaluation.generate import read_samples
from weft.evaluation.interval import share
from weft.evaluation.journal import EvaluationError, Journal, fingerprint
from weft.evaluation.judge import Judge, JudgeConfig, Question
from weft.evaluation.metric import Answered
from weft.evaluation.metrics import length
from weft.evaluation.metrics.interleaved import Battle, win_rates
from weft.evaluation.metrics.replies import Verdict, in_both_orders, read_verdict
from weft.evaluation.records import Record
from weft.evaluation.run import Run
from weft.evaluation.summary import SEED
from weft.evaluation.task import Task, choose

VERDICTS: tuple[Verdict, ...] = ("A", "B", "Tie(A)", "Tie(B)", "Tie")
FORM = "End with a line of its own: `Winner: A`, `Winner: B`, `Winner: Tie(A)` or `Winner: Tie(B)`."
SYSTEM = (
    "You compare two answers, A and B, to one instruction. An answer may hold texts and pictures in turn. Look at "
    "whether it does what was asked, whether it is right and whole, whether texts and pictures fit each other, "
    "whether the pictures fit one another, and how good texts and pictures are in themselves. Neither length nor "
    f"order of the answers speaks for one of them. Give a short reason. {FORM} A tie says in brackets to which side "
    "it leans."
)
WINDOW = 16
VERSION = 2
"""Of what a line of duels.jsonl holds."""


@dataclass(frozen=True)
class Duel:
    """One sample's two answers."""

    id: str
    verdict: Verdict | None
    """A is the first run's; None: a reply could not be read."""
    shown: Verdict | None
    """With the first run's answer shown first."""
    swapped: Verdict | None
    """With it shown second; the letters are those that were shown."""
    replies: tuple[str, ...]
    words: tuple[int, int]
    """Of the first run's answer and the second's."""
    repetition: tuple[float, float]


def duel(
    first: Run, second: Run, tasks: Mapping[str, Task], config: JudgeConfig, out: Path, *, metric: str = "pairwise/v1"
) -> dict[str, Any]:
    """Judge all samples that both answered into `out` (duels.jsonl, judge.jsonl, duel.json); returns the summary.

    Raises:
        UsageError: several replies to one question are asked for.
        EvaluationError: the runs are not of the same data, or the judge gave nothing for some pairs.
    """
    if config.samples > 1:
        raise UsageError("verdicts have no mean", where="judge.samples", fix="ask for one reply to each question")
    one, other = first.facts()["samples"], second.facts()["samples"]
    if one["data"] != other["data"]:
        raise EvaluationError("these are evaluations of different data", where=f"{first.folder}, {second.folder}")
    task, task_config, place = choose(first.task(), tasks)
    samples, _ = read_samples(task, task_config, place)
    a, b = first.read_predictions(), second.read_predictions()
    pairs = [
        (Answered(s, a[s.id], place, first.folder), Answered(s, b[s.id], place, second.folder))
        for s in samples
        if s.id in a and s.id in b
    ]
    judge, journal = Judge.open(config, out / "judge.jsonl"), Journal(out / "duels.jsonl")
    keys = {
        x.id: fingerprint([VERSION, x.prediction.to_json(), y.prediction.to_json(), judge.settings]) for x, y in pairs
    }
    done = {line["id"]: line for line in journal.read() if line.get("key") == keys.get(line["id"])}
    left = [pair for pair in pairs if pair[0].id not in done]
    journal.append({**asdict(each), "key": keys[each.id]} for each in _judged(left, judge))
    done |= {line["id"]: line for line in journal.read() if line["key"] == keys.get(line["id"])}
    missing = [x.id for x, _ in pairs if x.id not in done]
    if missing:
        raise EvaluationError(
            f"the judge gave nothing for {len(missing)} pairs, the first {missing[0]}",
            where=str(out),
            fix="what was judged is kept; the same command asks again for the rest",
        )
    rows = [done[x.id] for x, _ in pairs]
    journal.settle(rows)
    summary = {"metric": metric, "judge": judge.settings, "data": one["data"], **summarise(rows)}
    write_json(out / "duel.json", summary)
    return summary


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts, the share of flips, and what the first run wins, ties counted in OpenING's four ways."""
    verdicts: list[Verdict] = [row["verdict"] for row in rows if row["verdict"] is not None]
    battles = [Battle("first", "second", verdict) for verdict in verdicts]
    read = [row for row in rows if row["verdict"] is not None]
    flips = [_sides(row["shown"], row["swapped"]) for row in read]
    decided = [verdict == "A" for verdict in verdicts if verdict in ("A", "B")]
    return {
        "n": len(verdicts),
        "unparsed": len(rows) - len(verdicts),
        "verdicts": {verdict: verdicts.count(verdict) for verdict in VERDICTS},
        "flipped": share(flips).to_json() if flips else None,
        "first_wins": {rule: win_rates(battles, rule).get("first") for rule in ("forced", "without", "zero", "half")},
        "first_of_decided": share(decided).to_json() if decided else None,
        "first_at_equal_length": _at_equal_length(read),
        **{name: _both_means(rows, name) for name in ("words", "repetition")},
    }


_WON = {"A": 1.0, "B": 0.0}


def _at_equal_length(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Ties are half a win; None where one model's texts are always the longer ones."""
    records = [
        Record(
            "duel",
            row["id"],
            {"won": _WON.get(row["verdict"], 0.5)},
            extra={"ratio": math.log2((row["words"][0] + 1) / (row["words"][1] + 1))},
        )
        for row in rows
    ]
    found = _level(records)
    if not found:
        return None
    drawn = intervals(records, _level, seed=SEED, resamples=RESAMPLES).get("won")
    return {"value": found["won"], "n": len(records), **({"low": drawn.low, "high": drawn.high} if drawn else {})}


def _level(records: Sequence[Record]) -> dict[str, float]:
    fit = length.line_at([r.extra["ratio"] for r in records], [r.values["won"] or 0.0 for r in records], 0.0)
    return {} if fit is None else {"won": fit[1]}


def _both_means(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    if not rows:
        return None
    first, second = (math.fsum(row[name][i] for row in rows) / len(rows) for i in (0, 1))
    return {"first": first, "second": second}


def _sides(shown: Verdict, swapped: Verdict) -> bool:
    """The judge preferred the same place both times, whatever stood there."""
    return shown in ("A", "B") and shown == swapped


def _judged(pairs: Sequence[tuple[Answered, Answered]], judge: Judge) -> Iterator[Duel]:
    # verdicts are no numbers: they pass through the judge as their place in the list
    def read(reply: str) -> float | None:
        found = read_verdict(reply)
        return None if found is None else float(VERDICTS.index(found))

    for start in range(0, len(pairs), WINDOW):
        some = pairs[start : start + WINDOW]
        questions = [_question(x, y, judge, way) for pair in some for way, (x, y) in _both(pair)]
        found = {question.id: verdict for question, verdict in judge.ask(questions, read)}
        for x, y in some:
            ways = [found.get(f"{x.id}\0{way}") for way in ("shown", "swapped")]
            if None in ways:
                continue
            shown, swapped = (None if w is None or w.value is None else VERDICTS[int(w.value)] for w in ways)
            replies = tuple(reply for w in ways if w is not None for reply in w.replies)
            whole = None if shown is None or swapped is None else in_both_orders(shown, swapped)
            texts = x.prediction.text, y.prediction.text
            words, again = tuple(map(length.words, texts)), tuple(map(length.repetition, texts))
            yield Duel(x.id, whole, shown, swapped, replies, words, again)  # type: ignore[arg-type]


def _both(pair: tuple[Answered, Answered]) -> Iterator[tuple[str, tuple[Answered, Answered]]]:
    yield "shown", pair
    yield "swapped", (pair[1], pair[0])


def _question(a: Answered, b: Answered, judge: Judge, way: str) -> Question:
    content = [
        {"type": "text", "text": "### Instruction"},
        *judge.content([a.place.loaded(part) for part in a.sample.prompt.parts], "input"),
    ]
    for name, answer in (("A", a), ("B", b)):
        content += [{"type": "text", "text": f"### Answer {name}"}, *judge.content(answer.loaded.parts, f"{name}")]
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": content})
    return Question(f"{a.id}\0{way}", messages, FORM)
