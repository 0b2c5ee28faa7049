"""Loops in cells: which library is taken, and that `asyncio.run` then works under a running loop."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from medusa_serve.errors import InvalidConfig
from medusa_serve.notebook import nested_loop as loops

ROOT = Path(__file__).parents[2]
BOTH = {"nest_asyncio", "nest_asyncio2"}


@pytest.mark.parametrize(
    ("there", "version", "applied", "taken"),
    [
        (BOTH, (3, 13), None, "nest_asyncio2"),
        ({"nest_asyncio"}, (3, 13), None, "nest_asyncio"),
        (BOTH, (3, 13), "nest_asyncio", "nest_asyncio"),
        (BOTH, (3, 13), "nest_asyncio2", "nest_asyncio2"),
        (BOTH, (3, 14), None, "nest_asyncio2"),
        ({"nest_asyncio"}, (3, 14), None, None),
        (set(), (3, 11), None, None),
    ],
)
def test_which_is_taken(
    there: set[str], version: tuple[int, int], applied: str | None, taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> Any:
        if name not in there:
            raise ImportError(name)
        return name

    monkeypatch.setattr(importlib, "import_module", find)
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    if applied:
        monkeypatch.setattr(asyncio, "_nest_patched", True, raising=False)
    if applied == "nest_asyncio2":
        monkeypatch.setattr(asyncio, "_nest_asyncio2", object(), raising=False)
    if taken is None:
        with pytest.raises(InvalidConfig, match="pip install nest-asyncio2"):
            loops._module()
    else:
        assert loops._module() == taken


def test_a_loop_under_a_running_loop() -> None:
    program = """
        import asyncio
        from medusa_serve import allow_nested_loop

        async def inner(): await asyncio.sleep(0.01); return 5
        async def cell():
            try:
                asyncio.run(asyncio.sleep(0))
            except RuntimeError:
                pass
            else:
                raise SystemExit("a running loop was expected to refuse")
            allow_nested_loop(); allow_nested_loop()
            return asyncio.run(inner())

        assert asyncio.new_event_loop().run_until_complete(cell()) == 5
        print("nested")
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "nested\n"
