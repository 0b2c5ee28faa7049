"""An engine's states are one type: every reader knows each of them, and mypy refuses a word that is none."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from medusa_serve.engine.health import refuse_unless_ok
from medusa_serve.errors import Unavailable
from medusa_serve.types import EngineState, EngineStatus

PACKAGE = Path(__file__).parents[1] / "medusa_serve"
SNIPPET = """
from medusa_serve.notebook.server import Server
def asks(server: Server) -> bool:
    return server._llm().manager.status().state == "dead"
"""


@pytest.mark.parametrize("state", get_args(EngineState))
def test_sequences_are_taken_in_one_state_alone(state: EngineState) -> None:
    status = EngineStatus(state, 0, 0, 0.0, "So it is.")
    assert status.serves == (state in {"ok", "restarting"})
    if state == "ok":
        refuse_unless_ok(status)
    else:
        with pytest.raises(Unavailable):
            refuse_unless_ok(status)


def test_states_are_compared_where_mypy_checks_the_word() -> None:
    """It does not look into the tuple of an `in`."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "state":
                assert not isinstance(node.ops[0], ast.In | ast.NotIn), f"{path}:{node.lineno}"


@pytest.mark.slow
def test_mypy_refuses_a_state_that_no_engine_has(tmp_path: Path) -> None:
    """Also through the notebook's handle, where such a word once hid."""
    pytest.importorskip("mypy")
    (tmp_path / "asks.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", str(tmp_path / "asks.py")]
    out = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert "Non-overlapping equality check" in out.stdout, out.stdout
