"""Writing answers of text and pictures: requests in, events out."""

from weft.generation.engine import Engine, generate, slots_for
from weft.generation.events import (
    Answer,
    Event,
    Finished,
    ImageBegin,
    ImageReady,
    Reason,
    TextDelta,
    Usage,
    collect,
)
from weft.generation.sampling import Choice, SamplingConfig

__all__ = [
    "Answer", "Choice", "Engine", "Event", "Finished", "ImageBegin", "ImageReady", "Reason", "SamplingConfig",
    "TextDelta", "Usage", "collect", "generate", "slots_for",
]  # fmt: skip
