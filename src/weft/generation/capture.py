"""One decoding step over tensors that stay where they are, so that a GPU can replay it without Python.

A step's numbers are copied into a fixed buffer, and one function computes the step from there. Everything else that it
reads or writes (weights, caches, rings, grids, vectors) keeps its address as well. Steps of one `Kind` differ in
nothing but those numbers, so each kind is captured as one CUDA graph; elsewhere the function runs as it is.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Kind(NamedTuple):
    """What of a step is decided in Python."""

    width: int
    """Positions of the caches that are read."""
    text: bool
    """The head for text runs."""
    image: bool
    """That for pictures does."""
    guided: bool
    """Some row is led away from its shadows."""
    greedy: bool
    """No row draws."""


Compute = Callable[[Tensor, Kind], Tensor | None]
"""(B, WIDTH) numbers of a step on the device -> (B,) the element that each slot chooses, None where no head runs."""
Result = Tensor | None


class Recorder(Protocol):
    """Runs and captures steps on one device."""

    def warm_up(self, step: Callable[[], Result]) -> Result:
        """Run a step that is captured later."""
        ...

    def record(self, step: Callable[[], Result]) -> Callable[[], Result]:
        """Capture a step without running it; what is returned runs it."""
        ...


class StaticStep:
    """`compute` over a fixed buffer.

    Args:
        recorder: None: the steps are not captured.
    """

    def __init__(self, compute: Compute, numbers: Tensor, recorder: Recorder | None) -> None:
        self._compute, self._numbers, self._recorder = compute, numbers, recorder
        self._replays: dict[Kind, Callable[[], Result] | None] = {}

    def __call__(self, numbers: Tensor, kind: Kind) -> Result:
        """Run one step; its result holds until the next."""
        self._numbers.copy_(numbers)
        step = lambda: self._compute(self._numbers, kind)  # noqa: E731
        if self._recorder is None:
            return step()
        if kind not in self._replays:
            # The first of a kind is no rehearsal: partial sums of the adapters may be added once only.
            self._replays[kind] = None
            return self._recorder.warm_up(step)
        replay = self._replays[kind]
        if replay is None:
            replay = self._replays[kind] = self._recorder.record(step)
        return replay()


class CudaGraphs:
    """Records steps as CUDA graphs, which share their memory: only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Callable[[], Result]) -> Result:
        # as CUDA wants it: libraries set themselves up on another stream than the default one
        here = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            result = step()
        here.wait_stream(side)
        return result

    def record(self, step: Callable[[], Result]) -> Callable[[], Result]:
        graph = torch.cuda.CUDAGraph()
        # other threads of a server may use the device meanwhile
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = step()

        def replay() -> Result:
            graph.replay()
            return result

        return replay
