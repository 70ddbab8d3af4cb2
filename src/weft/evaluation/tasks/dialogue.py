"""Visual Dialog v1.0, val: 100 candidate answers to one question of each dialogue, ranked by their log-probability.

    visdial_1.0_val.json                     {data: {dialogs, questions, answers}}
    visdial_1.0_val_dense_annotations.json   [{image_id, round_id (from 1), gt_relevance}]
    VisualDialog_val2018/VisualDialog_val2018_{id:012d}.jpg

`full` shows all rounds before the question; `released` leaves out the last of them, as MM-Interleaved's code does.
"""

from collections.abc import Iterator

from weft.document import Document, Image, user
from weft.evaluation.task import Place, Sample, Task


def read(place: Place) -> Iterator[Sample]:
    data = place.json("visdial_1.0_val.json")["data"]
    questions, answers = data["questions"], data["answers"]
    dialogs = {dialog["image_id"]: dialog for dialog in data["dialogs"]}
    for row in place.json("visdial_1.0_val_dense_annotations.json"):
        dialog, number = dialogs[row["image_id"]], int(row["round_id"]) - 1
        rounds = dialog["dialog"]
        last = number if place.variant == "full" else max(0, number - 1)
        told = "".join(
            f" question: {questions[each['question']]}? answer: {answers[each['answer']]}." for each in rounds[:last]
        )
        asked = rounds[number]
        text = f"caption: {dialog['caption']}.{told} question: {questions[asked['question']]}? answer:"
        path = f"VisualDialog_val2018/VisualDialog_val2018_{int(row['image_id']):012d}.jpg"
        name = str(row["image_id"])
        options = tuple(answers[each] for each in asked["answer_options"])
        relevance = row.get("gt_relevance", row.get("relevance"))
        yield Sample(
            name,
            Document((user(Image(path=path), text),), id=name),
            {"relevance": relevance, "given": asked["gt_index"]},
            options=options,
        )


TASKS = {
    "visdial": Task(
        "candidate answers of a dialogue, ranked by their log-probability",
        "visdial_1.0_val.json, visdial_1.0_val_dense_annotations.json, VisualDialog_val2018/",
        read,
        ("visdial/ndcg", "visdial/sparse"),
        ("val",),
        ("full", "released"),
    )
}
