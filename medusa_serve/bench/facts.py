"""What every figure must carry: the machine, the versions, and the command that made it."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__

if TYPE_CHECKING:
    from ..llm import LLM


def facts() -> dict[str, str | None]:
    """machine(), the processor, and the versions of what is compared; None for what is not installed."""
    from ..model.weights.machine_cache import cpu_name

    try:
        llama = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        llama = None
    mine = {"cpu": cpu_name(), "cores": str(os.cpu_count()), "medusa_serve": __version__, "llama-cpp-python": llama}
    return {**machine(), **mine}


def command(module: str = "medusa_serve") -> str:
    """This process's command line for a shell, without API keys and the folders of paths on this machine. module: what
    `python -m` was called with"""
    words = list[str]()
    for before, word in itertools.pairwise(["", *sys.argv[1:]]):
        word = "KEY" if before == "--api-key" else re.sub(r"^--api-key=.*", "--api-key=KEY", word)
        words.append(re.sub(r"(^|=)/.*/(?=[^/])", r"\1", word))
    return shlex.join(["python", "-m", module, *words])


class Others:
    """How busy other processes keep the processor: they slow a measurement down, some contestants more than others."""

    def __init__(self) -> None:
        self._start = self._read()

    def cores(self) -> float | None:
        """On average since this was made; None where the kernel does not say."""
        now = self._read()
        if self._start is None or now is None:
            return None
        busy, own, clock = (after - before for before, after in zip(self._start, now, strict=True))
        return round(max(0.0, busy - own) / max(clock, 1e-9), 2)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds: of all processes, of this one, of the clock."""
        try:
            first = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
        except OSError:
            return None
        user, nice, system = map(int, first.split()[1:4])
        busy = (user + nice + system) / os.sysconf("SC_CLK_TCK")
        return busy, time.process_time(), time.perf_counter()


REST_S = 600.0  # a machine that has compiled nothing before takes minutes


def machine() -> dict[str, str]:
    """What a figure must carry."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        **versions,
    }


def rested(llm: LLM) -> LLM:
    """The same, once it has done what it leaves for idle time: nothing is compiled or captured while it is measured."""
    llm.manager.wait_until_rested(REST_S)
    return llm
