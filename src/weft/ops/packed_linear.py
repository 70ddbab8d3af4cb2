"""Linear layers whose weights are laid out once for products with a few rows, on a CPU in float32.

The library that multiplies lays a weight out anew in every product, which for the few rows of a decoding step costs as
much as the product itself. A laid-out copy is kept by whoever decodes and used only while it does; every other input,
training included, goes the usual way, and the layers stay `nn.Linear` with the same parameters.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

FEWEST_ROWS = 4
"""With fewer, a product reads the weight as it is about as fast."""
LARGEST = 2 * 2**30
"""Bytes of weights that are copied at most; of larger modules none is."""


class PackedLinear(nn.Linear):
    """An `nn.Linear` that multiplies by a packed copy of its weight while one is in use."""

    in_use: "tuple[Tensor, int] | None" = None
    """The copy, and the rows it was made for."""

    def forward(self, input: Tensor) -> Tensor:
        if self.in_use is not None and input.dtype == torch.float32:
            packed, rows = self.in_use
            if input.numel() == rows * self.in_features and not torch.is_grad_enabled():
                return torch.ops.mkl._mkl_linear(input, packed, self.weight, self.bias, rows)
        return super().forward(input)


_KINDS = (nn.Linear, PackedLinear)
"""No others: a subclass may have reasons of its own."""


class Packs:
    """Packed copies of the linear weights of some modules, for inputs of so many rows.

    Exact to the order of summation.
    """

    def __init__(self, modules: Sequence[nn.Module], rows: int) -> None:
        self._rows = rows
        self._copies: dict[PackedLinear, tuple[Any, Tensor]] = {}
        linears = [child for module in modules for child in module.modules() if type(child) in _KINDS]
        if not _pays(linears, rows):
            return
        for layer in linears:
            # as torch's own parametrisations do: the same object, with another forward
            layer.__class__ = PackedLinear
            self._copies[cast(PackedLinear, layer)] = (None, cast(Tensor, layer.weight))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While this lasts, the layers multiply by their copies, which are made anew where a weight has changed."""
        for layer, (made_from, copy) in self._copies.items():
            now = (layer.weight.data_ptr(), layer.weight._version)
            if made_from != now:
                copy = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight.detach(), self._rows)
                self._copies[layer] = (now, copy)
            layer.in_use = (copy, self._rows)
        try:
            yield
        finally:
            for layer in self._copies:
                layer.in_use = None


def _pays(linears: Sequence[Any], rows: int) -> bool:
    weights = [layer.weight for layer in linears]
    here = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    small = sum(weight.nbytes for weight in weights) <= LARGEST
    return here and small and rows >= FEWEST_ROWS and torch.backends.mkl.is_available()
