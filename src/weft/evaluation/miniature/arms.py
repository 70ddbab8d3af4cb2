"""What is trained in the miniature, as data, and how much of it each budget pays for.

Equal parameters means as many as MoSS of rank 8 with kernel 2. MoE-LoRA keeps its text branch and spends what its
window costs on the rank of the image branch, so that the two differ in the window alone.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from weft.config import Config

Alphabet = Literal["patch", "permuted", "familiar", "field", "vector"]
"""`patch`: a code for each patch alone, as the tiny generalist has them. `permuted`: the same, written in a fixed
random order of the patches. `familiar`: the same in the order that the generalist knows. `field`: codes of an encoder
that sees half of the neighbouring patches too. `vector`: what that encoder says before it is rounded to a code, written
by regression (as Emu2 writes)."""

_OTHERS: dict[Alphabet, str] = {
    "permuted": "patches in a shuffled order",
    "familiar": "pictures that the generalist can draw already",
    "field": "codes with a receptive field",
    "vector": "pictures as vectors",
}

ADAPTER_RATE, FULL_RATE = 8e-3, 1e-3
RANK = 8


@dataclass(frozen=True)
class Arm:
    """One way to tune one model."""

    name: str
    about: str
    adapter: Mapping[str, Any] | None = None
    """The adapter section of a recipe; None: the base as it is."""
    alphabet: Alphabet = "patch"
    rate: float = ADAPTER_RATE
    """Learning rate at its peak."""


def _linear(image: int, text: int = RANK) -> dict[str, Any]:
    return {"kind": "moe_lora", "rank": text, "image": {"rank": image}}


MOSS = {"kind": "moss", "rank": RANK, "kernel": 2}
MOE = {"kind": "moe_lora", "rank": RANK}
LORA = {"kind": "lora", "rank": RANK}
SAM = {"kind": "sam_conv_lora", "rank": RANK}
LORA_EQUAL = {"kind": "lora", "rank": 27}
MOE_EQUAL = _linear(19)
SAM_EQUAL = {"kind": "sam_conv_lora", "rank": 9, "image": {"rank": 11}}
K3_EQUAL = {"kind": "moss", "rank": RANK, "kernel": 3, "image": {"rank": 4}}

ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base", "the generalist as it is"),
        Arm("full", "full fine-tuning", {"kind": "full"}, rate=FULL_RATE),
        Arm("lora", "LoRA, rank 8", LORA),
        Arm("moe_lora", "MoE-LoRA, rank 8; MoSS with kernel 1", MOE),
        Arm("sam", "SAM-ConvLoRA, rank 8, kernels 2 and 4", SAM),
        Arm("moss", "MoSS, rank 8, kernel 2", MOSS),
        Arm("lora_equal", "LoRA with MoSS's parameters", LORA_EQUAL),
        Arm("moe_equal", "MoE-LoRA with MoSS's parameters", MOE_EQUAL),
        Arm("sam_equal", "SAM-ConvLoRA with MoSS's parameters", SAM_EQUAL),
        *(
            Arm(f"{name}_r{rank}", f"{title}, rank {rank}", {**adapter, "rank": rank})
            for name, title, adapter in (("lora", "LoRA", LORA), ("moe_lora", "MoE-LoRA", MOE), ("moss", "MoSS", MOSS))
            for rank in (4, 16, 32)
        ),
        Arm("moss_k3", "MoSS, rank 8, kernel 3", {**MOSS, "kernel": 3}),
        Arm("moss_k3_equal", "MoSS, kernel 3, with the parameters of kernel 2", K3_EQUAL),
        Arm("moss_raster", "MoSS, rank 8, kernel 3, upper right too", {**MOSS, "kernel": 3, "window": "raster"}),
        Arm("moss_input", "MoSS routed by what a position reads", {**MOSS, "routing": "input"}),
        Arm("moe_input", "MoE-LoRA routed by what a position reads", {**MOE, "routing": "input"}),
        *(
            Arm(f"{name}_{alphabet}", f"{title}; {what}", adapter, alphabet)
            for alphabet, what in _OTHERS.items()
            for name, title, adapter in (
                ("lora_equal", "LoRA", LORA_EQUAL),
                ("moe_equal", "MoE-LoRA", MOE_EQUAL),
                ("moss", "MoSS", MOSS),
            )
        ),
    )
}  # fmt: skip

MAIN = ("base", "full", "lora", "moe_lora", "sam", "moss", "lora_equal", "moe_equal")


class Budget(Config):
    """How much is spent, as a recipe."""

    arms: tuple[str, ...]
    """Rows of `ARMS`."""
    seeds: PositiveInt = 2
    steps: PositiveInt = 160
    """Of every arm."""
    stories: PositiveInt = 40
    """Held out, answered and scored by every run."""
    training: PositiveInt = 1280
    """Stories to learn from."""
    batch: PositiveInt = 8
    codec: PositiveInt = 2000
    """Steps of the codec with a receptive field, where an arm needs it."""
    base: PositiveInt = 2500
    """Steps in which the generalist learns an alphabet that is not its own, where an arm needs one."""
    pictures: PositiveInt = 6000
    """Drawn to train a codec and to align alphabets."""
    checked: PositiveInt = 40
    """Held-out captions drawn to say how well an alphabet is known."""
    save_every: PositiveInt = 50
    """Steps between checkpoints."""
    resamples: PositiveInt = 4000
    """Draws of the bootstrap."""
    rates: dict[str, PositiveFloat] = {}  # noqa: RUF012 - pydantic copies it
    """Learning rates of arms that differ from their own, by name."""
    generalist: str = "tiny"
    """`tiny`, `nano`, or the folder of one."""

    @model_validator(mode="after")
    def _knows_its_arms(self) -> Self:
        for name in (*self.arms, *self.rates):
            if name not in ARMS:
                near = difflib.get_close_matches(name, ARMS, n=1, cutoff=0.0)[0]
                raise ValueError(f"there is no arm {name!r}; the nearest is {near}")
        if len(set(self.arms)) < len(self.arms) or not self.arms:
            raise ValueError("arms: each once, and at least one")
        return self


BUDGETS: dict[str, Budget] = {
    "quick": Budget(arms=MAIN),
    "full": Budget(arms=tuple(ARMS), seeds=3, steps=300, stories=80, training=2400, checked=100),
}

PRINTED: dict[str, tuple[float, float, float, float, float]] = {
    "base": (1.33, 2.29, 1.71, 1.22, 1.87),
    "lora": (1.77, 2.38, 1.99, 2.04, 1.64),
    "moe_lora": (1.98, 3.28, 2.66, 2.62, 2.01),
    "sam": (2.50, 3.33, 3.17, 3.50, 2.41),
    "moss": (2.61, 3.62, 3.41, 3.54, 2.71),
    "full": (3.20, 3.21, 2.98, 3.60, 3.23),
}
"""The five aspects of the same arms on Emu2 at rank 256, judged from 0 to 5 (arXiv:2407.03604, tables 1, 2, 10, 12)."""
