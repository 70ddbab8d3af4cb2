"""One adapted linear layer: the frozen layer's output plus, at each position, the branch that its route names."""

import math
from dataclasses import dataclass
from itertools import chain
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

SELF = Window.of(1)


class MossLinear(nn.Module, BaseTunerLayer):
    """Wraps a frozen layer with in_features C and out_features E; any layer with these, quantised or not.

    Per adapter name and modality: `moss_*_A` (T * R, C) and `moss_*_B` (E, R), (E, C) and no A if full;
    with experts also `moss_image_experts` (sum of T_e * R, R) and, gated, `moss_image_gate` (experts, R).
    """

    base_layer: nn.Module
    active_adapters: list[str]
    in_features: int
    out_features: int
    merged_adapters: list[str]
    moss_text_A: nn.ParameterDict
    moss_text_B: nn.ParameterDict
    moss_image_A: nn.ParameterDict
    moss_image_B: nn.ParameterDict
    moss_image_experts: nn.ParameterDict
    moss_image_gate: nn.ParameterDict

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

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = cast(Any, super())._get_base_layer_device_and_dtype(base_layer)
        if device is None:  # PEFT asks for a weight by its usual names, and a quantised layer may have none
            device = next((t.device for t in chain(base_layer.parameters(), base_layer.buffers())), None)
        return device, dtype

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
        base: Any = self._modules["base_layer"]
        out = cast(Tensor, base(x, *args, **kwargs))
        if self._disable_adapters:
            return out
        # A linear layer's backward does not read its output, so it is added to in place, unless a hook may have kept
        # it; other layers get a copy.
        plain = type(base) is nn.Linear and not base._forward_hooks
        owned = plain and not torch.compiler.is_compiling() and not out._is_view()
        for name in self.active_adapters:
            branches = self.moss_branches.get(name)
            if branches is not None:
                out, owned = self._add(out, x, name, branches, owned), True
        return out

    def _add(self, out: Tensor, x: Tensor, name: str, branches: Branches, owned: bool) -> Tensor:
        if branches.shared:
            rows = Rows(None, _NO_ROWS, _NO_PATCHES)
        else:
            routes = self.routing.of(name, x.shape, x.device)
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
        # an inference tensor does not count the writes to it, so that one input cannot be told from a later one
        if torch.compiler.is_compiling() or x.is_inference() or not self._can_share(name):
            return self._down_alone(x, rows, name, branches)
        stash = self.routing.stash
        if not (isinstance(stash, _Stash) and stash.holds(x, name, self)):
            layers = [layer for layer in self.siblings if layer._shares_with(self, name)]
            stash = _Stash(x, _state_of(x), name, _down_together(layers, x, rows, name))
        found = stash.found.pop(id(self))
        self.routing.stash = stash if stash.found else None
        return found

    def _down_alone(self, x: Tensor, rows: Rows, name: str, branches: Branches) -> tuple[Tensor | None, Tensor | None]:
        return (
            None if branches.text is None else self._project(x, rows.text, "text", branches.text, name, rows.patches),
            None
            if branches.own_image is None
            else self._project(x, rows.image, "image", branches.own_image, name, rows.patches),
        )

    def _project(
        self, x: Tensor, where: Tensor | None, modality: str, branch: Branch, name: str, patches: Patches
    ) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        chosen = flat if where is None else flat.index_select(0, where)
        dtype = compute_dtype(x, self._weight(f"moss_{modality}_B", name))
        chosen = F.dropout(chosen.to(dtype), branch.dropout, self.training)
        if branch.rank == "full":
            return chosen
        return causal_conv(chosen, self._weight(f"moss_{modality}_A", name).to(dtype), branch.taps, patches)

    def _can_share(self, name: str) -> bool:
        """The plain case: low-rank branches without dropout, whole parameters."""
        branches = self.moss_branches[name]
        for modality, branch in (("text", branches.text), ("image", branches.own_image)):
            if branch is None:
                continue
            if branch.rank == "full" or (branch.dropout and self.training):
                return False
            # a sharded parameter of a layer that is not running is not there
            if type(self._weight(f"moss_{modality}_A", name)) is not nn.Parameter:
                return False
        return True

    def _shares_with(self, first: "MossLinear", name: str) -> bool:
        if self is first:
            return True
        mine, its = self.moss_branches.get(name), first.moss_branches[name]
        if mine is None or self.disable_adapters or name not in self.active_adapters or not self._can_share(name):
            return False
        alike = [(b.text is None, b.shared, b.own_image.taps if b.own_image else None) for b in (mine, its)]
        if alike[0] != alike[1]:
            return False
        part = "moss_text_B" if mine.text else "moss_image_B"
        where = [(w.device, w.dtype) for w in (layer._weight(part, name) for layer in (self, first))]
        return where[0] == where[1]

    def _add_step(self, out: Tensor, x: Tensor, routes: StepRoutes, name: str, branches: Branches) -> Tensor:
        """One cached step. Each branch is computed for all rows or for none, and by the same products whatever the
        other rows take, so that what a row gets does not depend, in its last bits, on its neighbours."""
        flat, x = out.view(-1, self.out_features), x.reshape(-1, self.in_features)
        if routes.only is not None:
            branch = branches.text if routes.only == "text" else branches.own_image
            if branch is not None:
                self._step(flat, x, routes.only, branch, name, routes)
            return out
        before = flat
        for modality, branch, is_here in (
            ("text", branches.text, routes.is_text), ("image", branches.own_image, routes.is_image),
        ):  # fmt: skip
            if branch is not None:
                found = before.clone()
                self._step(found, x, modality, branch, name, routes)
                flat = torch.where(is_here.unsqueeze(1), found, flat)
        return flat.view_as(out)

    def _step(self, out: Tensor, x: Tensor, modality: str, branch: Branch, name: str, routes: StepRoutes) -> None:
        """out (B, E) += the update of one branch, in place."""
        up = self._weight(f"moss_{modality}_B", name)
        dtype = compute_dtype(x, up)
        if x.dtype is not dtype:
            x = x.to(dtype)
        if up.dtype is not dtype:
            up = up.to(dtype)
        z = x if branch.rank == "full" else self._step_z(x, modality, branch, name, routes)
        add_up(out, None, z, up, branch.scale)

    def _step_z(self, x: Tensor, modality: str, branch: Branch, name: str, routes: StepRoutes) -> Tensor:
        weight = self._weight(f"moss_{modality}_A", name)
        if weight.dtype is not x.dtype:
            weight = weight.to(x.dtype)
        if branch.is_linear:
            return F.linear(x, weight)
        rings = self.routing.rings
        assert rings is not None

        def step(part: int, taps: Tensor, window: Window, value: Tensor) -> Tensor:
            ring = rings.ring((id(self), name, part), window, taps, len(taps) // len(window.taps))
            return conv_step(value, taps, ring, routes.tables[window.name])

        if not branch.experts:
            return step(-1, weight, branch.taps, x)
        z = F.linear(x, weight)
        experts, gate, windows = self._experts(name, branch)
        return sam_experts(
            z, experts, gate, windows,
            lambda e, taps, window: F.linear(z, taps) if len(window.taps) == 1 else step(e, taps, window, z),
        )  # fmt: skip

    def _weight(self, part: str, name: str) -> Tensor:
        """A parameter by way of torch's own dictionaries: attribute access to it would take as long as a small product,
        and decoding is made of these."""
        weight = self._modules[part]._parameters[name]  # type: ignore[union-attr]
        assert weight is not None
        return weight

    def delete_adapter(self, adapter_name: str) -> None:
        cast(Any, super()).delete_adapter(adapter_name)
        self.routing.unregister(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise AdapterError(
            "an adapter that depends on the modality cannot be merged into one weight",
            fix="in weft.adapters.merge, merge_text(model) merges the text branch, to serve text only, and "
            "split_weights(model) gives text and pictures a weight each; or keep it attached",
        )

    def unmerge(self) -> None:
        raise AdapterError("nothing was merged, so nothing can be unmerged", fix="call unload() to remove the adapter")


_NO_ROWS = torch.empty(0, dtype=torch.int64)
_NO_PATCHES = Patches((), {})


@dataclass
class _Stash:
    """z of layers that share one input, computed when the first of them was called."""

    x: Tensor
    state: tuple[Any, ...]
    name: str
    found: dict[int, tuple[Tensor | None, Tensor | None]]

    def holds(self, x: Tensor, name: str, layer: MossLinear) -> bool:
        return self.x is x and self.state == _state_of(x) and self.name == name and id(layer) in self.found


def _state_of(x: Tensor) -> tuple[Any, ...]:
    """What else a product of x depends on: writes to it, autocast, whether gradients are wanted."""
    device = x.device.type
    cast_to = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return x._version, cast_to, torch.is_grad_enabled()


def _down_together(
    layers: list[MossLinear], x: Tensor, rows: Rows, name: str
) -> dict[int, tuple[Tensor | None, Tensor | None]]:
    first = layers[0].moss_branches[name]
    texts = [layer.moss_text_A[name] for layer in layers] if first.text else []
    images = [layer.moss_image_A[name] for layer in layers] if first.own_image else []
    z = down(x, rows, texts, images, first.own_image.taps if first.own_image else SELF)
    return {
        id(layer): (z[i] if texts else None, z[len(texts) + i] if images else None) for i, layer in enumerate(layers)
    }


def _taps(window: Window, rank: int, channels: int) -> Tensor:
    """(T * R, C), Kaiming-uniform with a = sqrt(5), as torch's own Linear and Conv2d."""
    bound = 1 / math.sqrt(len(window.taps) * channels)
    return torch.empty(len(window.taps) * rank, channels).uniform_(-bound, bound)
