"""A deterministic model whose answers show whose they are: the detector of mixed-up requests.

    nonce=0123456789abcdef plan=tptp

in the last turn is answered letter by letter: `t` the nonce as text, `p` a picture in whose pixels the nonce and the
picture's number stand, `s` what stands in the pixels of all pictures of the prompt, `d` a digest of the whole prompt,
in tokens. The model reads everything from the engine's cache: a slot that is not its request's own shows as well.

    python -m tests.serve.nonce --port 0 --slots 8

serves it, in a process of its own as `weft serve` serves models, until it is interrupted.
"""

import hashlib
import io
import re
import secrets
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage
from torch import nn

from weft.backbones.base import ChatFormat, DecodingOptions, Elements, PictureForm, SpecialTokens
from weft.backbones.tokenizer import byte_tokenizer
from weft.config import Config
from weft.errors import UsageError, WeftError
from weft.serve.worker import Worker

if TYPE_CHECKING:
    from weft.serve.models_process import ModelsProcess

SPECIAL = ("<pad>", "<s>", "</s>", "<sep>", "[IMG]", "[/IMG]")
PAD, BEGIN, END, SEPARATOR, BEGIN_IMAGE, END_IMAGE = range(len(SPECIAL))
NONCE = re.compile(r"nonce=([0-9a-f]{16})")
PLAN = re.compile(r"plan=([tpsd]*)")
GRID = 3
PATCHES = GRID * GRID
"""Eight bytes of a nonce, and a number."""
CODES = 256
MODELS = "--models"
"""Only the model, for a server that started this process; its settings follow."""
NOTHING = "?"
"""What is answered where there is no nonce."""


class Shown(NamedTuple):
    """What a picture says."""

    nonce: str
    number: int

    def __str__(self) -> str:
        return f"{self.nonce}.{self.number}"


def new_nonce() -> str:
    return secrets.token_hex(8)


def ask(nonce: str, plan: str) -> str:
    """The text of a prompt."""
    return f"nonce={nonce} plan={plan}"


def expected(nonce: str, plan: str, seen: Sequence[Shown] = (), digest: str = "") -> list[str | Shown]:
    """The parts of the answer: texts, and what the pictures show."""
    parts: list[str | Shown] = []
    for letter in plan:
        if letter == "p":
            parts.append(Shown(nonce, sum(isinstance(part, Shown) for part in parts)))
            continue
        text = {"t": nonce, "s": ",".join(map(str, seen)), "d": digest}[letter] + " "
        if parts and isinstance(parts[-1], str):
            parts[-1] += text
        else:
            parts.append(text)
    return parts


def picture(shown: Shown, side: int = 12) -> bytes:
    """PNG bytes of a picture as the model makes it."""
    buffer = io.BytesIO()
    _paint(_codes(*shown), side).save(buffer, "PNG")
    return buffer.getvalue()


def read_picture(data: bytes) -> Shown:
    """What a picture that the model made shows; every pixel is looked at."""
    red = np.asarray(PILImage.open(io.BytesIO(data)).convert("RGB"))[..., 0]
    block = len(red) // GRID
    blocks = red.reshape(GRID, block, GRID, block).swapaxes(1, 2).reshape(PATCHES, -1)
    assert (blocks == blocks[:, :1]).all(), "the pixels of a block differ"
    return _shown(blocks[:, 0].tolist())


class NonceBackbone(nn.Module):
    """
    Args:
        side: of its pictures in pixels; a third of their bytes is flat, the rest noise that hardly gets smaller in PNG.
        before_step: called in the engine's thread before every forward: it may wait, or raise.
    """

    name, kind, revision, canvas, fingerprint = "nonce", "discrete", None, 0, "nonce"
    codes, feature_width, widest, guidance, context_length = CODES, 0, GRID, (1.0, 1.0), 16384
    routing = synchronizer = None
    tokens = SpecialTokens(BEGIN, END, PAD, SEPARATOR, BEGIN_IMAGE, END_IMAGE)
    chat = ChatFormat((BEGIN,), user=((), (SEPARATOR,)), assistant=((), (SEPARATOR,)), end=(END,))
    form = PictureForm(GRID, GRID, before=(BEGIN_IMAGE,), after=(END_IMAGE,))

    def __init__(self, *, side: int = 12, before_step: Callable[[], None] | None = None) -> None:
        super().__init__()
        assert side % GRID == 0
        self.side, self.before_step = side, before_step
        self.tokenizer = byte_tokenizer(SPECIAL)
        self.tokenizer.encode_special_tokens = True
        self.vocabulary = self.tokenizer.get_vocab_size()
        self.decoder = nn.Module()
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)
        self._next = lru_cache(maxsize=256)(self._program)
        self.eval()

    @property
    def device(self):
        return self.anchor.device

    def tokenize(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def detokenize(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def form_of(self, size):
        if size != (self.side, self.side):
            raise UsageError(f"nonce makes pictures of {self.side} x {self.side} pixels")
        return self.form

    def encode_images(self, pictures, *, generated):
        found = []
        for each in pictures:
            red = np.asarray(each.convert("RGB").resize((GRID, GRID), PILImage.Resampling.NEAREST))[..., 0]
            found.append(Elements(self.form, self.vocabulary + torch.tensor(red.flatten().astype(np.int64))))
        return found

    def decode_image(self, elements, options=DecodingOptions()):
        return _paint((elements.ids - self.vocabulary).tolist(), self.side)

    def embed(self, ids, layout, features=None):
        return ids.float().unsqueeze(-1)

    def forward(self, embeds, layout, step=None):
        """(B, q, 1) elements -> (B, q, 1) the element that follows, where one position is read."""
        if self.before_step is not None:
            self.before_step()
        kept, _ = step.keys_values.update(embeds[:, None], embeds[:, None], 0)
        following = torch.full_like(embeds, END)
        if embeds.shape[1] == 1:
            for b in range(len(embeds)):
                following[b] = self._follow([int(id) for id in kept[b, 0, step.mask[b, 0, -1], 0].tolist()])
        return following

    def text_logits(self, hidden):
        logits = _likely(hidden, self.vocabulary)
        logits[..., BEGIN_IMAGE] += 10
        logits[..., END] += 20
        return logits

    def image_logits(self, hidden):
        return _likely(hidden - self.vocabulary, CODES)

    def image_features(self, hidden):
        raise NotImplementedError("pictures are codes")

    def _follow(self, ids: list[int]) -> int:
        """The element after these; an answer that a budget has led elsewhere ends."""
        if SEPARATOR not in ids:
            return END
        start = len(ids) - ids[::-1].index(SEPARATOR)
        nonce, program = self._next(tuple(ids[:start]))
        written = ids[start:]
        if BEGIN_IMAGE in written:
            raster = written[::-1].index(BEGIN_IMAGE)
            if raster < PATCHES:
                return self.vocabulary + _codes(nonce, written.count(BEGIN_IMAGE) - 1)[raster]
        return program[len(written)] if written == program[: len(written)] and len(written) < len(program) else END

    def _program(self, prompt: tuple[int, ...]) -> tuple[str, list[int]]:
        """The nonce, and all elements of the answer."""
        turns = list(prompt[:-1])
        last = turns[len(turns) - turns[::-1].index(SEPARATOR) :] if SEPARATOR in turns else turns
        text = self.detokenize([id for id in last if id < self.vocabulary])
        nonce, plan = NONCE.search(text), PLAN.search(text)
        if nonce is None or plan is None:
            return "0" * 16, self.tokenize(NOTHING)
        seen = [
            _shown([id - self.vocabulary for id in prompt[at + 1 : at + 1 + PATCHES]])
            for at, id in enumerate(prompt)
            if id == BEGIN_IMAGE
        ]
        program: list[int] = []
        for part in expected(nonce[1], plan[1], seen, digest_of(prompt)):
            if isinstance(part, str):
                program += self.tokenize(part)
            else:
                program += [BEGIN_IMAGE, *(self.vocabulary + code for code in _codes(*part)), END_IMAGE]
        return nonce[1], program


def digest_of(ids: Sequence[int]) -> str:
    return f"{zlib.crc32(np.asarray(ids, dtype=np.int64).tobytes()):08x}"


def _codes(nonce: str, number: int) -> list[int]:
    return [*bytes.fromhex(nonce), number]


def _shown(codes: Sequence[int]) -> Shown:
    return Shown(bytes(codes[:-1]).hex(), codes[-1])


def _paint(codes: Sequence[int], side: int) -> PILImage.Image:
    seed = int.from_bytes(hashlib.sha256(bytes(codes)).digest()[:8], "big")
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    flat = np.asarray(codes, dtype=np.uint8).reshape(GRID, GRID)
    pixels[..., 0] = flat.repeat(side // GRID, 0).repeat(side // GRID, 1)
    return PILImage.fromarray(pixels)


def _likely(wanted: torch.Tensor, count: int) -> torch.Tensor:
    """(..., 1) -> (..., count) logits, 40 for what is wanted."""
    return 40.0 * (wanted.long() == torch.arange(count))


class Settings(Config):
    """Of the model in a process of its own."""

    slots: int = 2
    side: int = 12
    pause: float = 0.0
    """Seconds, before each forward."""
    steps: int | None = None
    """It fails in this forward; before the first one: while it is loaded."""
    dies: bool = False
    """While it is loaded."""


def nonce_process(**settings) -> "ModelsProcess":
    from weft.serve.models_process import ModelsProcess

    process = ModelsProcess([sys.executable, "-m", "tests.serve.nonce", MODELS, Settings(**settings).model_dump_json()])
    process.wait_until_loaded()
    return process


def _load():
    settings, done = Settings.model_validate_json(sys.argv[2]), 0
    if settings.steps == 0:
        raise UsageError("no steps", where="steps", fix="more of them")
    if settings.pause < 0:
        raise ValueError("a pause takes time")
    if settings.dies:
        sys.exit(3)
    print("what models print is not a message")

    def before_step():
        nonlocal done
        done += 1
        if done == settings.steps:
            raise RuntimeError("what somebody asked")
        time.sleep(settings.pause)

    return Worker({"nonce": NonceBackbone(side=settings.side, before_step=before_step)}, slots=settings.slots)


def main() -> None:
    """Serve it, to be loaded, cut off and killed."""
    if sys.argv[1:2] == [MODELS]:
        from weft.serve.models_main import work

        work(_load)

    import argparse

    from weft.serve.app import Served, create_app
    from weft.serve.limits import Limits
    from weft.serve.run import run_server
    from weft.serve.scheduler import Scheduler
    from weft.serve.settings import ServeConfig

    parser = argparse.ArgumentParser()
    for name, kind, default in (
        ("port", int, 0), ("slots", int, 8), ("side", int, 12), ("queue", int, None),
        ("pause", float, 0.0), ("steps", int, None), ("drain", float, 30.0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    limits = Limits(queue=given.queue, drain_seconds=given.drain)
    config = ServeConfig(port=given.port, slots=given.slots, limits=limits)
    process = nonce_process(slots=given.slots, side=given.side, pause=given.pause, steps=given.steps)
    scheduler = Scheduler(process, queue=given.queue)
    app = create_app(scheduler, [Served("nonce")], limits=limits, page=given.page)
    try:
        run_server(app, scheduler, config, say=lambda address: print(address, file=sys.stderr, flush=True))
    except WeftError as error:
        sys.exit(f"error: {error.what}")


if __name__ == "__main__":
    main()
