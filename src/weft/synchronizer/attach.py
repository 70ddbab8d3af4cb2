"""Synchronisers that sit in somebody else's model: their weights, what they read, and the hooks that hold them there.

The model keeps its modules and the names of its weights; ours are in an `Insertion`, which is saved alone and whose
`detach` leaves the model as it was. Where branches sit is decided in `attach_llm.py` and `attach_unet.py`, what a
position may read in `visibility.py`.

What is to be read is set before a forward and stays until the next one, so that activation checkpointing, which runs
layers again during backward, finds it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weft.errors import RoutingError
from weft.ops.autograd_time import autograd_time, in_backward_of_earlier
from weft.synchronizer.mmfs import FeatureBank, FeatureSynchronizer, MMFSConfig, Projected
from weft.synchronizer.visibility import nearest_first

WithoutImages = Literal["zero", "bias"]

EPS = 1e-6
"""Of the norms before a synchroniser."""

Kept = Mapping[str, Projected]
"""By branch, what no query changes: kept for all the steps in which a context is continued or a picture painted."""


class Branch(nn.Module):
    """A synchroniser with the norms before it."""

    def __init__(self, config: MMFSConfig, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.query_norm = norm(config.query_width)
        self.feat_norm = norm(config.feature_width)
        self.mmfs = FeatureSynchronizer(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.mmfs.output_proj.weight.dtype

    def project(self, bank: FeatureBank) -> Projected:
        return self.mmfs.project(replace(bank, features=self.feat_norm(bank.features.to(self.dtype))))

    def read(self, queries: Tensor, bank: FeatureBank | Projected, pictures: Tensor, points: Tensor) -> Tensor:
        """Normalised queries (B, Q, Cq) -> (B, Q, E)."""
        projected = bank if isinstance(bank, Projected) else self.project(bank)
        return cast(Tensor, self.mmfs(queries, projected, pictures, points))


@dataclass(frozen=True)
class _Reads:
    bank: FeatureBank | Kept
    pictures: Tensor
    """(B, Q or 1, M), see `nearest_first`."""


class Insertion(nn.Module):
    """The branches in one model. Hooks find in it what they read; whoever runs the model sets that before a forward.

    Made by `attach_to_decoder` and `attach_to_unet`. Its state dict is all that they added to the model.
    """

    def __init__(self, branches: Mapping[str, Branch]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self._handles: list[RemovableHandle] = []
        self._reads: _Reads | None = None
        self._is_set = False
        self._since = 0

    def hold(self, *handles: RemovableHandle) -> None:
        """Hooks that `detach` removes."""
        self._handles.extend(handles)

    def detach(self) -> None:
        """Take the branches out of the model, which is then as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reads, self._is_set = None, False

    def project(self, bank: FeatureBank) -> Kept:
        """What `set` takes instead of the features, to be kept while they and the weights stay."""
        return {name: self._branch(name).project(bank) for name in self.branches}

    def set(self, bank: FeatureBank | Kept, visible: Tensor) -> None:
        """Give what the coming forward reads.

        Args:
            bank: the pictures of each sequence of the batch; or what `project` made of them, for forwards without
                gradient: in cached decoding and denoising.
            visible: which of them a query sees, see `visibility.py`. Of a language model's (B, L, N) positions: exactly
                those of the forward, so of all new ones in cached decoding, where no rule is guessed: what continues
                a prompt sees what its last position saw, `visible[:, -1:]`. Of a picture that is painted: (B, N).
                bool, or what `nearest_first` made of it.

        Raises:
            RoutingError: pictures and `visible` are of different batches.
        """
        visible = visible if visible.dim() == 3 else visible.unsqueeze(1)
        some = bank.features if isinstance(bank, FeatureBank) else next(iter(bank.values())).values
        wanted = some.shape[:2]
        if len(visible) != wanted[0] or (visible.dtype == torch.bool and visible.shape[2] != wanted[1]):
            raise RoutingError(
                f"`visible` is {tuple(visible.shape)}, the pictures (B, N) are {tuple(wanted)}", fix="make them agree"
            )
        pictures = nearest_first(visible) if visible.dtype == torch.bool else visible
        self._keep(_Reads(bank, pictures))

    def set_without_pictures(self) -> None:
        """The coming forward has none in its whole batch: the branches are left out."""
        self._keep(None)

    def run(self, name: str, x: Tensor, queries: int | None = None) -> Tensor | None:
        """What a branch adds to `x` (B, ...); None where there is no picture in the whole batch.

        Args:
            queries: of each sequence; None: all see the same.

        Raises:
            RoutingError: nothing was set, or for another batch, or since the forward that is run again for backward.
        """
        self._check(x, queries)
        if self._reads is None:
            return None
        bank, branch = self._reads.bank, self._branch(name)
        projected = bank if isinstance(bank, FeatureBank) else bank[name]
        return cast(Tensor, branch(x.to(branch.dtype), projected, self._reads.pictures)).to(x.dtype)

    def _branch(self, name: str) -> Branch:
        return cast(Branch, self.branches[name])

    def _keep(self, reads: _Reads | None) -> None:
        self._reads, self._is_set, self._since = reads, True, autograd_time()

    def _check(self, x: Tensor, queries: int | None) -> None:
        if not self._is_set:
            raise RoutingError(
                "a model with synchronisers was run without being told what to read",
                fix="call set(bank, visible) or set_without_pictures() on the insertion before the forward",
            )
        if not torch.compiler.is_compiling() and in_backward_of_earlier(self._since):
            raise RoutingError(
                "a layer runs again for the backward of one forward, and what a later one reads was set since",
                fix="call backward before the next forward",
            )
        if self._reads is not None and _again_without_its_graph() and _is_computed(self._reads.bank):
            raise RoutingError(
                "reentrant checkpointing would go back through the encoder of the features once for every layer",
                fix="checkpoint with use_reentrant=False, or train without the encoder: features.detach()",
            )
        wanted = (len(x), 1 if queries is None else queries)
        if self._reads is not None and self._reads.pictures.shape[:2] != wanted:
            batch, length = self._reads.pictures.shape[:2]
            raise RoutingError(
                f"`visible` was set for {batch} x {length} queries, the model was given {wanted[0]} x {wanted[1]}",
                fix="set it for this very batch before the forward",
            )


def select(kept: Kept, rows: Tensor) -> Kept:
    """Of the sequences `rows` (B,), some perhaps twice: once with its prompt and once without, for guidance."""
    return {name: replace(projected, values=projected.values[rows]) for name, projected in kept.items()}


def _is_computed(bank: FeatureBank | Kept) -> bool:
    return isinstance(bank, FeatureBank) and bank.features.grad_fn is not None


def _again_without_its_graph() -> bool:
    """A layer is run again by reentrant checkpointing: a backward of its own within the backward of the whole."""
    node = torch._C._current_autograd_node()
    return node is not None and node.name() == "CheckpointFunctionBackward"
