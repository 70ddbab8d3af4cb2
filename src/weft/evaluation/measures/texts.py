"""Captions, short answers, choices, boxes and rankings: what `metrics/` says of a text, one answer at a time."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from weft.errors import UsageError
from weft.evaluation.metric import Answered, Context, Measured, Metric, Sums, each
from weft.evaluation.metrics import captions, choices, dialogue, grounding, java, ptb, vqa, yes_no
from weft.evaluation.metrics.captions import Overlap
from weft.evaluation.records import Record

# --- captions ---


Tokenise = Callable[[Sequence[str]], list[str]]


def _captions(
    score: Callable[[Sequence[str], Sequence[Sequence[str]]], Any],
    name: str,
    cut: Callable[[str], str] | None = None,
    words: Tokenise | None = None,
) -> Any:
    def measure(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
        said, wanted = _tokenised(answers, cut or _whole, words or tokenise)
        for answer, value, text in zip(answers, score(said, wanted).per_sample, said, strict=True):
            yield Measured(answer.id, {name: value}, text)

    return measure


def _whole(text: str) -> str:
    return text


def _tokenised(
    answers: Sequence[Answered], cut: Callable[[str], str], words: Tokenise
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Words of what was said and of each sample's captions."""
    groups = [answer.sample.reference["captions"] for answer in answers]
    each = iter(words(list(itertools.chain.from_iterable(groups))))
    wanted = [tuple(itertools.islice(each, len(group))) for group in groups]
    return words([cut(answer.text) for answer in answers]), wanted


def tokenise(texts: Sequence[str]) -> list[str]:
    """The words of each caption; as the original reads them, one after another, the next is context for the one before.

    A caption's words, and so its scores, depend on its neighbours: metrics of captions are of the whole set.
    """
    words, following = [], ""
    for text in reversed(texts):
        words.append(_words(text, following))
        following = text if text.strip() else "\n" + following.lstrip("\n")
    return words[::-1]


@functools.lru_cache(maxsize=2**18)
def _words(text: str, following: str) -> str:
    """Remembered: the metrics read the same captions, and this is most of what they cost."""
    return ptb.tokenize(text, following)


def _first_sentence(text: str) -> str:
    """Up to the first full stop, as MM-Interleaved scores COCO."""
    return text.split(".")[0]


def _by_blanks(texts: Sequence[str]) -> list[str]:
    """For captions whose words were parted by something else before."""
    return [captions.TOKENIZERS["blanks"](text) for text in texts]


def _bleu(words: Tokenise) -> Any:
    def measure(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
        for answer, text, wanted in zip(answers, *_tokenised(answers, _whole, words), strict=True):
            counts = Overlap.of(text, wanted)
            values = {f"bleu_{n}": value for n, value in enumerate(counts.bleu(), 1)}
            yield Measured(answer.id, values, text, extra={"counts": _counts(counts)})

    return measure


def _counts(overlap: Overlap) -> list[int]:
    return [*overlap.found, overlap.words, overlap.wanted, *overlap.offered]


def _bleu_of(sums: Sequence[float]) -> dict[str, float]:
    n = captions.LONGEST
    counts = [round(each) for each in sums]
    corpus = Overlap(counts[:n], counts[n], counts[n + 1], counts[n + 2 :]).bleu()
    return {f"bleu_{i}": value for i, value in enumerate(corpus, 1)}


CORPUS_BLEU = Sums(lambda record: record.extra["counts"], _bleu_of)


def _meteor(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
    """All at once: the program takes seconds to start."""
    said, wanted = _tokenised(answers, _whole, tokenise)
    for answer, text, counts in zip(answers, said, java.meteor_counts(said, wanted), strict=True):
        yield Measured(answer.id, {"meteor": java.meteor_score(counts)}, text, extra={"counts": counts})


CORPUS_METEOR = Sums(lambda record: record.extra["counts"], lambda sums: {"meteor": java.meteor_score(sums)})

# --- short answers ---


def _vqa(score: Callable[[str, Mapping[str, Any]], float], extraction: vqa.Extraction) -> Any:
    def measure(answer: Answered, context: Context) -> Measured:
        said = vqa.extract_answer(answer.text, extraction)
        return Measured(answer.id, {"accuracy": score(said, answer.sample.reference)}, said)

    return each(measure)


def _v2(said: str, reference: Mapping[str, Any]) -> float:
    return vqa.vqa_accuracy([said], [reference["answers"]]).value


def _vizwiz(said: str, reference: Mapping[str, Any]) -> float:
    return vqa.vizwiz_accuracy([said], [reference["answers"]]).value


def _gqa(said: str, reference: Mapping[str, Any]) -> float:
    return vqa.gqa_accuracy([said], [reference["answer"]]).value


# --- rankings and boxes ---


def _scores(answer: Answered) -> Sequence[float]:
    found = answer.prediction.scores
    wanted = len(answer.sample.options)
    if found is None or len(found) != wanted:
        raise UsageError(
            f"the prediction of {answer.id} has {len(found or ())} scores, not {wanted}",
            where="predictions.jsonl",
            fix='give "scores": one number for each option, in order',
        )
    if any(map(math.isnan, found)):
        raise UsageError(f"a score of {answer.id} is not a number", where="predictions.jsonl", fix="look at the model")
    return found


def _ndcg(answer: Answered, context: Context) -> Measured:
    relevance = answer.sample.reference["relevance"]
    if not any(relevance):
        return Measured(answer.id, {"ndcg": None}, status={"ndcg": "not_applicable"})
    return Measured(answer.id, {"ndcg": dialogue.ndcg([_scores(answer)], [relevance]).value})


def _sparse(answer: Answered, context: Context) -> Measured:
    found = dialogue.sparse_ranks([_scores(answer)], [answer.sample.reference["given"]])
    values = {
        "r@1": found.r_at_1,
        "r@5": found.r_at_5,
        "r@10": found.r_at_10,
        "mean_rank": found.mean,
        "mrr": found.mrr,
    }
    return Measured(answer.id, {name: score.value for name, score in values.items()})


def _box(grammar: str) -> Any:
    def measure(answer: Answered, context: Context) -> Measured:
        wanted, size = _object(answer.sample.reference, grounding.GRAMMARS[grammar]), answer.sample.reference["size"]
        found = grounding.grounding_accuracy([answer.text], [wanted], [tuple(size)], grammar=grammar)
        # without a box the answer is wrong, not left out: it stays in the mean and is counted
        status = {"accuracy": "default"} if found.boxes[0] is None else {}
        values = {"accuracy": found.accuracy.value, "iou": found.iou.value}
        return Measured(answer.id, values, str(found.boxes[0] or ""), status)  # type: ignore[arg-type]

    return each(measure)


def _object(reference: Mapping[str, Any], grammar: grounding.Grammar) -> grounding.Box:
    """The true box in a grammar's numbers: on the grid as the task has it, otherwise from its pixels."""
    x1, y1, x2, y2 = reference["box"]
    if grammar.grid == grounding.GRID:
        return x1, y1, x2, y2
    width, height = reference["size"]
    rounded = grounding.to_pixels((x1, y1, x2, y2), width, height, grounding.GRID)
    return grammar.write(reference.get("pixels", rounded), width, height)


# --- yes or no ---


def _pope(answer: Answered, context: Context) -> Measured:
    found = yes_no.pope([answer.prediction.text], [answer.sample.reference["label"]])
    counts = [found.true_yes, found.false_yes, found.true_no, found.false_no]
    split = answer.sample.facets["split"]
    values = {"accuracy": found.accuracy.value}
    return Measured(
        answer.id, values, yes_no.read_pope(answer.prediction.text), extra={"counts": counts, "split": split}
    )


def _pope_columns(record: Record) -> list[float]:
    at = 4 * yes_no.POPE_SPLITS.index(record.extra["split"])
    found = [0.0] * (4 * len(yes_no.POPE_SPLITS))
    found[at : at + 4] = record.extra["counts"]
    return found


def _pope_of(sums: Sequence[float]) -> dict[str, float]:
    """Each split's figures under its own name, and their means; of one split alone its figures, of two no means."""
    counts = {split: sums[4 * i : 4 * i + 4] for i, split in enumerate(yes_no.POPE_SPLITS)}
    splits = {split: yes_no.pope_figures(*four) for split, four in counts.items() if sum(four)}
    if len(splits) == 1:
        return next(iter(splits.values()))
    named = {f"{split}_{name}": value for split, figures in splits.items() for name, value in figures.items()}
    return {**yes_no.pope_mean(splits), **named} if len(splits) == len(counts) else named


def _mme(answer: Answered, context: Context) -> Measured:
    reference = answer.sample.reference
    said = yes_no.read_mme(answer.prediction.text)
    status = {"accuracy": "default"} if said == "other" else {}
    values = {"accuracy": float(said == reference["answer"])}
    return Measured(answer.id, values, said, status, {"task": reference["task"]})  # type: ignore[arg-type]


def mme(records: Sequence[Record]) -> dict[str, float]:
    """Each task's score, and the sums of those of a group that is whole. A picture counts where both are right.

    A task of which a picture has not two questions, as in a subset, has no score.
    """
    pictures: dict[str, dict[str | None, list[float]]] = {}
    for record in records:
        hits = pictures.setdefault(record.extra["task"], {}).setdefault(record.unit, [])
        hits.append(record.values["accuracy"] or 0.0)
    whole = {
        task: yes_no.MmeTask.of(list(of_task.values()))
        for task, of_task in pictures.items()
        if all(len(pair) == 2 for pair in of_task.values())
    }
    all_tasks = yes_no.Mme(whole)
    sums = {"perception": all_tasks.perception, "cognition": all_tasks.cognition}
    return {
        **{name: value for name, value in sums.items() if value is not None},
        **{task: each.score for task, each in whole.items()},
    }


# --- choices ---


def _circular(answer: Answered, context: Context) -> Measured:
    reference = answer.sample.reference
    letter = choices.infer_letter(answer.text, reference["options"])
    status = {"accuracy": "default"} if letter is None else {}
    values = {"accuracy": float(letter == reference["answer"])}
    row = {"index": reference["index"], "rotations": reference["rotations"]}
    return Measured(answer.id, values, letter or "", status, row)  # type: ignore[arg-type]


def circular(records: Sequence[Record]) -> dict[str, float]:
    """Right under every rotation; over all rows; over the rows as they are printed.

    Of a question that lacks a rotation, as in a subset, nothing says that it is right.
    """
    questions: dict[str | None, list[float]] = {}
    rotations: dict[str | None, int] = {}
    rows, first = [], []
    for record in records:
        hit = record.values["accuracy"] or 0.0
        questions.setdefault(record.unit, []).append(hit)
        rotations[record.unit] = record.extra["rotations"]
        rows.append(hit)
        if record.extra["index"] < choices.ROTATIONS:
            first.append(hit)
    whole = [min(hits) for name, hits in questions.items() if len(hits) == rotations[name]]
    found = {"circular": whole, "rows": rows, "first": first}
    return {name: means_of(values) for name, values in found.items() if values}


def means_of(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _prefix(answer: Answered, context: Context) -> Measured:
    reference = answer.sample.reference
    if not reference["options"]:
        return Measured(answer.id, {"accuracy": None}, status={"accuracy": "not_applicable"})
    letter = choices.prefix_letter(answer.text, reference["options"])
    wanted = reference["answers"] if "answers" in reference else [reference["answer"]]
    status = {"accuracy": "default"} if letter is None else {}
    return Measured(answer.id, {"accuracy": float(letter in wanted)}, letter or "", status)  # type: ignore[arg-type]


def _mmmu(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
    """All at once: a letter that is drawn depends on those drawn before."""
    questions = [choices.Question(a.sample.reference["options"], tuple(a.sample.reference["answers"])) for a in answers]
    found = choices.mmmu([answer.prediction.text for answer in answers], questions)
    rows = zip(answers, found.accuracy.per_sample, found.without_drawn.per_sample, found.predictions, strict=True)
    for answer, value, without, prediction in rows:
        drawn = isinstance(prediction, choices.Choice) and prediction.random
        told = prediction.letter if isinstance(prediction, choices.Choice) else ", ".join(sorted(map(str, prediction)))
        status = {"accuracy": "default"} if drawn else {}
        values = {"accuracy": value, "without_drawn": without}
        yield Measured(answer.id, values, told, status)  # type: ignore[arg-type]


def _metric(about: str, measure: Any, **more: Any) -> Metric:
    return Metric(about, measure, **{"scale": 100.0, **more})


METRICS = {
    "cider-d/ptb": _metric(
        "CIDEr-D, document frequencies of these references", _captions(captions.cider_d, "cider_d"), whole=True
    ),
    "cider-d/ptb-first-sentence": _metric(
        "CIDEr-D of what stands before the first full stop",
        _captions(captions.cider_d, "cider_d", _first_sentence),
        whole=True,
    ),
    "bleu/ptb": _metric("BLEU-1 to BLEU-4 of the corpus", _bleu(tokenise), aggregate=CORPUS_BLEU, whole=True),
    "rouge-l/ptb": _metric("ROUGE-L", _captions(captions.rouge_l, "rouge_l"), whole=True),
    "cider-d/blanks": _metric(
        "CIDEr-D of words between blanks as they are: of captions that are tokenised already",
        _captions(captions.cider_d, "cider_d", words=_by_blanks),
        whole=True,
    ),
    "bleu/blanks": _metric("BLEU of words between blanks", _bleu(_by_blanks), aggregate=CORPUS_BLEU),
    "rouge-l/blanks": _metric(
        "ROUGE-L of words between blanks", _captions(captions.rouge_l, "rouge_l", words=_by_blanks)
    ),
    "meteor/1.5-ptb": _metric(
        "METEOR of the corpus; needs Java", _meteor, aggregate=CORPUS_METEOR, lacks=java.meteor_lacks, whole=True
    ),
    "spice/1.0-ptb": _metric("SPICE; needs Java", _captions(java.spice, "spice"), lacks=java.spice_lacks, whole=True),
    "vqa/v2": _metric("VQAv2 accuracy", _vqa(_v2, "whole")),
    "vqa/v2-mm-interleaved": _metric("VQAv2 accuracy of what is cut out of the answer", _vqa(_v2, "mm-interleaved")),
    "vqa/vizwiz": _metric("VizWiz accuracy", _vqa(_vizwiz, "whole")),
    "vqa/vizwiz-mm-interleaved": _metric(
        "VizWiz accuracy of what is cut out of the answer", _vqa(_vizwiz, "mm-interleaved")
    ),
    "vqa/gqa": _metric("the same string, in lower case", _vqa(_gqa, "whole")),
    "visdial/ndcg": _metric("NDCG over the relevant options", each(_ndcg)),
    "visdial/sparse": _metric("ranks of the answer that was given", each(_sparse), scale=1.0, digits=4),
    "grounding/mm-interleaved": _metric(
        "boxes with an IoU of 0.5 or more, on a grid of 0 to 999", _box("mm-interleaved")
    ),
    "grounding/unit": _metric("the same, boxes as fractions [x1, y1, x2, y2]", _box("unit")),
    "grounding/coco": _metric(
        "the same, boxes [x, y, width, height] in whole pixels, the last ones included", _box("coco")
    ),
    "pope/pope": _metric(
        "accuracy, precision, recall, F1 and share of yes", each(_pope), aggregate=Sums(_pope_columns, _pope_of)
    ),
    "mme/mme": Metric("100 accuracy + 100 pictures with both right, by task; sums", each(_mme), aggregate=mme),
    "mcq/circular": _metric("letters by rule, right in every rotation", each(_circular), aggregate=circular),
    "mcq/prefix": _metric("the letter that an answer begins with; open questions have none", each(_prefix)),
    "mcq/mmmu": _metric("MMMU's parser; letters drawn at random are counted", _mmmu, whole=True),
}
