"""What is trained in the miniature, as data, and how much of it each budget pays for.

Equal parameters means as many as MoSS of rank 8 with kernel 2. The linear rivals keep its text branch and spend what its
window costs on the rank of the image branch, so that the two differ in the window alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Alphabet = Literal["patch", "permuted", "field", "vector"]
"""`patch`: a code for each patch alone, as the tiny generalist has them. `permuted`: the same, written in a fixed random
order of the patches. `field`: codes of an encoder that sees half of the neighbouring patches too. `vector`: what that
encoder says before it is rounded to a code, written by regression (as Emu2 writes)."""

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
        Arm("moss_raster", "MoSS, rank 8, kernel 3, window to the upper right too", {**MOSS, "kernel": 3, "window": "raster"}),
        Arm("moss_input", "MoSS routed by what a position reads", {**MOSS, "routing": "input"}),
        Arm("moe_input", "MoE-LoRA routed by what a position reads", {**MOE, "routing": "input"}),
        *(
            Arm(f"{name}_{alphabet}", f"{title}; {what}", adapter, alphabet)
            for alphabet, what in (
                ("permuted", "patches in a shuffled order"),
                ("field", "codes with a receptive field"),
                ("vector", "pictures as vectors"),
            )
            for name, title, adapter in (
                ("lora_equal", "LoRA", LORA_EQUAL),
                ("moe_equal", "MoE-LoRA", MOE_EQUAL),
                ("moss", "MoSS", MOSS),
            )
        ),
    )
}  # fmt: skip

MAIN = ("base", "full", "lora", "moe_lora", "sam", "moss", "lora_equal", "moe_equal")


@dataclass(frozen=True)
class Budget:
    """How much is spent."""

    arms: tuple[str, ...]
    seeds: int
    steps: int
    """Of every arm."""
    stories: int
    """Held out, answered and scored by every run."""
    training: int
    """Stories to learn from."""
    batch: int = 8
    codec: int = 0
    """Steps of the codec with a receptive field."""
    base: int = 0
    """Steps in which the generalist learns an alphabet that is not its own."""
    pictures: int = 1500
    """Drawn to train a codec and to align alphabets."""
    checked: int = 40
    """Held-out captions drawn to say how well an alphabet is known."""
    save_every: int = 50
    """Steps between checkpoints."""
    resamples: int = 4000
    model: str = "tiny"
    rates: Mapping[str, float] = field(default_factory=dict)
    """Of arms that differ from their own, by name."""


BUDGETS: dict[str, Budget] = {
    "quick": Budget(MAIN, seeds=2, steps=160, stories=40, training=1280),
    "full": Budget(
        tuple(ARMS), seeds=3, steps=500, stories=100, training=4000, codec=2000, base=2500, pictures=6000, checked=100
    ),
}
