"""Installing us in Colab replaces nothing that Colab brings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging", reason="pytest itself needs it")

from packaging.requirements import Requirement  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402

ROOT = Path(__file__).parents[2]
CONSTRAINTS = Path(__file__).with_name("colab-constraints.txt")
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w-]+)==([\w.+]+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.M)
}
NEVER = {"torch", "numpy", "ipywidgets", "ipython", "protobuf", "transformers", "ipykernel", "tornado"}


def wanted() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_what_colab_has_is_enough() -> None:
    assert {"torch", "numpy", "ipywidgets", "ipython"} <= set(PINS)
    for requirement in wanted():
        version = PINS.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), requirement


@pytest.mark.network
def test_pip_would_replace_nothing(tmp_path: Path) -> None:
    """pip's own resolver, for Colab's Python, with every pin as a constraint: what it would install besides the pins is
    new there, and protobuf is not among it."""
    report = tmp_path / "report.json"
    command = [
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"),
        *("--python-version", "3.13", "--implementation", "cp", "--only-binary", ":all:"),
        *("--target", str(tmp_path / "nowhere"), "--report", str(report)),
        *("-c", str(CONSTRAINTS), "-r", str(ROOT / "requirements.txt")),
    ]
    for platform in (*(f"manylinux_2_{n}_x86_64" for n in range(35, 16, -1)), "manylinux2014_x86_64"):
        command += ["--platform", platform]
    subprocess.run(command, check=True, timeout=600)
    made = {
        canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }
    assert {"pyngrok", "nbmake", "torch"} <= set(made)
    for name in NEVER & set(made):
        assert made[name] == PINS[name], name
    assert "protobuf" not in made
