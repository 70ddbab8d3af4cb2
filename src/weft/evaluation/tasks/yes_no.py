"""Questions answered by yes or no: POPE and MME.

POPE   coco_pope_{random,popular,adversarial}.json   lines {question_id, image, text, label}; val2014/<image>
MME    <task>/[questions_answers_YN/]<picture>.txt   lines question TAB answer; the picture beside it or in images/
"""

from collections.abc import Iterator
from pathlib import Path

from weft.document import Document, Image, user
from weft.evaluation.journal import EvaluationError
from weft.evaluation.metrics.yes_no import COGNITION, PERCEPTION, POPE_SPLITS
from weft.evaluation.task import Place, Sample, Task, required

ASK = "Please answer yes or no."
_PICTURES = (".jpg", ".png", ".jpeg")


def read_pope(place: Place) -> Iterator[Sample]:
    splits = POPE_SPLITS if place.split == "all" else (place.split,)
    for split in splits:
        file = f"coco_pope_{split}.json"
        for number, row in enumerate(place.lines(file), 1):
            where = f"{file}, line {number}"
            path = f"val2014/{required(row, 'image', where)}"
            question = required(row, "text", where)
            asked = f"{question} {ASK}" if place.variant == "asked" else question
            name = f"{split}-{required(row, 'question_id', where)}"
            reference = {"label": required(row, "label", where), "question": question}
            prompt = Document((user(Image(path=path), asked),), id=name)
            yield Sample(name, prompt, reference, facets={"split": split}, unit=path)


def read_mme(place: Place) -> Iterator[Sample]:
    """The questions themselves ask for yes or no."""
    groups = {"all": PERCEPTION + COGNITION, "perception": PERCEPTION, "cognition": COGNITION}[place.split]
    for task in groups:
        folder = place.root / task
        files = sorted((folder / "questions_answers_YN").glob("*.txt")) or sorted(folder.glob("*.txt"))
        if not files:
            raise EvaluationError(f"task {task} of MME has no questions", where=str(folder), fix="check --data")
        for file in files:
            path = _picture(place.root, folder, file.stem)
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            for number, line in enumerate(lines, 1):
                question, _, answer = line.rpartition("\t")
                if answer.strip().lower() not in ("yes", "no"):
                    raise EvaluationError(f"an answer is {answer!r}", where=f"{file}, line {number}")
                name = f"{task}-{file.stem}-{number}"
                prompt = Document((user(Image(path=path), question),), id=name)
                reference = {"task": task, "image": path, "answer": answer.strip().lower()}
                yield Sample(name, prompt, reference, facets={"task": task}, unit=f"{task}-{file.stem}")


def _picture(root: Path, folder: Path, stem: str) -> str:
    for place in (folder / "images", folder):
        for suffix in _PICTURES:
            if (place / f"{stem}{suffix}").is_file():
                return (place / f"{stem}{suffix}").relative_to(root).as_posix()
    raise EvaluationError(f"picture {stem} is not there", where=str(folder), fix="check --data")


_SHORT = {"max_images": 0, "max_text_tokens": 16}
TASKS = {
    "pope": Task(
        "are there objects that are not there? three splits and their mean",
        "coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json, val2014/",
        read_pope,
        ("pope/pope",),
        ("all", *POPE_SPLITS),
        ("asked", "plain"),
        sampling=_SHORT,
    ),
    "mme": Task(
        "two yes/no questions about each picture, 14 tasks",
        "one folder for each task, as released",
        read_mme,
        ("mme/mme",),
        ("all", "perception", "cognition"),
        sampling=_SHORT,
    ),
}
