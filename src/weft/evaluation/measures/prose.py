"""Length and repetition: what a judge's score of a text is to be read beside, because judges like long texts."""

from collections import Counter

from weft.evaluation.metric import Answered, Context, Measured, Metric, each

GRAM = 4


def repetition(text: str, size: int = GRAM) -> float:
    """Share of a text's n-grams that were there before, 0 for a text of fewer words."""
    words = text.lower().split()
    grams = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def _measure(answer: Answered, context: Context) -> Measured:
    text = answer.prediction.text
    values = {
        "words": float(len(text.split())),
        "pictures": float(len(answer.prediction.images)),
        "repetition": repetition(text),
        "cut_off": float(answer.prediction.reason == "length"),
    }
    return Measured(answer.id, values)


METRICS = {"prose/length": Metric("words, pictures, repeated 4-grams, answers cut off", each(_measure), digits=3)}
