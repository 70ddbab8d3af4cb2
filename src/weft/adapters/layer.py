"""One adapted linear layer: the frozen layer's output plus, at each position, the branch that its route names."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from weft.adapters.branches import add_up, conv_step, sam, sam_experts
from weft.adapters.config import Branch, Branches
from weft.adapters.project import Rows, compute_dtype, down, up
from weft.adapters.routing import RoutingState, StepRoutes
from weft.errors import AdapterError
from weft.ops.causal_conv import causal_conv
from weft.ops.grid import Patches, Window

NONE = Window.of(1)


class MossLinear(nn.Module, BaseTunerLayer):
    """Wraps a frozen layer with in_features C and out_features E; any layer with these, quantised or not.

    Per adapter name and modality: `moss_*_A` (T * R, C) and `moss_*_B` (E, R), (E, C) for a full branch, which has no A;
    with experts also `moss_image_experts` (sum of T_e * R, R) and, gated, `moss_image_gate` (experts, R).
    """

    base_layer: nn.Module
    active_adapters: list[str]
    in_features: int
    out_features: int
    merged_adapters: list[str]

    adapter_layer_names = (
        "moss_text_A", "moss_text_B", "moss_image_A", "moss_image_B", "moss_image_experts", "moss_image_gate",
    )  # fmt: skip
    other_param_names = ("moss_branches",)

    def __init__(self, base_layer: nn.Module, routing: RoutingState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = cast(int, base_layer.in_features), cast(int, base_layer.out_features)
        self.routing = routing
        for parameters in self.adapter_layer_names:
            setattr(self, parameters, nn.ParameterDict())
        self.moss_branches: dict[str, Branches] = {}
        self.siblings: tuple[MossLinear, ...] = (self,)
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(self, name: str, branches: Branches, *, inference_mode: bool = False) -> None:
        """Add the parameters of an adapter: down-projections random, up-projections zero, so that nothing changes."""
        self.moss_branches[name] = branches
        for modality, branch in (("text", branches.text), ("image", branches.own_image)):
            if branch is not None:
                self._create(name, modality, branch)
        host = cast(Any, self)  # PEFT has no types
        host._move_adapter_to_device_of_base_layer(name)
        host.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _create(self, name: str, modality: str, branch: Branch) -> None:
        def put(part: str, value: Tensor) -> None:
            getattr(self, f"moss_{modality}_{part}")[name] = nn.Parameter(value)

        if branch.rank == "full":
            put("B", torch.zeros(self.out_features, self.in_features))
            return
        rank = branch.rank
        put("A", _taps(branch.taps, rank, self.in_features))
        put("B", torch.zeros(self.out_features, rank))
        if branch.experts:
            put("experts", torch.cat([_taps(window, rank, rank) for window in branch.expert_taps]))
        if branch.gate:
            put("gate", torch.zeros(len(branch.experts), rank))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "adapter_names mixes adapters in one batch, which adapters that route by modality do not do",
                fix="call set_adapter(name) and run each adapter's rows by themselves",
            )
        out = cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.disable_adapters:
            return out
        # A linear layer's backward does not read its output, so it is added to in place; other layers get a copy.
        owned = type(self.base_layer) is nn.Linear and not out._is_view()
        for name in self.active_adapters:
            branches = self.moss_branches.get(name)
            if branches is not None:
                out, owned = self._add(out, x, name, branches, owned), True
        return out

    def _add(self, out: Tensor, x: Tensor, name: str, branches: Branches, owned: bool) -> Tensor:
        if branches.shared:
            rows = Rows(None, _NO_ROWS, _NO_PATCHES)
        else:
            routes = self.routing.of(name, x.shape)
            if isinstance(routes, StepRoutes):
                return self._add_step(out if owned else out.clone(), x, routes, name, branches)
            rows = Rows(None if routes.all_text else routes.text, routes.image, routes.patches)
        z_text, z_image = self._down(x, rows, name, branches)
        text = image = None
        if branches.text is not None and z_text is not None:
            text = (z_text, self.moss_text_B[name], branches.text.scale)
        if branches.own_image is not None and z_image is not None:
            if branches.own_image.experts:
                z_image = sam(z_image, *self._experts(name, branches.own_image), rows.patches)
            image = (z_image, self.moss_image_B[name], branches.own_image.scale)
        return up(out, rows, text, image, in_place=owned)

    def _experts(self, name: str, branch: Branch) -> tuple[Tensor, Tensor | None, tuple[Window, ...]]:
        gate = self.moss_image_gate[name] if branch.gate else None
        return self.moss_image_experts[name], gate, branch.expert_taps

    def _down(self, x: Tensor, rows: Rows, name: str, branches: Branches) -> tuple[Tensor | None, Tensor | None]:
        """z of the text rows and of the image rows, None where the layer has no such branch."""
        if torch.compiler.is_compiling() or not self._can_share(name):
            return self._down_alone(x, rows, name, branches)
        stash = self.routing.stash
        if not (isinstance(stash, _Stash) and stash.holds(x, name, self)):
            layers = [layer for layer in self.siblings if layer._shares_with(self, name)]
            stash = _Stash(x, x._version, name, _down_together(layers, x, rows, name))
        found = stash.found.pop(id(self))
        self.routing.stash = stash if stash.found else None
        return found

    def _down_alone(self, x: Tensor, rows: Rows, name: str, branches: Branches) -> tuple[Tensor | None, Tensor | None]:
        image = branches.own_image
        return (
            self._project(x, rows.text, branches.text, self.moss_text_A, name, rows),
            None if image is None else self._project(x, rows.image, image, self.moss_image_A, name, rows),
        )

    def _project(
        self, x: Tensor, where: Tensor | None, branch: Branch | None, weights: nn.ParameterDict, name: str, rows: Rows
    ) -> Tensor | None:
        if branch is None:
            return None
        flat = x.reshape(-1, self.in_features)
        chosen = flat if where is None else flat.index_select(0, where)
        reference = self.moss_text_B if weights is self.moss_text_A else self.moss_image_B
        dtype = compute_dtype(x, reference[name])
        chosen = F.dropout(chosen.to(dtype), branch.dropout, self.training)
        if branch.rank == "full":
            return chosen
        return causal_conv(chosen, weights[name].to(dtype), branch.taps, rows.patches)

    def _can_share(self, name: str) -> bool:
        """The plain case: low-rank branches without dropout, whole parameters."""
        branches = self.moss_branches[name]
        for branch, weights in ((branches.text, self.moss_text_A), (branches.own_image, self.moss_image_A)):
            if branch is not None and (branch.rank == "full" or (branch.dropout and self.training)):
                return False
            # a sharded parameter of a layer that is not running is not there
            if branch is not None and type(weights[name]) is not nn.Parameter:
                return False
        return True

    def _shares_with(self, first: "MossLinear", name: str) -> bool:
        if self is first:
            return True
        mine, its = self.moss_branches.get(name), first.moss_branches[name]
        if mine is None or self.disable_adapters or name not in self.active_adapters or not self._can_share(name):
            return False
        same = [(b.text is None, b.shared, b.own_image and b.own_image.taps) for b in (mine, its)]
        weights = [layer.moss_text_B[name] if mine.text else layer.moss_image_B[name] for layer in (self, first)]
        return same[0] == same[1] and weights[0].device == weights[1].device and weights[0].dtype == weights[1].dtype

    def _add_step(self, out: Tensor, x: Tensor, routes: StepRoutes, name: str, branches: Branches) -> Tensor:
        """One cached step. Each branch is computed for all rows or for none, and by the same products whatever the
        other rows take, so that what a row gets does not depend, in its last bits, on its neighbours."""
        flat, x = out.reshape(-1, self.out_features), x.reshape(-1, self.in_features)
        kept = flat if routes.only is None else None
        for modality, branch in (("text", branches.text), ("image", branches.own_image)):
            if branch is None or routes.only not in (None, modality):
                continue
            chosen = flat if kept is None else kept.clone()
            z = self._step_z(x, modality, branch, name, routes)
            weight = getattr(self, f"moss_{modality}_B")[name]
            add_up(chosen, None, z, weight.to(z.dtype), branch.scale)
            if kept is not None:
                is_here = routes.is_text if modality == "text" else routes.is_image
                flat = torch.where(is_here.unsqueeze(1), chosen, flat)
        return flat.view_as(out)

    def _step_z(self, x: Tensor, modality: str, branch: Branch, name: str, routes: StepRoutes) -> Tensor:
        if branch.rank == "full":
            return x.to(compute_dtype(x, getattr(self, f"moss_{modality}_B")[name]))
        weight = getattr(self, f"moss_{modality}_A")[name]
        dtype = compute_dtype(x, weight)
        x, weight = x.to(dtype), weight.to(dtype)
        if branch.is_linear:
            return F.linear(x, weight)
        rings = self.routing.rings
        assert rings is not None

        def step(part: int, taps: Tensor, window: Window, value: Tensor) -> Tensor:
            ring = rings.ring((id(self), name, part), window, taps, branch.rank)
            return conv_step(value, taps, ring, routes.tables[window.name])

        if not branch.experts:
            return step(-1, weight, branch.taps, x)
        z = F.linear(x, weight)
        experts, gate, windows = self._experts(name, branch)
        return sam_experts(
            z, experts.to(dtype), gate if gate is None else gate.to(dtype), windows,
            lambda e, taps, window: F.linear(z, taps) if len(window.taps) == 1 else step(e, taps, window, z),
        )  # fmt: skip

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise AdapterError(
            "an adapter that depends on the modality cannot be merged into one weight",
            fix="keep it attached, or call unload() to remove it",
        )

    def unmerge(self) -> None:
        raise AdapterError("nothing was merged")


_NO_ROWS = torch.empty(0, dtype=torch.int64)
_NO_PATCHES = Patches((), {})


@dataclass
class _Stash:
    """z of layers that share one input, computed when the first of them was called."""

    x: Tensor
    version: int
    name: str
    found: dict[int, tuple[Tensor | None, Tensor | None]]

    def holds(self, x: Tensor, name: str, layer: MossLinear) -> bool:
        return self.x is x and self.version == x._version and self.name == name and id(layer) in self.found


def _down_together(
    layers: list[MossLinear], x: Tensor, rows: Rows, name: str
) -> dict[int, tuple[Tensor | None, Tensor | None]]:
    first = layers[0].moss_branches[name]
    texts = [layer.moss_text_A[name] for layer in layers] if first.text else []
    images = [layer.moss_image_A[name] for layer in layers] if first.own_image else []
    z = down(x, rows, texts, images, first.own_image.taps if first.own_image else NONE)
    return {
        id(layer): (z[i] if texts else None, z[len(texts) + i] if images else None) for i, layer in enumerate(layers)
    }


def _taps(window: Window, rank: int, channels: int) -> Tensor:
    """(T * R, C), Kaiming-uniform with a = sqrt(5), as torch's own Linear and Conv2d."""
    bound = 1 / math.sqrt(len(window.taps) * channels)
    return torch.empty(len(window.taps) * rank, channels).uniform_(-bound, bound)
