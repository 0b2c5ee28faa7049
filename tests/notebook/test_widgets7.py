"""The panel's tests once more, with the widgets and the kernel that Colab has: in a venv of their own, before ours."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLABS = ("ipywidgets==7.7.1", "ipykernel==6.17.1", "ipython==7.34.0", "jupyter_client==7.4.9", "pytest>=8")


@pytest.mark.matrix
def test_the_panel_with_colabs_widgets(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *COLABS], check=True, timeout=600)
    [site] = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the rest, after its own
    command = [python, "-c", "import ipywidgets, torch; print(ipywidgets.__version__)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "7.7.1"
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=",
        "tests/notebook/test_panel.py",
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout
