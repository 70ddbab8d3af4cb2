"""Small runs: documents of one or two pictures on the instant model, a few milliseconds a step."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image as PILImage

from weft.document import Turn
from weft.training import TrainConfig

DOCUMENTS = 10


def write_documents(file: Path, count: int = DOCUMENTS) -> Path:
    """A JSONL file of short documents with 16 x 16 pictures; every third is text only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        PILImage.new("RGB", (16, 16), (20 * i % 256, 90, 200 - 15 * i % 200)).save(file.parent / f"{i}.png")
        picture = {"type": "image", "image": f"{i}.png"}
        answer = [{"type": "text", "text": f"it is {i}"}, *([] if i % 3 == 2 else [picture])]
        messages = [
            {"role": "user", "content": [*([picture] if i % 2 else []), {"type": "text", "text": f"show {i}"}]},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"id": f"doc{i}", "messages": messages}))
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    return write_documents(tmp_path_factory.mktemp("data") / "documents.jsonl")


@pytest.fixture(scope="session")
def recipe_in(documents) -> Callable[..., TrainConfig]:
    """A short recipe with everything in it that a step's numbers could depend on; keywords replace sections' keys."""

    def make(out: Path, **changes) -> TrainConfig:
        values = {
            "data": {"path": documents, "validation": 2},
            "model": "nano",
            "adapter": {"rank": 2, "dropout": 0.1},
            "optim": {"batch": 3, "micro_batch": 2},
            "schedule": {"steps": 12, "warmup": 3},
            "sampling": {"every": 4, "documents": 1, "prompts": ["hello <b>"], "max_text_tokens": 4, "max_images": 1},
            "out": out,
            "save_every": 4,
            "validate_every": 5,
            "verify": False,
        }
        for key, change in changes.items():
            values[key] = {**values[key], **change} if isinstance(change, dict) else change
        return TrainConfig.model_validate(values)

    return make


@pytest.fixture
def recipe(recipe_in, tmp_path) -> Callable[..., TrainConfig]:
    """`recipe_in` a folder of the test's own."""
    return lambda **changes: recipe_in(**{"out": tmp_path / "run", **changes})


@pytest.fixture(scope="session")
def results() -> Callable[[Path], dict[str, bytes]]:
    """The files of a run that must not depend on when it was interrupted."""

    def read(run: Path) -> dict[str, bytes]:
        last = max((run / "checkpoints").glob("step_*"))
        files = [run / "metrics.jsonl", run / "samples.html"]
        for folder in (run / "adapter", run / "samples", last):
            files += sorted(folder.glob("*"))
        return {str(file.relative_to(run)): file.read_bytes() for file in files if file.exists()}

    return read


@pytest.fixture(scope="session")
def echo() -> Callable[..., list[Turn]]:
    """A sampler that answers with the prompt."""

    def answer(backbone, prompts) -> list[Turn]:
        return [Turn("assistant", prompt.turns[-1].parts) for prompt in prompts]

    return answer
