"""A real kernel, driven as a notebook's front end drives it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .environments import ROOT


class CellFailed(AssertionError):
    """A cell raised; the text is its traceback."""


class Kernel:
    """A context. run(cell) → what it printed."""

    def __init__(self, python: Path, folder: Path, env: Mapping[str, str] | None = None) -> None:
        from jupyter_client.manager import KernelManager

        self._manager: Any = KernelManager(kernel_name="python3")
        self._manager.kernel_spec.argv[:] = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        self._folder = folder
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), "MEDUSA_SERVE_CACHE": str(folder / "cache"), **(env or {})}

    def __enter__(self) -> Kernel:
        self._manager.start_kernel(env=self._env, cwd=str(self._folder))
        self._client: Any = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=False)

    def run(self, cell: str, seconds: float = 90) -> str:
        """Raises CellFailed."""
        printed: list[str] = []
        failed: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                printed.append(content["text"])
            elif message["msg_type"] == "error":
                failed.append(re.sub(r"\x1b\[[\d;]*m", "", "\n".join(content["traceback"])))  # without colours

        self._client.execute_interactive(cell, timeout=seconds, output_hook=hear, allow_stdin=False)
        if failed:
            raise CellFailed("".join(printed) + failed[0])
        return "".join(printed)

    @property
    def pid(self) -> int:
        return int(self.run("import os; print(os.getpid())"))

    def kill(self) -> None:
        """As out of memory, or `kill -9`: no handler runs."""
        os.kill(self.pid, signal.SIGKILL)
