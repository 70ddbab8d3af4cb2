"""Writing answers of text and pictures: requests in, events out."""

from weft.generation.beams import BeamConfig, Hypothesis, beam_search
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
    "Answer", "BeamConfig", "Choice", "Engine", "Event", "Finished", "Hypothesis", "ImageBegin", "ImageReady",
    "Reason", "SamplingConfig", "TextDelta", "Usage", "beam_search", "collect", "generate", "slots_for",
]  # fmt: skip
