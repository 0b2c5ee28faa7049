"""The notebooks' files: what is in them, and that their first cell finds the package wherever it was put."""

from __future__ import annotations

import ast
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from medusa_serve.notebook import env

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = runpy.run_path(str(ROOT / ".ci/address.py"), run_name="address")
IN_PLACE = 'if "medusa_serve" not in sys.modules and (roots[0] / "requirements.txt").is_file():'
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["01_serve", "02_train_heads", "03_benchmark"]
    assert len(code(NOTEBOOKS[0])) <= 8


@named
def test_nothing_is_stored_and_a_t4_is_asked_for(path: Path) -> None:
    notebook = read(path)
    assert notebook["metadata"]["accelerator"] == "GPU"
    assert notebook["metadata"]["colab"]["gpuType"] == "T4"
    assert notebook["metadata"]["colab"]["private_outputs"] is True
    assert "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@named
def test_cells_define_nothing(path: Path) -> None:
    for source in code(path):
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        plain = "\n".join(line for line in lines)
        plain = plain.replace('if REPOSITORY and not list(here.glob("*.zip")):', "if True: pass")
        plain = plain.replace(IN_PLACE, "if True: pass")
        for node in ast.walk(ast.parse(plain)):
            assert not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda))


@named
def test_smoke_shrinks_sizes_alone(path: Path) -> None:
    for source in code(path):
        assert "MEDUSA_SMOKE" not in source  # it is asked by `size` alone, which gives a number


def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDUSA_SMOKE", raising=False)
    assert env.size(100, smoke=3) == 100
    monkeypatch.setenv("MEDUSA_SMOKE", "1")
    assert env.size(100, smoke=3) == 3


# ---- the address ---------------------------------------------------------------------------------------------------


def test_the_address_stands_where_it_is_used() -> None:
    assert subprocess.run([sys.executable, ".ci/address.py", "--check"], cwd=ROOT).returncode == 0


def test_an_address_is_written_everywhere_and_taken_back() -> None:
    url = ADDRESS["address"]('x\nURL = "https://github.com/someone/medusa_serve.git"\n')
    assert url == "https://github.com/someone/medusa_serve"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = ADDRESS["readme"](readme, url)
    assert "colab-badge.svg" in text
    assert "colab.research.google.com/github/someone/medusa_serve/blob/main/notebooks/01_serve.ipynb" in text
    assert f"git+{url}" in text
    assert "not set yet" not in text
    assert "badge.svg" not in ADDRESS["readme"](text, "")
    assert "is not set yet" in ADDRESS["readme"](text, "")
    notebook = NOTEBOOKS[0].read_text(encoding="utf-8")
    assert f'REPOSITORY = \\"{url}\\"' in ADDRESS["notebook"](notebook, url)
    assert ADDRESS["notebook"](ADDRESS["notebook"](notebook, url), ADDRESS["address"]('URL = ""')) == ADDRESS[
        "notebook"
    ](notebook, "")
    assert "colab-badge" not in ADDRESS["block"]("https://git.example.org/medusa_serve")
    for wrong in ('URL = "somewhere"', "url = 1"):
        with pytest.raises(ValueError, match=r"setup\.py"):
            ADDRESS["address"](wrong)


# ---- the first cell ------------------------------------------------------------------------------------------------


def test_the_first_cells_are_one() -> None:
    assert len({code(path)[0] for path in NOTEBOOKS}) == 1


def package(into: Path, *, requirements: bool = False) -> Path:
    """A repository of ours, but small: the cell looks for a file and has the requirements installed."""
    (into / "medusa_serve").mkdir(parents=True)
    (into / "medusa_serve/__init__.py").write_text('__version__ = "found"\n')
    if requirements:
        (into / "requirements.txt").write_text("pytest>=8\n")
    return into


def first_cell(folder: Path, *, repository: str = "") -> subprocess.CompletedProcess[str]:
    """Run it in IPython in `folder`, twice, and import the package. pip finds all there, and has no index."""
    cell = code(NOTEBOOKS[0])[0].replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    (folder / "cell.ipy").write_text(f"{cell}\n")
    program = (
        "from IPython.core.interactiveshell import InteractiveShell as Shell; s = Shell()\n"
        "cell = open('cell.ipy').read()\n"
        "for _ in range(2): result = s.run_cell(cell)\n"
        "result.raise_error(); import medusa_serve, sys\n"
        "print(medusa_serve.__version__, medusa_serve.__file__, sum('medusa' in p for p in sys.path))"
    )
    environment = os.environ | {"PIP_NO_INDEX": "1", "IPYTHONDIR": str(folder / ".ipython")}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.parametrize("how", ["checkout", "folder", "package", "zip", "kaggle", "kaggle, by owner", "clone"])
def test_the_package_is_found(how: str, tmp_path: Path) -> None:
    """A checkout (parent folder), an uploaded folder (of the repository, or the package alone), a zip as code hosts
    make them, a data set of Kaggle's, and a clone of the address."""
    pytest.importorskip("IPython")
    home, repository = tmp_path / "work/notebooks", ""
    home.mkdir(parents=True)
    if how == "checkout":
        package(home.parent, requirements=True)
    elif how == "folder":
        package(home / "my-medusa")
    elif how == "package":
        package(home)
    elif how.startswith("kaggle"):
        package(
            home.parent / ("input/medusa" if how == "kaggle" else "input/datasets/somebody/medusa/medusa_serve-main")
        )
    else:
        made = package(tmp_path / "medusa_serve-main")
        if how == "zip":
            with zipfile.ZipFile(home / "medusa_serve-main.zip", "w") as archive:
                for path in made.rglob("*"):
                    archive.write(path, path.relative_to(tmp_path))
        else:
            if shutil.which("git") is None:
                pytest.skip("a clone needs git")
            git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(made)]
            for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
                subprocess.run([*git, *command], check=True)
            repository = made.as_uri()
    ran = first_cell(home, repository=repository)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    version, file, _ = ran.stdout.splitlines()[-1].split()
    assert version == "found"
    assert Path(file).is_relative_to(tmp_path)


def test_a_package_that_is_nowhere_is_said(tmp_path: Path) -> None:
    pytest.importorskip("IPython")
    (tmp_path / "notebooks").mkdir()
    ran = first_cell(tmp_path / "notebooks")
    assert ran.returncode != 0
    assert "upload its folder or a zip of it, then run this cell again" in ran.stdout + ran.stderr


# ---- places --------------------------------------------------------------------------------------------------------


def test_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("COLAB_", "KAGGLE_"))]:
        monkeypatch.delenv(name)
    assert env.place() == "python"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert env.place() == "python"  # a stray variable alone is no Colab
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    assert env.place() == "colab"
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert env.place() == "kaggle"
    assert env.keep_in() == Path("/kaggle/working")


def test_kaggle_without_internet_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.advice() == ""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(env, "online", lambda: False)
    assert "turn it on in its settings" in env.advice()
    monkeypatch.setattr(env, "online", lambda: True)
    assert env.advice() == ""


def test_online() -> None:
    assert not env.online("no-such-host.invalid", 0.5)
