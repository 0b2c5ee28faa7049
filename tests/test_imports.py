"""Imports point down only, and importing the package, its command line or its server needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "medusa_serve"
BASE = {"config", "types", "errors", "presets"}
# room → rooms it may import (itself and BASE always)
ALLOWED = {
    **{name: set() for name in BASE},
    "model": set(),
    "engine": {"model"},
    "llm": {"model", "engine"},
    "server": {"engine"},
    "cluster": {"server", "engine", "llm"},  # a replica starts from a config
    "training": {"model", "engine"},
    "notebook": {"server", "engine", "model", "llm", "training", "bench"},
    "bench": {"server", "engine", "model", "llm", "training"},
    "commands": {"bench", "cluster", "server", "engine", "model", "llm", "training"},
    "cli": {"commands"},
    "build_compiled": {"model", "llm"},
    "__main__": {"cli"},
}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> set[str]:
    """Rooms of this package that a file imports anywhere, lazily included."""
    here = ["medusa_serve", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("medusa_serve.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    assert rooms_imported(path) <= ALLOWED[room] | BASE | {room}


def test_only_model_training_and_bench_import_torch() -> None:
    for path in FILES:
        if room_of(path) in ("model", "training", "bench", "commands"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"torch", "transformers", "safetensors"}, path


def loaded_after(code: str) -> tuple[set[str], float]:
    """(modules, seconds) of a fresh interpreter that runs `code`."""
    program = f"import time; t = time.perf_counter()\n{code}\nt = time.perf_counter() - t\n"
    program += "import sys; print(t); print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    return set(out[1].split()), float(out[0])


HEAVY = {"torch", "transformers", "safetensors", "huggingface_hub", "gguf", "tokenizers"}


def test_importing_the_package_is_quick() -> None:
    seconds = []
    for _ in range(3):  # the best of three: a busy machine is not our doing
        modules, took = loaded_after("import medusa_serve; medusa_serve.SamplingParams; medusa_serve.EngineConfig")
        assert not modules & (HEAVY | {"numpy", "fastapi", "uvicorn"})
        seconds.append(took)
    assert min(seconds) < 0.2


@pytest.mark.parametrize("module", ["cli", "llm", "engine.batch_manager", "server.app", "server.listen"])
def test_no_torch_at_import(module: str) -> None:
    modules, _ = loaded_after(f"import medusa_serve.{module}")
    assert not modules & HEAVY


@pytest.mark.parametrize(("command", "mine"), [("serve", "serve"), ("generate", "generate"), ("bench", "bench")])
def test_a_command_is_imported_when_it_is_asked_for(command: str, mine: str) -> None:
    """The nonsense option ends it before it runs."""
    call = f"from medusa_serve import cli\ntry:\n  cli.main(['{command}', '--nosuch'])\nexcept SystemExit: pass"
    modules, _ = loaded_after(call)
    commands = {name.removeprefix("medusa_serve.commands.") for name in modules if "serve.commands." in name}
    assert commands == {mine, "options"}
    rooms = {name.split(".")[1] for name in modules if name.startswith("medusa_serve.")}
    assert not rooms & {"model", "training", "notebook", "cluster"}
    assert ("bench" in rooms) == (command == "bench")


def test_public_names_are_there() -> None:
    import medusa_serve

    for name in medusa_serve.__all__:
        assert getattr(medusa_serve, name) is not None
    with pytest.raises(AttributeError, match="nosuch"):
        _ = medusa_serve.nosuch
