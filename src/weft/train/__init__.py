"""Teaching an adapter from illustrated documents: one loop, exact to resume."""

from weft.train.checkpoint import latest_whole
from weft.train.config import TrainConfig
from weft.train.interrupt import Interrupt, interruptible
from weft.train.job import Sampler, train
from weft.train.loop import StepReport, Training, build, steps
from weft.train.objective import Losses, Objective, evaluate_loss
from weft.train.plan import Plan, make_plan

__all__ = [
    "Interrupt", "Losses", "Objective", "Plan", "Sampler", "StepReport", "TrainConfig", "Training", "build",
    "evaluate_loss", "interruptible", "latest_whole", "make_plan", "steps", "train",
]  # fmt: skip
