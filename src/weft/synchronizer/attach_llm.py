"""Synchronisers in a language model, any LLaMA-like decoder of transformers.

    h <- h + tanh(gate) * MMFS(RMSNorm(h), RMSNorm(features))        in every few layers, from the first on,
                                                                     between attention and the norm before the MLP

Every position looks from the middle of the pictures. The gate is zero at the start, and the model as it was.
Source: Tian et al. 2024 (arXiv:2401.10208), section 3, and the released model.
"""

from functools import partial
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from weft.config import Config
from weft.errors import UsageError
from weft.synchronizer.attach import EPS, Branch, Insertion, WithoutImages
from weft.synchronizer.mmfs import FeatureBank, MMFSConfig, Projected


class DecoderSyncConfig(Config):
    """The synchronisers of a language model. Defaults are the released model's, except for `without_images`."""

    every: PositiveInt = 4
    """Of so many layers the first gets one."""
    feature_width: PositiveInt = 1024
    value_width: PositiveInt = 1024
    """Of all heads together."""
    heads: PositiveInt = 16
    points: PositiveInt = 8
    """Samples per head, scale and picture."""
    sides: tuple[PositiveInt, ...] = (32, 16, 8)
    """The side of the square map in every scale, fine to coarse."""
    base: PositiveInt = 16
    """An offset of 1 is 1 / base of a picture."""
    max_images: PositiveInt = 50
    """One more than a position can see."""
    offset_init: float = 3.0
    """Offsets start uniform in [-offset_init, offset_init]."""
    without_images: WithoutImages = "zero"
    """What a position that sees no picture gets: exactly nothing, or the bias of the output as in the released model.
    """


class GatedBranch(Branch):
    def __init__(self, width: int, config: DecoderSyncConfig) -> None:
        own = config.model_dump(exclude={"every"})
        super().__init__(MMFSConfig(query_width=width, out_width=width, **own), partial(nn.RMSNorm, eps=EPS))
        self.gate = nn.Parameter(torch.zeros(1))
        for linear in (self.mmfs.dynamic_offset_mask, self.mmfs.attention_weights):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x: Tensor, bank: FeatureBank | Projected, pictures: Tensor) -> Tensor:
        """(B, L, D) -> what is added to it."""
        middle = torch.full((1, 1, 2), 0.5, device=x.device)
        return self.gate.tanh() * self.read(self.query_norm(x), bank, pictures, middle)


def attach_to_decoder(decoder: nn.Module, config: DecoderSyncConfig) -> Insertion:
    """Insert synchronisers, with random weights and zero gates, on the devices of their layers.

    What of the decoder is trained is left as it is.

    Raises:
        UsageError: the decoder's layers are not LLaMA-like. What only a run can show, the first forward raises.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UsageError(
            f"{type(decoder).__name__} has no list of layers", fix="pass the inner decoder, such as model.model"
        )
    for number, layer in enumerate(layers):
        missing = {"input_layernorm", "self_attn", "post_attention_layernorm"} - {n for n, _ in layer.named_children()}
        if missing:
            raise UsageError(
                f"{type(layer).__name__} has no {', '.join(sorted(missing))}",
                where=f"layer {number}",
                fix="attach to a LLaMA-like decoder",
            )
    chosen: dict[str, Any] = {str(i): layer for i, layer in enumerate(layers) if i % config.every == 0}
    norms = {name: layer.input_layernorm.weight for name, layer in chosen.items()}
    insertion = Insertion({name: GatedBranch(len(norm), config).to(norm.device) for name, norm in norms.items()})
    for name, layer in chosen.items():
        _Hooks(insertion, name).register(layer)
    return insertion


class _Hooks:
    """Of one layer.

    On its children, not on the layer: checkpointing runs again what is inside the layer's forward and no hook of its
    own. And at the attention, not at the norm after it, which reads the residual stream but cannot change it: there
    h = residual + attention is known, and (residual + (attention + branch)) is the h that all the rest sees.
    """

    def __init__(self, insertion: Insertion, name: str) -> None:
        self.insertion, self.name = insertion, name
        self.residual: Tensor | None = None
        self.expected: Tensor | None = None
        """Of the first forward, what the norm after the attention should read."""
        self.is_checked = False

    def register(self, layer: Any) -> None:
        self.insertion.hold(
            layer.input_layernorm.register_forward_pre_hook(self.keep),
            layer.self_attn.register_forward_hook(self.add),
            layer.post_attention_layernorm.register_forward_pre_hook(self.check),
        )

    def keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.residual = args[0]

    def add(self, _: nn.Module, __: object, output: tuple[Any, ...]) -> tuple[Any, ...]:
        residual, self.residual = self.residual, None
        if residual is None:
            raise self._unlike("no residual is known when the attention ends")
        attention, *rest = output
        added = self.insertion.run(self.name, residual + attention, residual.shape[1])
        if added is not None:
            attention = attention + added
        if not self.is_checked and not torch.compiler.is_compiling():
            self.expected = residual + attention
        return attention, *rest

    def check(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        expected, self.expected = self.expected, None
        if expected is None:
            return
        # detached: checkpointing counts what a forward saves for backward, and only the first one is checked
        if not torch.equal(args[0].detach().nan_to_num(), expected.detach().nan_to_num()):
            raise self._unlike("attention is not simply added to the residual")
        self.is_checked = True

    def _unlike(self, what: str) -> UsageError:
        return UsageError(
            f"this decoder is not LLaMA-like: {what}", where=f"layer {self.name}", fix="attach to another one"
        )
