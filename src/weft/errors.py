"""Every error that Weft raises for a person to read: what happened, where, and what to do about it."""

from typing import ClassVar


class WeftError(Exception):
    """Three facts: `what` came instead of what was wanted, `where` (file, line, field), and the `fix`.

    `code` names the kind for programs and tests; `exit_code` is what the command line exits with.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return "\n".join(
            line
            for line in (self.what, self.where and f"  where: {self.where}", self.fix and f"  fix: {self.fix}")
            if line
        )


class UsageError(WeftError):
    """The command line or a call asks for something that cannot be meant."""

    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """A recipe or an override does not fit its schema."""

    code = "config"


class DocumentError(WeftError):
    """A record is not an illustrated document."""

    code = "document"


class ImageError(WeftError):
    """Bytes that should be a picture are not an acceptable one; `reason` is what a ledger files it under."""

    code = "image"

    def __init__(
        self, what: str, *, where: str | None = None, fix: str | None = None, reason: str = "image_damaged"
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.reason = reason


class PathError(WeftError):
    """A path leaves the folder it must stay in."""

    code = "path"


class LayoutError(WeftError):
    """A sequence's images do not fit its positions."""

    code = "layout"


class RoutingError(WeftError):
    """An adapted model was run without the layout of its input, or with that of another one."""

    code = "routing"


class AdapterError(WeftError):
    """An adapter cannot be attached, saved, loaded or merged as asked."""

    code = "adapter"


class CheckpointError(WeftError):
    """A checkpoint or a weights file is missing, damaged, or of another shape."""

    code = "checkpoint"


class ContextError(WeftError):
    """A prompt or a document is longer than the model's context."""

    code = "context"


class NonFiniteError(WeftError):
    """Training met NaN or infinity several times in a row."""

    code = "non_finite"
