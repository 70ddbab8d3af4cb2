"""Settings of a process whose threads must not wait long for each other."""

import gc
import sys

SWITCH_SECONDS = 0.0005


def make_quick() -> None:
    """So that who reads and writes for others does not wait for what else this process does."""
    # for the thread that has the interpreter, several times for each message
    sys.setswitchinterval(SWITCH_SECONDS)
    # for the garbage collector: what was imported and loaded stays, and takes most of a second to look through
    gc.collect()
    gc.freeze()
