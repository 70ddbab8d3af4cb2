"""Time what metrics cost on whole test sets.    python -m benchmarks.metrics [--only KEY ...]

    fid_10k_s       statistics of 2 x 10,000 pictures of 2048 features and their Frechet distance
    cider_5000_s    5,000 captions with 5 references each, tokenised as the literature does, and their CIDEr-D
    cider_5000_mb   the most memory, in MB, of a process that does that and nothing else

Every answer is checked before its time is told. The last line is JSON: figures by key; `--out FILE` gets the machine as
well. As many threads as OMP_NUM_THREADS says.
"""

import argparse
import json
import multiprocessing
import platform
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.mmfs import refuse
from weft.evaluation.metrics.captions import TOKENIZERS, cider_d
from weft.evaluation.metrics.fid import frechet_distance, statistics


def fid_10k() -> float:
    """Features with a spectrum over three orders of magnitude, as those of pictures have."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, 2048)
    mixed = torch.randn(2048, 2048, generator=generator) / 2048**0.5
    features = torch.randn(10_000, 2048, generator=generator) * scales @ mixed
    other = features * 1.25 + 0.01

    begun = time.perf_counter()
    a, b = (statistics(each, variant="random") for each in (features, other))
    found = frechet_distance(a, b)
    seconds = time.perf_counter() - begun

    # the root of S and 1.25^2 S is 1.25 S
    wanted = ((b.mean - a.mean).square().sum() + 0.25**2 * a.covariance.trace()).item()
    refuse(abs(found / wanted - 1), "fid_10k_s")
    return seconds


def cider_5000() -> float:
    """Words as frequent as in a language, ten or so to a caption; the first image's candidate is all its references."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeiouprstln", k=draw.randint(2, 9))) for _ in range(10_000)]
    weights = [1 / (i + 5) for i in range(10_000)]

    def caption() -> str:
        return " ".join(draw.choices(words, weights, k=draw.randint(7, 15))).capitalize() + "."

    candidates = [caption() for _ in range(5000)]
    references = [[caption() for _ in range(5)] for _ in candidates]
    references[0] = [candidates[0]] * 5

    begun = time.perf_counter()
    tokenize = TOKENIZERS["ptb"]
    ours, theirs = [tokenize(text) for text in candidates], [[tokenize(text) for text in each] for each in references]
    scores = cider_d(ours, theirs)
    seconds = time.perf_counter() - begun

    refuse(abs(scores.per_sample[0] / 10 - 1), "cider_5000_s")
    return seconds


def _peak_of_cider(_: None) -> float:
    cider_5000()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def cider_5000_memory() -> float:
    with multiprocessing.get_context("spawn").Pool(1) as apart:
        return apart.map(_peak_of_cider, [None])[0]


QUESTIONS: dict[str, Callable[[], float]] = {
    "fid_10k_s": fid_10k,
    "cider_5000_s": cider_5000,
    "cider_5000_mb": cider_5000_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS), metavar="KEY")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {key: round(QUESTIONS[key](), 2) for key in args.only}
    if args.out:
        machine = {"device": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        args.out.write_text(json.dumps({"machine": machine, "figures": found}, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
