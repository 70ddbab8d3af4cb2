"""What an adapter is made of, as PEFT saves it."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, cast

import peft
from packaging.version import InvalidVersion, Version
from peft import PeftConfig, PeftType

from weft.adapters.card import complete_card
from weft.adapters.routing import Modal, Rule
from weft.errors import AdapterError
from weft.ops.grid import MAX_KERNEL, Window, WindowShape

PEFT_TYPE = "MOSS"
FORMAT = 2
"""Of `adapter_config.json`."""

Scaling = Literal["rank", "sqrt_rank", "raw"]


@dataclass(frozen=True)
class Branch:
    """The update of one modality's positions: s B z, z read through a window of `kernel` x `kernel` patches."""

    rank: int | Literal["full"]
    """`full`: a dense (E, C) update, so that full fine-tuning, also of two weight sets, is one more setting."""
    alpha: float = 1.0
    kernel: int = 1
    """Side of the window in patches; 1 is linear."""
    dropout: float = 0.0
    """Of the branch's input, before the taps, so that all of them see one mask."""
    window: WindowShape = "up_left"
    scaling: Scaling = "rank"
    """s = alpha / rank, alpha / sqrt(rank), or alpha itself."""
    experts: tuple[int, ...] = ()
    """SAM-ConvLoRA: kernels of the convolutions inside the rank space, (2, 4) in the paper; `kernel` is then 1."""
    gate: Literal["token"] | None = None
    """SAM-ConvLoRA: weigh the experts of each position by a softmax of its own z; None adds them as they are."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(self.experts))
        if self.rank != "full" and not (type(self.rank) is int and self.rank > 0):
            raise AdapterError(
                f"rank must be a positive integer or 'full', got {self.rank!r}", fix="set rank, such as 8"
            )
        for name, kernel in (("kernel", self.kernel), *(("the kernel of an expert", k) for k in self.experts)):
            if not (type(kernel) is int and 1 <= kernel <= MAX_KERNEL):
                raise AdapterError(
                    f"{name} must be 1 to {MAX_KERNEL}, got {kernel!r}", fix="1 is linear, 2 is the paper's"
                )
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise AdapterError(
                f"dropout must be at least 0 and below 1, got {self.dropout!r}", fix="set dropout, such as 0.05, or 0"
            )
        if not (isinstance(self.alpha, (int, float)) and math.isfinite(self.alpha)):
            raise AdapterError(
                f"alpha must be a finite number, got {self.alpha!r}", fix="set alpha, such as twice the rank"
            )
        for name, value, known in (
            ("window", self.window, ("up_left", "raster")),
            ("scaling", self.scaling, ("rank", "sqrt_rank", "raw")),
            ("gate", self.gate, (None, "token")),
        ):
            if value not in known:
                raise AdapterError(f"{name} cannot be {value!r}", fix=f"use one of {', '.join(map(repr, known))}")
        if self.window == "raster" and self.kernel < 3 and not any(k >= 3 for k in self.experts):
            raise AdapterError("window 'raster' reads nothing up-right below kernel 3", fix="set kernel to 3 or 4")
        if self.experts and self.kernel != 1:
            raise AdapterError(
                f"experts convolve inside the rank space, where kernel {self.kernel} has no place",
                fix="leave kernel at 1, or drop the experts",
            )
        if self.gate and not self.experts:
            raise AdapterError("a gate weighs experts, and there are none", fix="set experts, such as (2, 4)")
        if self.rank == "full" and (self.kernel > 1 or self.experts):
            raise AdapterError("a full update has no window", fix="leave kernel at 1 and experts empty")
        # now and not at first use, which would take a lock, which a compiler cannot trace
        _ = self.scale, self.is_linear

    @cached_property
    def scale(self) -> float:
        if self.rank == "full" or self.scaling == "raw":
            return self.alpha
        return self.alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))

    @cached_property
    def taps(self) -> Window:
        """The window of the down-projection."""
        return Window.of(self.kernel, self.window)

    @cached_property
    def expert_taps(self) -> tuple[Window, ...]:
        return tuple(Window.of(kernel, self.window if kernel >= 3 else "up_left") for kernel in self.experts)

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """Every window that reads further than the patch itself."""
        return tuple(window for window in (self.taps, *self.expert_taps) if len(window.taps) > 1)

    @cached_property
    def is_linear(self) -> bool:
        return not self.windows and not self.experts


@dataclass(frozen=True)
class Branches:
    """The branches of one adapted layer."""

    text: Branch | None
    image: Branch | Literal["text"] | None
    """`text`: the text branch serves pictures too."""

    @property
    def own_image(self) -> Branch | None:
        """The image branch that has parameters of its own."""
        return None if self.image == "text" else self.image

    @property
    def shared(self) -> bool:
        """One branch for every position, whatever it is: plain LoRA."""
        return self.image == "text"


@dataclass
class MossConfig(PeftConfig):
    """PEFT configuration of a modality-specialised adapter.

    LoRA, MoE-LoRA, MoSS and SAM-ConvLoRA are settings of it: `image` is "text", a branch with kernel 1, with kernel 2,
    with experts.
    """

    target_modules: set[str] | list[str] | str | None = field(default="all-linear")
    """Names or a regular expression, as in PEFT."""
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    text: Branch | dict[str, Any] | None = field(default_factory=lambda: Branch(8, 16.0))
    """None: text positions keep the frozen layer's output."""
    image: Branch | dict[str, Any] | Literal["text"] | None = field(default_factory=lambda: Branch(8, 16.0, kernel=2))
    """None: image positions keep the frozen layer's output. "text": the text branch serves them too."""
    patterns: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Regular expression of module names -> {"text": {...}, "image": {...}}: fields of the branches that differ there,
    or None for no branch. Where several match, the last one decides."""
    routing: Literal["output", "input"] = "output"
    context_images: Modal = "image"
    isolate_gradients: bool = False
    """Text losses are to train the text branches only and image losses the image branches only: whoever trains calls
    `weft.adapters.gradients.backward_by_modality`."""
    format: int = FORMAT

    def __new__(cls, *args: Any, **values: Any) -> Self:
        # PEFT drops a key that it does not know with a warning, and the adapter is then another one
        known = {f.name for f in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown and not _is_newer(values.get("peft_version")):
            near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            raise AdapterError(
                f"an adapter configuration has no {', '.join(unknown)}",
                fix=f"did you mean {near[0]}?" if near else "leave it out, or use the version of Weft that wrote it",
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)  # the member that `register` added
        if self.format != FORMAT:
            raise AdapterError(
                f"adapter_config.json has format {self.format!r}, this Weft reads {FORMAT}",
                fix="load it with the version of Weft that wrote it, or train the adapter again",
            )
        self.text, self.image = _branch(self.text, "text"), _branch(self.image, "image")
        for name, value, known in (
            ("routing", self.routing, ("output", "input")),
            ("context_images", self.context_images, ("image", "text", "none")),
        ):
            if value not in known:
                raise AdapterError(f"{name} cannot be {value!r}", fix=f"use one of {', '.join(map(repr, known))}")
        _check_branches(self.branches)
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise AdapterError(
                    f"patterns: {pattern!r} is no regular expression: {error}",
                    fix="write one that is searched in module names, such as 'down_proj$'",
                ) from error
            _check_branches(self._changed(self.branches, pattern))
        if self.isolate_gradients and self.branches.shared:
            raise AdapterError(
                "gradients cannot be isolated by modality where one branch serves text and pictures",
                fix="give pictures a branch of their own, or leave isolate_gradients off",
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # what PEFT compares with

    @property
    def branches(self) -> Branches:
        """The branches of every layer that no pattern changes."""
        assert not isinstance(self.text, dict) and not isinstance(self.image, dict)
        return Branches(self.text, self.image)

    @property
    def rule(self) -> Rule:
        return Rule(self.routing, self.context_images)

    def branches_of(self, module: str) -> Branches:
        """The branches of the layer of this name."""
        branches = self.branches
        for pattern in self.patterns:
            if re.search(pattern, module):
                branches = self._changed(branches, pattern)
        return branches

    def _changed(self, branches: Branches, pattern: str) -> Branches:
        changes = self.patterns[pattern]
        if not isinstance(changes, Mapping) or not changes.keys() <= {"text", "image"}:
            raise AdapterError(
                f"patterns: {pattern!r} must map to 'text' and 'image', got {changes!r}",
                fix="write {'image': {'kernel': 3}}, or {'image': None} for no branch there",
            )
        for name, change in changes.items():
            old = getattr(branches, name)
            if isinstance(change, Mapping) and isinstance(old, Branch):
                change = _branch({**asdict(old), **change}, f"patterns: {pattern!r}: {name}")
            elif isinstance(change, Mapping):
                change = _branch(change, f"patterns: {pattern!r}: {name}")
            branches = replace(branches, **{name: change})
        return branches

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None, **kwargs: Any) -> Self:
        """PEFT's, but for weights that are a pickle: those are not read."""
        path = Path(folder, subfolder or "")
        if (path / "adapter_model.bin").is_file() and not (path / "adapter_model.safetensors").is_file():
            raise AdapterError(
                "the adapter's weights are a pickle, adapter_model.bin, which can run any program when it is read",
                where=str(path),
                fix="save it again as safetensors, which save_pretrained does by itself",
            )
        return cast(Self, super().from_pretrained(str(folder), subfolder, **kwargs))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, which it calls last when it saves a model; the model card then learns how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        complete_card(Path(save_directory))

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if isinstance(self.target_modules, set):
            # a set's order differs between processes; saved folders must not
            values["target_modules"] = sorted(self.target_modules)
        for name in ("text", "image"):
            branch = getattr(self, name)
            values[name] = asdict(branch) if isinstance(branch, Branch) else branch
        return values


def _is_newer(version: Any) -> bool:
    """Saved by a later PEFT, whose own new keys are PEFT's to drop."""
    try:
        return Version(version) > Version(peft.__version__)
    except (InvalidVersion, TypeError):
        return False


def _branch(value: Any, where: str) -> Any:
    """A branch from its saved fields; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    unknown = value.keys() - {f.name for f in fields(Branch)}
    if unknown:
        raise AdapterError(
            f"{where}: a branch has no {', '.join(sorted(unknown))}",
            fix=f"it has {', '.join(f.name for f in fields(Branch))}",
        )
    try:
        return Branch(**value)
    except TypeError as error:
        raise AdapterError(f"{where}: a branch needs its rank", fix="set rank, such as 8") from error


def _check_branches(branches: Branches) -> None:
    if branches.text is not None and not isinstance(branches.text, Branch):
        raise AdapterError(f"text must be a Branch or None, got {branches.text!r}", fix="give a Branch, or None")
    if branches.text is not None and not branches.text.is_linear:
        raise AdapterError("the text branch is linear: text has no grid", fix="set a kernel on the image branch only")
    if branches.image not in ("text", None) and not isinstance(branches.image, Branch):
        raise AdapterError(
            f"image must be a Branch, 'text' or None, got {branches.image!r}",
            fix="give a Branch, or 'text' for the text branch to serve pictures too",
        )
    if branches.text is None and branches.image in ("text", None):
        raise AdapterError("neither text nor image has a branch", fix="give at least one of them a rank")
