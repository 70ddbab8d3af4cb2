"""MM-Vet: 218 open questions that need several capabilities, graded by a language model.

mm-vet.json   {v1_0: {imagename, question, answer, capability: [...]}}
images/
"""

from collections.abc import Iterator

from weft.document import Document, Image, user
from weft.evaluation.task import Place, Sample, Task, required


def read(place: Place) -> Iterator[Sample]:
    for name, row in place.json("mm-vet.json").items():
        where = f"mm-vet.json, {name}"
        path = f"images/{required(row, 'imagename', where)}"
        reference = {
            "question": required(row, "question", where),
            "answer": required(row, "answer", where),
            "capabilities": list(required(row, "capability", where)),
        }
        yield Sample(name, Document((user(Image(path=path), row["question"]),), id=name), reference)


TASKS = {
    "mm-vet": Task(
        "open questions that need several capabilities",
        "mm-vet.json and images/",
        read,
        ("mm-vet/v1", "prose/length"),
        sampling={"max_images": 0, "max_text_tokens": 512},
    )
}
