"""Length and repetition: what a judge's score of a text is to be read beside, because judges like long texts."""

from weft.evaluation.metric import Answered, Context, Measured, Metric, each
from weft.evaluation.metrics import length


def _measure(answer: Answered, context: Context) -> Measured:
    text = answer.prediction.text
    values = {
        "words": float(length.words(text)),
        "pictures": float(len(answer.prediction.images)),
        "repetition": length.repetition(text),
        "cut_off": float(answer.prediction.reason == "length"),
    }
    return Measured(answer.id, values)


METRICS = {"prose/length": Metric("words, pictures, repeated 4-grams, answers cut off", each(_measure), digits=3)}
