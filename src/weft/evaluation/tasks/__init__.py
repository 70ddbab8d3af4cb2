"""The tasks that exist, by name. A new one is a file in this folder and a row here."""

from weft.evaluation.task import Task
from weft.evaluation.tasks import (
    captions,
    choices,
    dialogue,
    grounding,
    interleavedbench,
    magicbrush,
    mm_vet,
    opening,
    picturebook,
    pictures,
    questions,
    stories,
    yes_no,
)

TASKS: dict[str, Task] = {
    **picturebook.TASKS,
    **interleavedbench.TASKS,
    **opening.TASKS,
    **magicbrush.TASKS,
    **stories.TASKS,
    **captions.TASKS,
    **questions.TASKS,
    **dialogue.TASKS,
    **grounding.TASKS,
    **yes_no.TASKS,
    **choices.TASKS,
    **mm_vet.TASKS,
    **pictures.TASKS,
}
