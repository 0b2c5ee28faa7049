"""What schemathesis makes of the OpenAPI page: requests that fit it and that do not, all its checks, nothing filtered
out. `python -m pytest -m server tests/server/test_schemathesis.py`; with `-m slow` more, and chains of requests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from medusa_serve.server.config import ServerConfig

from ..fakes import FakeRunner
from .standins import serving
from .test_engine import fake_llm

pytest.importorskip("schemathesis", reason="pip install -e '.[test]'")
pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

KEY = "the-key"
EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "200"))  # of each operation


def schemathesis(folder: Path, examples: int, phases: str) -> str:
    """What it prints. Answers are short; context and vocabulary hold anything, as whether it fits is no matter of the
    schema. Wrong keys are not counted: it sends hundreds, to see that each is refused."""
    runner = FakeRunner(num_slots=8, accept=(0, 2), vocab_size=10**9, max_context=2**31 + 2**24, reply=(258, 259, 260))
    config = ServerConfig(port=0, api_key=KEY, wrong_keys_per_minute=10**6, drain_s=0.5)
    with fake_llm(runner) as llm, serving(llm, config) as url:
        program = str(Path(sys.executable).with_name("schemathesis"))
        command = [program, "run", f"{url}/openapi.json", "-H", f"X-API-Key: {KEY}", "--mode", "all"]
        command += ["--checks", "all", "--max-examples", str(examples), "--phases", phases, "--seed", "1", "--no-color"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=3600)
        assert llm.manager.status().state == "ok"
        assert llm.manager.metrics.snapshot()["outcomes"]["error"] == 0
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    return done.stdout


def check(out: str, examples: int) -> None:
    """Nothing was left out: all operations, both modes, and as many requests as were asked for."""
    selected, total = map(int, re.findall(r"Selected: (\d+)/(\d+)", out)[0])
    assert selected == total >= 10
    assert not re.search(r"[Ww]arning", out), out
    generated = int(re.findall(r"(\d+) generated", out.replace(",", ""))[0])
    assert generated >= examples * 5  # operations with nothing to vary have fewer than the ones with bodies


@pytest.mark.server
def test_two_hundred_of_each_operation(tmp_path: Path) -> None:
    check(schemathesis(tmp_path, EXAMPLES, "examples,coverage,fuzzing"), EXAMPLES)


@pytest.mark.slow
def test_a_thousand_of_each_operation(tmp_path: Path) -> None:
    check(schemathesis(tmp_path, 1000, "examples,coverage,fuzzing,stateful"), 1000)
