"""One turn at a time: what captures, traces or compiles passes changes state of the whole process."""

from __future__ import annotations

import threading

import torch

TURN = threading.RLock()  # torch's capturing is the process's, whichever engine asks, and so is its default dtype:
# compiled passes are compiled again under another one, which must not be within a capture


def settle(device: torch.device) -> None:
    """Wait for the device, but not while something is captured."""
    with TURN:
        torch.cuda.synchronize(device)


def give_back() -> None:
    """Cached memory to the driver, but not while something is captured."""
    with TURN:
        torch.cuda.empty_cache()
