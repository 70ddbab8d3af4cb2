"""Captions against references: CIDEr-D, BLEU and ROUGE-L; METEOR and SPICE, which need Java, are in `java.py`.

The definitions are those of the COCO caption evaluation (Chen et al. 2015, arXiv:1504.00325), which the literature's
numbers come from, not those of other packages under the same names. All take text that is already tokenised, words
between blanks; `TOKENIZERS` names the ways to get there, and the one used belongs in the variant's name.

    CIDEr-D   Vedantam et al. 2015, arXiv:1411.5726; document frequencies are those of the references given, so
              a subset's score cannot be compared with the whole set's, and one image alone scores 0
    BLEU      of the corpus; the reference length is the closest one of each image
    ROUGE-L   best recall and best precision over the references, each for itself
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from weft.errors import UsageError
from weft.evaluation.metrics import ptb
from weft.evaluation.metrics.scores import Scores, mean_of, same_length

TOKENIZERS: Mapping[str, Callable[[str], str]] = {
    "ptb": ptb.tokenize,
    "blanks": lambda text: " ".join(text.split()),
}
LONGEST = 4
"""Words of the longest n-gram."""
WIDTH = 6.0
"""Of CIDEr-D's Gaussian over the difference of lengths."""
BETA = 1.2
"""Of ROUGE-L: recall weighs more than precision."""

Grams = Counter[tuple[str, ...]]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """CIDEr-D, 0 to 10; tables of papers multiply by 100.

    Args:
        candidates: one caption per image, tokenised.
        references: the captions of each image, at least one, tokenised.
    """
    _check("cider_d", candidates, references)
    if not candidates:
        return mean_of([])
    import numpy as np

    images = len(candidates)
    captions = [caption.split() for caption in (*candidates, *(each for group in references for each in group))]
    image = np.concatenate((np.arange(images), np.repeat(np.arange(images), [len(group) for group in references])))
    vocabulary: dict[str, int] = {}
    words = np.array([vocabulary.setdefault(word, len(vocabulary)) for caption in captions for word in caption], int)
    lengths = np.array([len(caption) for caption in captions])
    owner = np.repeat(np.arange(len(captions)), lengths)

    cosines = np.zeros(len(captions) - images)
    starts, gram = np.arange(len(words)), words
    for size in range(1, LONGEST + 1):
        if size > 1:
            # Where one more word of the same caption follows: the n-gram before with that word, numbered anew.
            goes_on = starts + size - 1 < len(words)
            goes_on[goes_on] = owner[starts[goes_on] + size - 1] == owner[starts[goes_on]]
            starts, gram = starts[goes_on], gram[goes_on]
            gram = np.unique(gram * len(vocabulary) + words[starts + size - 1], return_inverse=True)[1]
        kinds = int(gram.max(initial=-1)) + 1
        if not kinds:
            break
        pairs, count = np.unique(owner[starts] * kinds + gram, return_counts=True)
        who, what = pairs // kinds, pairs % kinds
        of_reference = who >= images
        in_image = image[who] * kinds + what
        images_with = np.bincount(np.unique(in_image[of_reference]) % kinds, minlength=kinds)
        weight = count * (math.log(images) - np.log(np.maximum(images_with, 1)))[what]
        norm = np.sqrt(np.bincount(who, weight * weight, minlength=len(captions)))

        ours, our_weight = in_image[~of_reference], weight[~of_reference]
        theirs, their_weight, reference = in_image[of_reference], weight[of_reference], who[of_reference] - images
        place = np.searchsorted(ours, theirs)
        found = np.append(ours, -1)[place] == theirs
        clipped = np.minimum(np.append(our_weight, 0.0)[place], their_weight) * their_weight * found
        # of nothing at all it makes integers
        shared = np.bincount(reference, clipped, minlength=len(cosines)).astype(np.float64)
        norms = norm[image[images:]] * norm[images:]
        cosines += np.divide(shared, norms, out=np.zeros_like(shared), where=norms > 0)

    # In bigrams, as the reference counts lengths.
    bigrams = np.maximum(lengths - 1, 0)
    apart = bigrams[image[images:]] - bigrams[images:]
    likeness = cosines / LONGEST * np.exp(-(apart * apart) / (2 * WIDTH * WIDTH))
    total = np.bincount(image[images:], likeness, minlength=images)
    return mean_of([float(v) for v in 10 * total / np.bincount(image[images:], minlength=images)])


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Scores, Scores, Scores, Scores]:
    """BLEU-1 to BLEU-4 of the corpus, which is not the mean of the images' own values beside it; see `cider_d`."""
    _check("bleu", candidates, references)
    counted = [Overlap.of(*pair) for pair in zip(candidates, references, strict=True)]
    corpus = sum(counted, Overlap((0,) * LONGEST, 0, 0, (0,) * LONGEST)).bleu()
    each = [overlap.bleu() for overlap in counted]
    one, two, three, four = (Scores(tuple(b[n] for b in each), corpus[n]) for n in range(LONGEST))
    return one, two, three, four


class Overlap:
    """Counts that add up over images: n-grams found, words of the candidate and of the reference, n-grams offered."""

    def __init__(self, found: Sequence[int], words: int, wanted: int, offered: Sequence[int]) -> None:
        self.found, self.words, self.wanted, self.offered = tuple(found), words, wanted, tuple(offered)

    @classmethod
    def of(cls, candidate: str, references: Sequence[str]) -> "Overlap":
        words = len(candidate.split())
        lengths = [len(reference.split()) for reference in references]
        at_most: Grams = Counter()
        for reference in references:
            at_most |= _grams(reference)
        found = [0] * LONGEST
        for gram, count in _grams(candidate).items():
            found[len(gram) - 1] += min(count, at_most[gram])
        wanted = min(lengths, key=lambda length: (abs(length - words), length))
        return cls(found, words, wanted, [max(0, words - n) for n in range(LONGEST)])

    def __add__(self, other: "Overlap") -> "Overlap":
        found, offered = (
            [a + b for a, b in zip(*pair, strict=True)]
            for pair in ((self.found, other.found), (self.offered, other.offered))
        )
        return Overlap(found, self.words + other.words, self.wanted + other.wanted, offered)

    def bleu(self) -> list[float]:
        # The two small numbers are the reference's: they keep an empty caption at 0, and show in the 9th digit.
        product, values = 1.0, []
        for n, (found, offered) in enumerate(zip(self.found, self.offered, strict=True), start=1):
            product *= (found + 1e-15) / (offered + 1e-9)
            values.append(product ** (1 / n))
        ratio = (self.words + 1e-15) / (self.wanted + 1e-9)
        brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        return [value * brevity for value in values]


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """ROUGE-L, 0 to 1, the mean over images; see `cider_d`."""
    _check("rouge_l", candidates, references)
    return mean_of([_rouge_l(*pair) for pair in zip(candidates, references, strict=True)])


def _rouge_l(candidate: str, references: Sequence[str]) -> float:
    # Split at single blanks: an empty caption has one word, which is empty.
    ours, theirs = candidate.split(" "), [reference.split(" ") for reference in references]
    common = [_common(ours, reference) for reference in theirs]
    precision = max(common) / len(ours)
    recall = max(length / len(reference) for length, reference in zip(common, theirs, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def _grams(caption: str) -> Grams:
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _check(where: str, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    same_length(where, candidates=candidates, references=references)
    for i, captions in enumerate(references):
        if isinstance(captions, str) or not captions:
            raise UsageError(
                f"image {i} has no list of reference captions, but {captions!r}",
                where=where,
                fix="give each image a list of at least one caption, or leave the image out",
            )
