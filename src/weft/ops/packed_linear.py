"""Linear layers whose weights are laid out once for products with a few rows, on a CPU in float32.

The library that multiplies lays a weight out anew in every product, which for the few rows of a decoding step costs as
much as the product itself. A laid-out copy is kept by whoever decodes and used only while it does; every other input,
training included, goes the usual way, and the layers stay `nn.Linear` with the same parameters. Layers that read one
input share a copy and a product.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

FEWEST_ROWS = 4
"""With fewer, a product reads the weight as it is about as fast."""
LARGEST = 2 * 2**30
"""Bytes of weights that are copied at most; of larger modules none is."""
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that, in one parent, are given one input after the other."""


class PackedLinear(nn.Linear):
    """An `nn.Linear` that multiplies by a packed copy of its weight while one is in use."""

    in_use: "tuple[_Pack, int] | None" = None
    """The copy, and this layer's number in it."""

    def forward(self, input: Tensor) -> Tensor:
        if self.in_use is not None and input.dtype == torch.float32:
            pack, number = self.in_use
            if input.numel() == pack.rows * self.in_features and not torch.is_grad_enabled():
                return pack.product(input, number)
        return super().forward(input)


class _Copy:
    """Weights that read one input, laid out for so many rows."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], rows: int) -> None:
        # kept, so that no other tensor can get their ids while the copy is found by them
        self._made_from = [*weights, *biases]
        whole = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(whole, rows)
        # only the shape of the weight itself is read from here on
        self.like = whole.new_zeros(()).expand_as(whole)
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            self.bias = torch.cat(
                [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
            )


_COPIES: WeakValueDictionary[tuple[Any, ...], _Copy] = WeakValueDictionary()
"""Those in use, by what they are made from: models that share weights share their copies."""


class _Pack:
    """A copy of the weights of layers that read one input, made anew where one has changed."""

    def __init__(self, layers: Sequence[PackedLinear], rows: int) -> None:
        self.layers, self.rows = layers, rows
        self._made_from: Any = None
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def refresh(self) -> None:
        weights = [layer.weight for layer in self.layers]
        biases = [layer.bias for layer in self.layers]
        given = [*weights, *(bias for bias in biases if bias is not None)]
        made_from = (self.rows, *((id(tensor), tensor.data_ptr(), tensor._version) for tensor in given))
        if made_from == self._made_from:
            return
        copy = _COPIES.get(made_from)
        if copy is None:
            copy = _COPIES[made_from] = _Copy(weights, biases, self.rows)
        self._copy, self._made_from = copy, made_from

    def product(self, input: Tensor, number: int) -> Tensor:
        """(rows, ..., I) -> (rows, ..., O) of one layer; the others' are kept until the last of them is asked for."""
        if self._last is None or self._last[0] is not input:
            copy = self._copy
            found = torch.ops.mkl._mkl_linear(input, copy.packed, copy.like, copy.bias, self.rows)
            if len(self.layers) == 1:
                return found
            self._last = input, found.split([layer.out_features for layer in self.layers], -1)
        part = self._last[1][number]
        if number == len(self.layers) - 1:
            self._last = None
        return part

    def forget(self) -> None:
        self._last = None


_KINDS = (nn.Linear, PackedLinear)
"""No others: a subclass may have reasons of its own."""


class Packs:
    """Packed copies of the linear weights of some modules, for inputs of so many rows.

    Exact to the order of summation.
    """

    def __init__(self, modules: Sequence[nn.Module], rows: int) -> None:
        self._packs: list[_Pack] = []
        groups = [group for module in modules for group in _groups(module)]
        if not _pays([layer for group in groups for layer in group], rows):
            return
        for group in groups:
            for layer in group:
                # as torch's own parametrisations do: the same object, with another forward
                layer.__class__ = PackedLinear
            self._packs.append(_Pack(cast("list[PackedLinear]", group), rows))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While this lasts, the layers multiply by their copies."""
        for pack in self._packs:
            pack.refresh()
            for number, layer in enumerate(pack.layers):
                layer.in_use = pack, number
        try:
            yield
        finally:
            for pack in self._packs:
                pack.forget()
                for layer in pack.layers:
                    layer.in_use = None


def _groups(module: nn.Module) -> list[list[Any]]:
    """Its linear layers, those together that share a product."""
    groups: list[list[Any]] = []
    seen: set[nn.Module] = set()
    for parent in module.modules():
        children = dict(parent.named_children())
        for names in TOGETHER:
            group = [children.get(name) for name in names]
            if all(type(child) in _KINDS for child in group):
                groups.append(group)
                seen.update(cast("list[nn.Module]", group))
    rest = ([child] for child in module.modules() if type(child) in _KINDS and child not in seen)
    return [*groups, *rest]


def _pays(linears: Sequence[Any], rows: int) -> bool:
    weights = [layer.weight for layer in linears]
    here = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    small = sum(weight.nbytes for weight in weights) <= LARGEST
    return here and small and rows >= FEWEST_ROWS and torch.backends.mkl.is_available()
