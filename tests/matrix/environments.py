"""The environments of the kernel matrix, made when first asked for and kept where MEDUSA_MATRIX_DIR says.

One base a Python holds torch and what requirements.txt names (this very environment, where its Python is the one);
a kernel's environment lies over it and holds its ipykernel, with what goes with that.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"  # the README's
KERNELS = {
    # what Colab had on 2026-08-19
    "6": ["ipykernel==6.17.1", "ipython==7.34.0", "jupyter_client==7.4.9", "ipywidgets==7.7.1", "setuptools<81"],
    "7": ["ipykernel>=7,<8", "ipywidgets>=8.1,<9"],
}
NESTED = ["nest-asyncio>=1.6", "nest-asyncio2>=1.7"]


def environment(folder: Path, python: str, kernel: str) -> Path:
    """The Python of the environment of that kernel. Fails the test where it cannot be had."""
    home = folder / f"py{python}-ipykernel{kernel}"
    program = home / "bin" / "python"
    interpreter, packages = _base(folder, python)
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        _run([str(interpreter), "-m", "venv", str(home)])
        [own] = home.glob("lib/python*/site-packages")
        (own / "base.pth").write_text(f"{packages}\n")  # after its own: what stands in both is taken from here
        _run([str(program), "-m", "pip", "install", "-q", *KERNELS[kernel], *NESTED])
        (home / "complete").touch()
    return program


def _base(folder: Path, python: str) -> tuple[Path, Path]:
    """(interpreter, its site-packages with everything but a kernel)"""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == python:
        return Path(sys.executable), Path(sysconfig.get_path("purelib"))
    home = folder / f"py{python}"
    program, complete = home / "bin" / "python", home / "complete"
    wanted = f"{TORCH}\n{(ROOT / 'requirements.txt').read_text()}"
    if not complete.exists() or complete.read_text() != wanted:
        if not program.exists():
            _run([str(_interpreter(python)), "-m", "venv", str(home)])
        _run([str(program), "-m", "pip", "install", "-q", TORCH, "-r", str(ROOT / "requirements.txt")])
        complete.write_text(wanted)
    return program, next(home.glob("lib/python*/site-packages"))


def _interpreter(python: str) -> Path:
    on_path = shutil.which(f"python{python}")
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{python}.*/bin/python"))
    for found in ([Path(on_path)] if on_path else []) + pyenv:
        if (
            subprocess.run([str(found), "-c", "import venv"], capture_output=True).returncode == 0
        ):  # pyenv's shims may not
            return found
    pytest.fail(f"There is no Python {python} on PATH or in ~/.pyenv: install one, then run this again.")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} failed: {done.stderr[-1000:]}")
