"""A linear layer with one weight for text positions and another for image positions: what `merge.split_weights` makes.

    text    W_text x
    image   W_image x + sum over taps t other than the patch itself of up K[t] x[i - a, j - b]

Needs a layout at every forward, as the adapter it came from did, and takes twice the memory of the frozen layer.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.adapters.branches import conv_step
from weft.adapters.routing import Routes, RoutingState, StepRoutes
from weft.ops.causal_conv import causal_conv
from weft.ops.grid import Patches, Tables, Window


@dataclass(frozen=True)
class OtherTaps:
    """A convolution without the patch itself, whose tap is part of the weight."""

    window: Window
    """All of it: what the routing's tables are kept by."""
    taps: Tensor
    """((T - 1) * R, C), tap-major."""
    up: Tensor
    """(E, R), scaled."""


class TwoWeightLinear(nn.Module):
    """C -> E. Padding, which nothing reads, becomes zero in whole sequences."""

    disable_adapters = False
    """Nothing is left to switch off: a layout is always needed."""

    def __init__(
        self, text: nn.Linear, image: Tensor, others: OtherTaps | None, routing: RoutingState, adapter: str
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = text.in_features, text.out_features
        self.text, self.image = text, _frozen(image)
        self.window = others.window if others else Window.of(1)
        self.taps: nn.Parameter | None = _frozen(others.taps) if others else None
        self.up: nn.Parameter | None = _frozen(others.up) if others else None
        self.routing, self.adapter = routing, adapter

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., E), with the layout that was set for x."""
        routes = self.routing.of(self.adapter, x.shape, x.device)
        flat = x.reshape(-1, self.in_features)
        if isinstance(routes, StepRoutes):
            out = self._step(flat, routes)
        elif routes.all_text:
            out = self.text(flat)
        else:
            words = self.text(flat.index_select(0, routes.text))
            pictures = self._pictures(flat.index_select(0, routes.image), routes)
            out = words.new_zeros(len(flat), self.out_features)
            out = out.index_copy_(0, routes.text, words).index_copy_(0, routes.image, pictures)
        return out.view(*x.shape[:-1], self.out_features)

    def _pictures(self, x: Tensor, routes: Routes) -> Tensor:
        out = F.linear(x, self.image, self.text.bias)
        if self.taps is None or self.up is None:
            return out
        tables = routes.patches.tables[self.window.name]
        others = Window(self.window.name, self.window.taps[1:])
        patches = Patches((), {others.name: Tables(tables.reads[:, 1:], tables.read_by[:, 1:])})
        # the one form that does not need the patch itself among the taps
        return out + F.linear(causal_conv(x, self.taps, others, patches, form="table"), self.up)

    def _step(self, x: Tensor, routes: StepRoutes) -> Tensor:
        """One cached step. Each weight is used for all rows or for none, so that no row depends on its neighbours."""
        if routes.only == "text":
            return self.text(x)
        pictures = F.linear(x, self.image, self.text.bias)
        if self.taps is not None and self.up is not None:
            tables, rings = routes.tables[self.window.name], self.routing.rings
            assert rings is not None
            ring = rings.ring((id(self), self.adapter), self.window, self.taps, self.up.shape[1])
            ahead = tables.ahead.view(len(x), -1)[:, 1:].reshape(-1)
            pictures = pictures + F.linear(conv_step(x, self.taps, ring, replace(tables, ahead=ahead)), self.up)
        if routes.only == "image":
            return pictures
        return torch.where(routes.is_image.unsqueeze(1), pictures, self.text(x))


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
