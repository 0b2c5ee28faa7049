"""One turn at a time: capturing, tracing and compiling passes change state that the process shares."""

from __future__ import annotations

import threading

import torch

TURN = threading.RLock()  # all engines of a process share torch's capture and its default dtype;
# another default dtype makes compiled passes compile again, which must not happen within a capture


def settle(device: torch.device) -> None:
    """Wait for the device, but not while something is captured."""
    with TURN:
        torch.cuda.synchronize(device)


def give_back() -> None:
    """Return cached memory to the driver, but not while something is captured."""
    with TURN:
        torch.cuda.empty_cache()
