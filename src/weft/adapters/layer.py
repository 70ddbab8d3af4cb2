"""One adapted linear layer: the frozen layer's output plus, at each position, the branch that its route names."""

import math
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from weft.adapters.branches import causal_conv, ring_size, ring_step
from weft.adapters.config import Branch
from weft.adapters.routing import ImageGroup, Routes, RoutingState, StepRoutes
from weft.errors import AdapterError


class MossLinear(nn.Module, BaseTunerLayer):
    """Wraps a frozen layer with in_features C and out_features E.

    Per adapter name: `moss_text_A` (R, C), `moss_text_B` (E, R), and where the image branch is its own, `moss_image_A`
    (k * k * R, C) and `moss_image_B` (E, R). Without one, the text branch serves every position: plain LoRA.
    """

    base_layer: nn.Module
    active_adapters: list[str]
    in_features: int
    out_features: int
    merged_adapters: list[str]

    adapter_layer_names = ("moss_text_A", "moss_text_B", "moss_image_A", "moss_image_B")
    other_param_names = ("moss_branches",)

    def __init__(self, base_layer: nn.Module, routing: RoutingState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = cast(int, base_layer.in_features), cast(int, base_layer.out_features)
        self.routing = routing
        self.moss_text_A, self.moss_text_B = nn.ParameterDict(), nn.ParameterDict()
        self.moss_image_A, self.moss_image_B = nn.ParameterDict(), nn.ParameterDict()
        self.moss_branches: dict[str, tuple[Branch, Branch | None]] = {}
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, name: str, text: Branch, image: Branch | None, *, inference_mode: bool = False) -> None:
        """Add the parameters of an adapter: down-projections random, up-projections zero, so that nothing changes."""
        self.moss_branches[name] = (text, image)
        for branch, down, up in (
            (text, self.moss_text_A, self.moss_text_B),
            (image, self.moss_image_A, self.moss_image_B),
        ):
            if branch is not None:
                fan_in = branch.kernel**2 * self.in_features
                down[name] = nn.Parameter(torch.empty(branch.kernel**2 * branch.rank, self.in_features))
                # Kaiming-uniform with a = sqrt(5), as torch's own Linear and Conv2d
                nn.init.uniform_(down[name], -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
                up[name] = nn.Parameter(torch.zeros(self.out_features, branch.rank))
        host = cast(Any, self)  # PEFT has no types
        host._move_adapter_to_device_of_base_layer(name)
        host.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:
            if name in self.moss_branches:
                out = self._add(out, x, name)
        return out

    def _add(self, out: Tensor, x: Tensor, name: str) -> Tensor:
        text, image = self.moss_branches[name]
        routes = self.routing.of(x.shape)
        down, up = self.moss_text_A[name], self.moss_text_B[name]
        x = x.to(down.dtype)
        if image is None:
            return out + (_up(F.linear(self._drop(x, text), down), up, text)).to(out.dtype)
        if isinstance(routes, StepRoutes):
            return out + self._step_delta(x, routes, name, text, image).reshape(out.shape).to(out.dtype)
        # A linear layer's backward does not read its output, so it is added to in place; other layers get a copy.
        total = (out if type(self.base_layer) is nn.Linear else out.clone()).view(-1, self.out_features)
        flat = x.reshape(-1, self.in_features)
        chosen = self._drop(flat.index_select(0, routes.text), text)
        delta = _up(F.linear(chosen, down), up, text)
        total.index_add_(0, routes.text, delta.to(total.dtype))
        rows, delta = self._image_delta(flat, routes, name, image)
        total.index_add_(0, rows, delta.to(total.dtype))
        return total.reshape(out.shape)

    def _step_delta(self, x: Tensor, routes: StepRoutes, name: str, text: Branch, image: Branch) -> Tensor:
        """(B, E) for one cached step. Both branches are computed for every row and one is chosen, so that what a row
        gets does not depend, in its last bits, on what its neighbours take."""
        rings = self.routing.rings
        assert rings is not None
        x = x.reshape(-1, self.in_features)
        taps, down = self.moss_image_A[name], self.moss_text_A[name]
        ring = rings.ring(self, name, ring_size(image.kernel, rings.columns), taps, image.rank)
        z = ring_step(x, taps, image.kernel, ring, routes.slots, routes.place, routes.cols, routes.is_image)
        picture = _up(z, self.moss_image_B[name], image)
        words = _up(F.linear(x, down), self.moss_text_B[name], text)
        delta = torch.where(routes.is_image.unsqueeze(1), picture, words)
        return delta.where((routes.is_image | routes.is_text).unsqueeze(1), delta.new_zeros(()))

    def _image_delta(self, flat: Tensor, routes: Routes, name: str, branch: Branch) -> tuple[Tensor, Tensor]:
        """(n,) flat positions and (n, E) what is added there; with n = 0 gradients are zero, not None."""
        taps, up = self.moss_image_A[name], self.moss_image_B[name]
        if not routes.images:
            none = flat[:0]
            return routes.text[:0], _up(F.linear(none, taps)[:, : branch.rank], up, branch)
        parts = [self._picture_delta(flat, group, taps, up, branch) for group in routes.images]
        return torch.cat([rows for rows, _ in parts]), torch.cat([delta for _, delta in parts])

    def _picture_delta(
        self, flat: Tensor, group: ImageGroup, taps: Tensor, up: Tensor, branch: Branch
    ) -> tuple[Tensor, Tensor]:
        if not group.whole:
            # patches that are not there yet read a row of zeros; causality keeps them out of the others
            flat = torch.cat((flat, flat.new_zeros(1, flat.shape[1])))
        x = flat.index_select(0, group.index.reshape(-1)).view(*group.index.shape, -1)
        z = causal_conv(self._drop(x, branch), taps, branch.kernel, group.grid)
        rows, z = group.index.reshape(-1), z.reshape(-1, branch.rank)
        if not group.whole:
            there = rows < len(flat) - 1
            rows, z = rows[there], z[there]
        return rows, _up(z, up, branch)

    def _drop(self, x: Tensor, branch: Branch) -> Tensor:
        # before the taps, so that all of them see one mask
        return F.dropout(x, branch.dropout, self.training) if branch.dropout else x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise AdapterError(
            "an adapter that depends on the modality cannot be merged into one weight",
            fix="keep it attached, or call unload() to remove it",
        )

    def unmerge(self) -> None:
        raise AdapterError("nothing was merged")


def _up(z: Tensor, up: Tensor, branch: Branch) -> Tensor:
    return F.linear(z * branch.scale, up)  # scaling the R-wide side is the cheaper one
