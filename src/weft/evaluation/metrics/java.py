"""METEOR 1.5 and SPICE: Java programs, of which the package `pycocoevalcap` brings what may be redistributed.

METEOR   Denkowski & Lavie 2014. The program aligns a caption with each reference by equal words, stems, synonyms and
         paraphrases, and tells 23 counts of the best alignment. Counts add up; the score is a formula of them, with the
         program's English weights, so a corpus' score follows from records and is not the mean of the captions' own
SPICE    Anderson et al. 2016, arXiv:1607.08822. F of the tuples of scene graphs; a corpus' score is the mean

Captions are tokenised before, as for the other metrics of captions.
"""

import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from weft.errors import UsageError
from weft.evaluation.metrics.scores import Scores, mean_of, same_length

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
"""Recall against precision; of the penalty for broken alignments, its power and its weight; content against function
words."""
MODULES = (1.0, 0.6, 0.8, 0.6)
"""What a match is worth: equal, stem, synonym, paraphrase."""
COUNTS = 23
_CORENLP = "stanford-corenlp-3.6.0"


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """METEOR, 0 to 1.

    Args:
        candidates: one caption per image, tokenised.
        references: the captions of each image, at least one, tokenised.

    Raises:
        UsageError: a package or program is missing, see `meteor_lacks`.
    """
    counts = meteor_counts(candidates, references)
    total = [sum(column) for column in zip(*counts, strict=True)]
    return Scores(tuple(map(meteor_score, counts)), meteor_score(total) if counts else mean_of([]).value)


def meteor_counts(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[float]]:
    """The program's counts of each caption's best alignment."""
    _check("METEOR", candidates, references, meteor_lacks())
    if not candidates:
        return []
    lines = []
    for said, wanted in zip(candidates, references, strict=True):
        told = [text.replace("|||", "").replace("  ", " ") for text in (*wanted, said)]
        lines.append(" ||| ".join(("SCORE", *told)))
    jar = _folder("meteor") / "meteor-1.5.jar"
    out = _java("METEOR", ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"], "\n".join(lines))
    counts = [[float(number) for number in line.split()] for line in out.splitlines()]
    if [len(row) for row in counts] != [COUNTS] * len(candidates):
        raise UsageError(
            f"METEOR told {len(counts)} rows of counts for {len(candidates)} captions",
            where=str(jar),
            fix="install pycocoevalcap 1.2, which brings METEOR 1.5",
        )
    for row in counts:
        # a caption that is its reference has no break, and adds none to a corpus
        if (row[20], row[21], row[22]) == (1, row[0], row[1]):
            row[20] = 0.0
    return counts


def meteor_score(counts: Sequence[float]) -> float:
    """Of one caption's counts, or of the sums over a corpus."""
    length, wanted, function, wanted_function = counts[:4]
    matched = wanted_matched = 0.0
    for i, worth in enumerate(MODULES):
        content, wanted_content, small, wanted_small = counts[4 + 4 * i : 8 + 4 * i]
        matched += worth * (DELTA * content + (1 - DELTA) * small)
        wanted_matched += worth * (DELTA * wanted_content + (1 - DELTA) * wanted_small)
    chunks, words, wanted_words = counts[20:COUNTS]
    if not matched or not wanted_matched:
        return 0.0
    precision = matched / (DELTA * (length - function) + (1 - DELTA) * function)
    recall = wanted_matched / (DELTA * (wanted - wanted_function) + (1 - DELTA) * wanted_function)
    f = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    broken = chunks / ((words + wanted_words) / 2)
    return float(f * (1 - GAMMA * broken**BETA))


def spice(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """SPICE, 0 to 1; see `meteor`."""
    _check("SPICE", candidates, references, spice_lacks())
    if not candidates:
        return mean_of([])
    rows = [
        {"image_id": i, "test": said, "refs": list(wanted)}
        for i, (said, wanted) in enumerate(zip(candidates, references, strict=True))
    ]
    jar = _folder("spice") / "spice-1.0.jar"
    with tempfile.TemporaryDirectory() as scratch:
        asked, told = Path(scratch) / "in.json", Path(scratch) / "out.json"
        asked.write_text(json.dumps(rows), encoding="utf-8")
        # no -cache: it needs a native library that current Java refuses to load
        _java("SPICE", ["-Xmx8G", "-jar", str(jar), str(asked), "-out", str(told), "-silent"], "")
        found = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in json.loads(told.read_text("utf-8"))}
    return mean_of([found[i] for i in range(len(rows))])


def meteor_lacks() -> str | None:
    """What METEOR needs and does not find here."""
    return _lacks("METEOR", "meteor")


def spice_lacks() -> str | None:
    """What SPICE needs and does not find here."""
    lacks = _lacks("SPICE", "spice")
    if lacks is None and not (_folder("spice") / "lib" / f"{_CORENLP}.jar").is_file():
        return f"SPICE needs {_CORENLP}: fetch it with `python -m pycocoevalcap.spice.get_stanford_models`"
    return lacks


def _lacks(metric: str, part: str) -> str | None:
    if importlib.util.find_spec("pycocoevalcap") is None:
        return f"{metric} needs the package pycocoevalcap, which is not installed: pip install 'weft[java]'"
    if not _folder(part).is_dir():
        return f"{metric} needs pycocoevalcap 1.2; the one installed has no {part}/"
    if shutil.which("java") is None:
        return f"{metric} is a Java program, and there is no `java` on the path: install a Java runtime"
    return None


def _folder(part: str) -> Path:
    import pycocoevalcap  # a folder of folders: this runs nothing

    return Path(next(iter(pycocoevalcap.__path__))) / part


def _java(metric: str, arguments: Sequence[str], said: str) -> str:
    """What the program answers."""
    java = shutil.which("java")
    assert java is not None
    jar = Path(arguments[arguments.index("-jar") + 1])
    done = subprocess.run(
        [java, *arguments], input=said, capture_output=True, text=True, encoding="utf-8", cwd=jar.parent
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UsageError(
            f"{metric} ended with {done.returncode}: {last}", where=str(jar), fix="see whether `java -version` runs"
        )
    return done.stdout


def _check(metric: str, candidates: Sequence[str], references: Sequence[Sequence[str]], lacks: str | None) -> None:
    same_length(metric, candidates=candidates, references=references)
    if any(isinstance(captions, str) or not captions for captions in references):
        raise UsageError("an image has no list of reference captions", where=metric, fix="leave the image out")
    if lacks is not None:
        raise UsageError(lacks, where=metric, fix="or leave this metric out")
