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


# ---- the rooms of model/ --------------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """All modules that a file imports, of this package and others: inside functions and for type checking, too."""
    package = module_of(path) if path.stem == "__init__" else module_of(path).rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else module for name in names}
    return found


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}
MACHINES = ("medusa_serve.model.cpu", "medusa_serve.model.gpu")
MAY_LOOK = {"medusa_serve.model.kernels", "medusa_serve.model.build"}


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@pytest.mark.parametrize(
    ("library", "room"), [("numba", MACHINES[0]), ("llvmlite", MACHINES[0]), ("triton", MACHINES[1])]
)
def test_a_library_of_one_machine_stays_in_its_room(library: str, room: str) -> None:
    users = {name for name, imported in IMPORTS.items() if any(is_in(module, library) for module in imported)}
    assert users
    assert {name for name in users if not is_in(name, room)} == set()


def test_cuda_graphs_are_in_gpu_alone() -> None:
    users = {
        name for name, path in MODULES.items() if "CUDAGraph" in path.read_text() or "cuda.graph" in path.read_text()
    }
    assert users
    assert {name for name in users if not is_in(name, MACHINES[1])} == set()


def test_nobody_but_kernels_and_build_looks_into_a_machine() -> None:
    """And neither machine into the other."""
    for name, imported in IMPORTS.items():
        for room in MACHINES:
            if not is_in(name, room) and name not in MAY_LOOK:
                assert not {module for module in imported if is_in(module, room)}, name


def test_no_import_goes_in_a_circle() -> None:
    left = {
        name: {module for module in imported if module in MODULES and module != name}
        for name, imported in IMPORTS.items()
    }
    while True:
        ends = {name for name, imported in left.items() if not imported}
        if not ends:
            break
        left = {name: imported - ends for name, imported in left.items() if name not in ends}
    # what is left is in a circle, or leads to one
    inside = {name for name in left if any(name in imported for imported in left.values())}
    assert inside == set()


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
