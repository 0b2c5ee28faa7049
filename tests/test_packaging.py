"""What is promised of the files around the package: README, requirements, setup.py, pyproject, LICENSE."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_imports import ALLOWED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# import name → name in requirements.txt, where they differ
DISTRIBUTIONS = {
    "nest_asyncio": "nest-asyncio",
    "nest_asyncio2": "nest-asyncio",
    "pydantic_core": "pydantic",
    "prometheus_client": "prometheus-client",
}
OPTIONAL = {
    "aiohttp",
    "yarl",
    "accelerate",
    "bitsandbytes",
    "ray",
    "IPython",
    "google",
    "kaggle_secrets",
    "datasets",
    "triton",
}  # used where they are


def section(title: str) -> str:
    """Text below a heading of the README up to the next one of any level."""
    _, _, rest = README.partition(f"\n### {title}\n")
    assert rest, title
    return re.split(r"\n#{2,3} ", rest)[0]


def commands(text: str) -> list[str]:
    return [line for code in re.findall(r"```(?:bash|python)\n(.*?)```", text, re.S) for line in code.splitlines()]


def requirements(part: str) -> list[str]:
    text = (ROOT / "requirements.txt").read_text()
    runtime, tests = text.split("# runtime", 1)[1].split("# tests", 1)
    lines = {"runtime": runtime, "tests": tests}[part].splitlines()[1:]
    return [line for line in lines if line]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~ \[]", requirement)[0]


def test_the_own_machine_block_pins_torch_and_serves_and_tests() -> None:
    serve, test = commands(section("Your own machine"))
    for line in (serve, test):
        assert "python3 -m venv" in line
        assert "pip install torch==2.13.0 -r requirements.txt" in line
    assert serve.endswith("&& python -m medusa_serve")
    assert "[test]" in test
    assert test.endswith("&& python -m pytest -n 2 --dist loadfile")


def test_the_colab_block_never_names_torch() -> None:
    text = section("Colab/Kaggle")
    assert "torch" not in text.lower()
    [line] = commands(text)
    assert line.startswith("%pip install")
    assert line.endswith("-r requirements.txt")
    assert not re.search(r"--upgrade|-U\b|--force-reinstall|==", line)


def test_the_readme_is_short_and_its_options_exist() -> None:
    assert len(README.splitlines()) <= 200
    out = [
        subprocess.run(
            [sys.executable, "-m", "medusa_serve", command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in ("serve", "generate")
    ]
    table = README.split("## Options", 1)[1].split("\n## ", 1)[0]
    for option in set(re.findall(r"(?<!-)--[a-z][a-z-]+", table)):
        assert option in out[0] + out[1], option


def test_the_readmes_rooms_are_the_folders_and_imports_point_down_them() -> None:
    table = README.split("## Rooms", 1)[1].split("\n## ", 1)[0]
    rooms = re.findall(r"^\| `(\w+)/`", table, re.M)
    folders = {path.parent.name for path in (ROOT / "medusa_serve").glob("*/__init__.py")}
    assert set(rooms) == folders | {"medusa_serve", "tests"}
    for room in folders:
        assert not ALLOWED[room] & set(rooms[: rooms.index(room)])


def test_requirements_are_lower_bounds_that_colab_meets() -> None:
    lines = [*requirements("runtime"), *requirements("tests")]
    for line in lines:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", line), line
    # Colab of August 2026 and Kaggle (an image three months older): what must not be replaced there
    oldest = {"torch": (2, 10, 0), "numpy": (2, 0, 2), "ipywidgets": (7, 7, 1)}
    for line in lines:
        name, bound = line.split(">=")
        if name in oldest:
            assert tuple(map(int, bound.split("."))) <= oldest[name], line
    assert {"pytest", "nbmake", "matplotlib"} == {name_of(line) for line in requirements("tests")}


def test_every_import_of_the_package_is_required() -> None:
    known = {name_of(line) for line in requirements("runtime")} | {"medusa_serve"} | OPTIONAL | sys.stdlib_module_names
    for path in (ROOT / "medusa_serve").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names}:
                assert DISTRIBUTIONS.get(name, name) in known, f"{path}: {name}"


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The arguments of setup(), by running setup.py with it replaced."""
    pytest.importorskip("setuptools")
    program = (
        "import json, runpy, setuptools; seen = {}\n"
        "setuptools.setup = seen.update\n"
        "setuptools.setup = lambda **arguments: seen.update(arguments)\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
        "import sys; assert 'medusa_serve' not in sys.modules and 'torch' not in sys.modules\n"
        "print(json.dumps(seen))"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


def test_setup(metadata: dict[str, object]) -> None:
    import medusa_serve

    assert metadata["name"] == "medusa_serve"
    assert metadata["version"] == medusa_serve.__version__
    assert metadata["python_requires"] == ">=3.11"
    assert metadata["install_requires"] == requirements("runtime")
    assert isinstance(metadata["url"], str)  # tests/notebook/test_notebooks.py holds it to where it is used
    assert metadata["entry_points"] == {"console_scripts": ["medusa-serve=medusa_serve.cli:main"]}
    extras = metadata["extras_require"]
    assert isinstance(extras, dict)
    assert {name_of(line) for line in extras["test"]} >= {"httpx", "hypothesis", "openai", "pytest", "nbmake"}
    packages = metadata["packages"]
    assert isinstance(packages, list)
    folders = {path.parent for path in (ROOT / "medusa_serve").rglob("*.py")}
    assert sorted(packages) == sorted(str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders)


def test_every_folder_is_a_package() -> None:
    for top in ("medusa_serve", "tests"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path.parent


def test_pyproject_holds_tools_only() -> None:
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"tool"}


def test_license() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Copyright 2026 The medusa_serve authors" in text
    assert "END OF TERMS AND CONDITIONS" in text


# ---- budgets of lines --------------------------------------------------------------------------------------------

SMALL = {"medusa_serve": 30, "medusa_serve/*": 10, "medusa_serve/a": 20, "tests/campaigns": 500}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Within the budgets SMALL."""
    for name, lines in (("medusa_serve/top.py", 10), ("medusa_serve/a/b/c.py", 20), ("tests/campaigns/d.py", 400)):
        write(tmp_path / name, "x = 1\n" * lines)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def body(lines: int, head: str = "def f():") -> str:
    return head + "\n" + "    x = 1\n" * lines


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "medusa_serve/a/e.py",
            "\n",
            ["medusa_serve: 31 lines, 1 over", "medusa_serve/a: 21 lines, 1 over its budget of 20"],
        ),
        ("medusa_serve/f.py", "\n", ["medusa_serve: 31 lines", "medusa_serve/*: 11 lines"]),
        ("medusa_serve/g/h.py", "", ["medusa_serve/g: it has no budget"]),
        ("tests/campaigns/d.py", "\n" * 401, ["tests/campaigns/d.py: 401 lines, more than 400"]),
        ("tests/campaigns/i.py", body(60), ["tests/campaigns/i.py: f has 61 lines, more than 60"]),
        ("tests/campaigns/i.py", body(60, "class A:\n async def g():"), ["tests/campaigns/i.py: g has 61 lines"]),
        ("tests/campaigns/i.py", body(59), []),
        ("tests/campaigns/i.py", body(60, "@njit(cache=True)\ndef f():"), []),
        ("tests/campaigns/i.py", body(60, "@triton.jit\ndef f():\n  def g():"), []),
        ("tests/campaigns/j/k.py", "\n" * 101, ["tests/campaigns: 501 lines, 1 over its budget of 500"]),
    ],
)
def test_a_room_over_its_budget_fails(
    name: str, text: str, says: list[str], tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / ".ci/budgets.py"))["main"]
    assert main(tree, SMALL) == 0
    assert capsys.readouterr().out.splitlines()[2] == "    20 of     20 lines  medusa_serve/a"
    write(tree / name, text)
    assert main(tree, SMALL) == (1 if says else 0)
    found = capsys.readouterr().out.splitlines()[len(SMALL) :]
    assert len(found) == len(says)
    assert all(line.startswith(said) for line, said in zip(found, says, strict=True))


def test_every_room_has_a_budget_and_the_run_asks_for_it() -> None:
    budgets = runpy.run_path(str(ROOT / ".ci/budgets.py"))
    assert not list(budgets["without_budget"](ROOT, budgets["BUDGETS"]))
    assert all(budgets["files_of"](ROOT, room) for room in budgets["BUDGETS"])
    assert "python .ci/budgets.py" in (ROOT / ".ci/run").read_text()


def test_nothing_large_is_tracked() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        path = ROOT / name
        assert not path.exists() or path.stat().st_size <= 20 << 20, name
