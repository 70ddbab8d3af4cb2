"""What an adapter is made of, as PEFT saves it and as a recipe says it."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from pydantic import PositiveInt, model_validator

from weft.config import Config
from weft.errors import AdapterError

PEFT_TYPE = "MOSS"
MAX_KERNEL = 4


@dataclass(frozen=True)
class Branch:
    """One low-rank update; its output is multiplied by alpha / rank."""

    rank: int
    alpha: float
    kernel: int = 1
    """Side of the window in patches; 1 is linear."""
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank > 0):
            raise AdapterError(f"rank must be a positive integer, got {self.rank!r}")
        if not (isinstance(self.kernel, int) and 1 <= self.kernel <= MAX_KERNEL):
            raise AdapterError(f"kernel must be 1 to {MAX_KERNEL}, got {self.kernel!r}")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass
class MossConfig(PeftConfig):
    """PEFT configuration of a modality-specialised adapter.

    LoRA, MoE-LoRA and MoSS are three settings of it: no image branch of its own, one with kernel 1, one with kernel 2.
    """

    target_modules: set[str] | list[str] | str | None = field(default="all-linear")
    """Names or a regular expression, as in PEFT."""
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    text: Branch | dict[str, Any] = field(default_factory=lambda: Branch(8, 16.0))
    image: Branch | dict[str, Any] | None = field(default_factory=lambda: Branch(8, 16.0, kernel=2))
    """None: the text branch serves every position."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.text, dict):
            self.text = Branch(**self.text)
        if isinstance(self.image, dict):
            self.image = Branch(**self.image)
        if self.text.kernel != 1:
            raise AdapterError(
                "the text branch is linear: text has no grid", fix="set a kernel on the image branch only"
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # what PEFT compares with

    @property
    def branches(self) -> tuple[Branch, Branch | None]:
        """The text branch, and the image branch if it has one of its own."""
        assert isinstance(self.text, Branch)
        assert self.image is None or isinstance(self.image, Branch)
        return self.text, self.image

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if isinstance(self.target_modules, set):
            # a set's order differs between processes; saved folders must not
            values["target_modules"] = sorted(self.target_modules)
        text, image = self.branches
        values["text"], values["image"] = asdict(text), None if image is None else asdict(image)
        return values


class AdapterConfig(Config):
    """The adapter section of a recipe."""

    kind: Literal["lora", "moe_lora", "moss"] = "moss"
    """`lora`: one branch for all. `moe_lora`: a linear one per modality. `moss`: a convolution for pictures."""
    rank: PositiveInt = 8
    alpha: float | None = None
    """The update is multiplied by alpha / rank; left out, alpha is twice the rank."""
    kernel: PositiveInt = 2
    """Side of the picture branch's window, in patches (moss only)."""
    dropout: float = 0.0
    targets: list[str] | str = "all-linear"
    """Which linear layers: names, a regular expression, or all of them."""

    @model_validator(mode="after")
    def _check(self) -> "AdapterConfig":
        if self.kind != "moss" and "kernel" in self.model_fields_set and self.kernel != 1:
            raise ValueError(f"{self.kind} has no kernel; use kind: moss")
        if self.kernel > MAX_KERNEL:
            raise ValueError(f"kernel must be 1 to {MAX_KERNEL}")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be at least 0 and below 1")
        return self

    def to_peft(self, base_model: str | None = None) -> MossConfig:
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        kernel = {"lora": None, "moe_lora": 1, "moss": self.kernel}[self.kind]
        return MossConfig(
            base_model_name_or_path=base_model,
            target_modules=self.targets,
            text=Branch(self.rank, alpha, dropout=self.dropout),
            image=None if kernel is None else Branch(self.rank, alpha, kernel, self.dropout),
        )
