"""The same seed gives the same bytes: alone, among neighbours, after a restart, and by every way to ask."""

import asyncio
import base64
import json
import random
from pathlib import Path

import httpx2
import pytest

from tests.serve.nonce import Shown, new_nonce, picture
from tests.serve.running import PATIENCE, running
from weft import cli
from weft.backbones import load_backbone
from weft.document import Document, Image, Text, user
from weft.generation import Choice, SamplingConfig, generate
from weft.serve.limits import Limits

SLOTS = 32
WARM = Choice(temperature=1.0)
TEXT = "a small red house on the left, on the grass at noon."
LIMITS = Limits(answer_text_tokens=24, queue=64)
SEED = 7


def body(model, photo, *, seed=SEED, is_streamed=False, wanted=2):
    url = f"data:image/png;base64,{base64.b64encode(photo).decode()}"
    content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": TEXT}]
    return {
        "model": model, "input": [{"role": "user", "content": content}], "seed": seed, "temperature": 1,
        "min_images": 1, "max_images": wanted, "image_delivery": "inline", "stream": is_streamed,
    }  # fmt: skip


def parts_of(text, is_streamed=False):
    if is_streamed:
        answer = json.loads([line for line in text.splitlines() if line.startswith("data: ")][-1][6:])["response"]
    else:
        answer = json.loads(text)
    assert answer["status"] in ("completed", "incomplete")
    return [
        item["content"][0]["text"] if item["type"] == "message" else base64.b64decode(item["result"])
        for item in answer["output"]
    ]


def by_python(backbone, photo):
    document = Document((user(Image(photo), Text(TEXT)),))
    config = SamplingConfig(
        text=WARM, image=WARM, seed=SEED, min_images=1, max_images=2, max_text_tokens=LIMITS.answer_text_tokens
    )
    (answer,) = generate(backbone, [document], config, slots=SLOTS)
    return [part.text if isinstance(part, Text) else part.data for part in answer.parts]


def by_command(model, photo, folder, capsys):
    file = folder / "photo.png"
    file.write_bytes(photo)
    arguments = f"--slots {SLOTS} --seed {SEED} --temperature 1 --min-images 1 --max-images 2 --json".split()
    with pytest.raises(SystemExit):
        cli.main(["generate", model, TEXT, "--image", str(file), "--max-text-tokens", str(LIMITS.answer_text_tokens),
                  "--out", str(folder / "answer"), *arguments])  # fmt: skip
    written = json.loads(capsys.readouterr().out)
    return [
        part["text"] if part["type"] == "text" else Path(folder / "answer" / part["image"]).read_bytes()
        for part in written["parts"]
    ]


async def among_neighbours(url, model, photo, is_streamed, number=31):
    """Asked at the same time as others, in an order without meaning, some of whom hang up."""
    chance = random.Random(is_streamed)
    neighbours = [
        body(model, picture(Shown(new_nonce(), i)), seed=chance.randrange(10**6), wanted=1 + i % 2)
        for i in range(number)
    ]
    asked = [*neighbours, body(model, photo, is_streamed=is_streamed)]
    chance.shuffle(asked)
    async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False) as http:
        tasks = [asyncio.create_task(http.post("/v1/responses", json=each)) for each in asked]
        ours = tasks[next(i for i, each in enumerate(asked) if each["seed"] == SEED)]
        for task in chance.sample([task for task in tasks if task is not ours], 4):
            asyncio.get_running_loop().call_later(chance.random(), task.cancel)
        answer = await ours
        await asyncio.gather(*tasks, return_exceptions=True)
    return parts_of(answer.text, is_streamed)


@pytest.mark.parametrize("model", ["nano", pytest.param("tiny", marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_bytes_by_every_way(model, tmp_path, capsys):
    photo = picture(Shown(new_nonce(), 0), side=63)
    expected = by_python(load_backbone(model), photo)
    assert bytes in {type(part) for part in expected}
    assert by_command(model, photo, tmp_path, capsys) == expected
    for restart in range(2):
        with running({model: load_backbone(model)}, slots=SLOTS, limits=LIMITS) as server, server.http() as http:
            for is_streamed in (False, True):
                alone = http.post("/v1/responses", json=body(model, photo, is_streamed=is_streamed)).text
                assert parts_of(alone, is_streamed) == expected
            assert asyncio.run(among_neighbours(server.url, model, photo, is_streamed=bool(restart))) == expected
            # two seeds may draw the same of a photograph that leaves little open
            others = [http.post("/v1/responses", json=body(model, photo, seed=SEED + i)).text for i in (1, 2, 3)]
            assert any(parts_of(other) != expected for other in others)


def test_a_request_without_a_seed_gets_one_of_its_own():
    with running({"nano": load_backbone("nano")}, slots=4, limits=LIMITS) as server, server.http() as http:
        asked = {**body("nano", picture(Shown(new_nonce(), 0))), "seed": None}
        first, second = (parts_of(http.post("/v1/responses", json=asked).text) for _ in range(2))
        assert first != second


def test_the_command_writes_with_as_many_slots_as_it_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "nano", "a", "--slots", "0", "--out", str(tmp_path / "a")])
    assert caught.value.code == 2
    assert "at least one slot, got 0" in capsys.readouterr().err


def test_slots_and_beams_do_not_go_together(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "nano", "a", "--slots", "4", "--beams", "2", "--out", str(tmp_path / "a")])
    assert caught.value.code == 2
    assert "--slots and --beams" in capsys.readouterr().err
