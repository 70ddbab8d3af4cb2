"""When something was computed, as autograd counts: what a backward reads again must not be newer than its forward."""

import torch


def autograd_time() -> int:
    """How many nodes autograd has made on this thread; within backward, when the node that runs was made."""
    node = torch._C._current_autograd_node()
    return torch.autograd._get_sequence_nr() if node is None else node._sequence_nr()


def in_backward_of_earlier(time: int) -> bool:
    """The node that runs was made before `time`."""
    node = torch._C._current_autograd_node()
    return node is not None and node._sequence_nr() < time
