"""Small tasks, answers and pictures for tests of evaluation."""

import io
import json
from pathlib import Path

from PIL import Image as PILImage

from weft.document import Document, Image, Text, user
from weft.evaluation.evaluate import adopt
from weft.evaluation.journal import to_line
from weft.evaluation.records import Prediction, picture_path
from weft.evaluation.task import Place, Sample, Task, TaskConfig

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"


def png(color="red", size=(16, 12)) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, files: dict) -> Path:
    """Files by path: bytes, lists of lines (.jsonl), or JSON."""
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif isinstance(content, str):
            file.write_text(content)
        elif name.endswith(".jsonl"):
            file.write_text("".join(map(to_line, content)))
        else:
            file.write_text(json.dumps(content))
    return root


def read_small(place: Place):
    for i in range(6):
        yield Sample(
            f"s{i}", Document((user(f"tell {i}"),)), {"number": i}, facets={"half": "low" if i < 3 else "high"}
        )


def small_task(**more) -> Task:
    return Task("small", "", read_small, ("prose/length",), **more)


def answered(folder: Path, task: TaskConfig, answers: dict, model="someone"):
    """A run of somebody's answers: id -> parts (text, bytes of pictures, or a list of scores)."""
    lines = []
    for name, parts in answers.items():
        made, number, scores = [], 0, None
        for part in parts:
            if isinstance(part, bytes):
                number += 1
                path = picture_path(name, number)
                write(folder, {path: part})
                made.append(Image(part, path))
            elif isinstance(part, float):
                scores = (*(scores or ()), part)
            else:
                made.append(Text(part))
        lines.append(Prediction(name, tuple(made), scores=scores).to_json())
    write(folder, {"predictions.jsonl": "".join(map(to_line, lines))})
    return adopt(folder, task, model)
