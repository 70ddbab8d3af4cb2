"""A small random LLaMA with an adapter, and a batch that mixes text with pictures of two grids."""

from dataclasses import replace
from typing import cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from weft.adapters import Branch, MossConfig
from weft.layout import ImageSpan, ModalityLayout, TextSpan, lay_out

WORDS = 64
WIDE, TALL = ImageSpan(2, 3), ImageSpan(3, 2)
MIXED = lay_out(
    [
        [TextSpan(2), WIDE, TextSpan(2), TALL, TextSpan(1)],
        [TextSpan(3), TALL, TextSpan(4)],
    ]
)
MOVED = lay_out(
    [
        [TextSpan(3), TALL, TextSpan(4)],
        [TextSpan(1), WIDE, TextSpan(3), TALL, TextSpan(1)],
    ]
)
"""As many positions of each kind and pictures of each grid as `MIXED`, elsewhere."""
TEXT = lay_out([[TextSpan(17)], [TextSpan(12)]])

LINEAR = Branch(4, 8.0)
IMAGE_BRANCHES = {
    "moe_lora": LINEAR,
    "moss": Branch(4, 8.0, kernel=2),
    "raster": Branch(4, 8.0, kernel=3, window="raster"),
    "sam": Branch(4, 8.0, experts=(2, 4), gate="token"),
}


def base(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def adapted(kind: str = "moss", dropout: float = 0.0, dtype: torch.dtype = torch.float32, layers: int = 2) -> PeftModel:
    """In training mode; adapters of `dtype` with no part at zero, so that every gradient counts."""
    text, image = (replace(branch, dropout=dropout) for branch in (LINEAR, IMAGE_BRANCHES[kind]))
    model = get_peft_model(base(layers, dtype), MossConfig(text=text, image=image), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapters(model):
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return cast(PeftModel, model.train())


def adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if ".moss_" in name]


def ids_for(layout: ModalityLayout, seed: int = 2) -> Tensor:
    return torch.randint(WORDS, layout.shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, layout: ModalityLayout | None, ids: Tensor | None = None) -> Tensor:
    ids = ids_for(layout or MIXED) if ids is None else ids
    logits = model(input_ids=ids, layout=layout).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in adapters(model)}


def assert_equal(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], atol: float = 0.0) -> None:
    """All there, not all zero, and equal."""
    assert found.keys() == wanted.keys() and any(g is not None and g.abs().max() > 0 for g in wanted.values())
    for name, gradient in wanted.items():
        assert found[name] is not None and gradient is not None, f"{name} has no gradient"
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
