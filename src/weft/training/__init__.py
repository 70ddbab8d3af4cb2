"""Teaching an adapter from illustrated documents: one loop, exact to resume."""

from weft.training.checkpoint import latest_whole
from weft.training.config import TrainConfig
from weft.training.interrupt import Interrupt, interruptible
from weft.training.job import Sampler, train
from weft.training.loop import StepReport, Training, build, steps
from weft.training.objective import Losses, Objective, evaluate_loss
from weft.training.plan import Plan, make_plan

__all__ = [
    "Interrupt", "Losses", "Objective", "Plan", "Sampler", "StepReport", "TrainConfig", "Training", "build",
    "evaluate_loss", "interruptible", "latest_whole", "make_plan", "steps", "train",
]  # fmt: skip
