"""Lines of code by room. Exit code 1 where a room is over its budget, or a file or a function is too long.

python .ci/budgets.py

A later feature raises the budget of the room that it needs, here, in the commit that adds it, which says why.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# a folder with everything in it; "…/*": the files right in it. What the rooms have today: the goal of "The house" is
# 25,500 for the package and 11,600 for model/, and a room never grows without a feature that pays for it here.
BUDGETS = {
    "medusa_serve": 27_530,
    "medusa_serve/*": 1_140,
    "medusa_serve/commands": 830,
    "medusa_serve/server": 3_300,
    "medusa_serve/cluster": 740,
    "medusa_serve/engine": 1_750,
    "medusa_serve/model": 13_100,
    "medusa_serve/model/*": 1_660,
    "medusa_serve/model/loading": 1_550,
    "medusa_serve/model/weights": 640,
    "medusa_serve/model/forward": 1_490,
    "medusa_serve/model/sampling": 370,
    "medusa_serve/model/drafting": 2_170,
    "medusa_serve/model/cpu": 3_480,
    "medusa_serve/model/gpu": 1_760,
    "medusa_serve/training": 2_510,
    "medusa_serve/notebook": 2_150,
    "medusa_serve/bench": 2_050,
    "tests/campaigns": 3_710,
    "tests": 27_840,
}
FILE_LINES, FUNCTION_LINES = 400, 60
CHECKED = ("medusa_serve", "tests/campaigns")  # the trees that must keep these two
COMPILED = {"njit", "jit", "cfunc", "intrinsic", "register_jitable"}  # decorators of kernels, which may be longer


def main(root: Path = ROOT, budgets: Mapping[str, int] = BUDGETS) -> int:
    """Print a line for each room, then what is wrong."""
    for room, budget in budgets.items():
        print(f"{lines_of(root, room):6} of {budget:6} lines  {room}")
    wrong = [*over_budget(root, budgets), *without_budget(root, budgets), *too_long(root)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


def files_of(root: Path, room: str) -> list[Path]:
    if room.endswith("/*"):
        return sorted((root / room.removesuffix("/*")).glob("*.py"))
    return sorted((root / room).rglob("*.py"))


def lines_of(root: Path, room: str) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files_of(root, room))


def over_budget(root: Path, budgets: Mapping[str, int]) -> Iterator[str]:
    for room, budget in budgets.items():
        found = lines_of(root, room)
        if found > budget:
            yield f"{room}: {found} lines, {found - budget} over its budget of {budget}"


def without_budget(root: Path, budgets: Mapping[str, int]) -> Iterator[str]:
    """Folders that have no budget although the files next to them have one."""
    for room in budgets:
        if room.endswith("/*"):
            folders = {path.parent for path in (root / room.removesuffix("/*")).glob("*/*.py")}
            names = [folder.relative_to(root).as_posix() for folder in sorted(folders)]
            yield from (f"{name}: it has no budget" for name in names if name not in budgets)


def too_long(root: Path) -> Iterator[str]:
    for path in [path for tree in CHECKED for path in files_of(root, tree)]:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        count = len(text.splitlines())
        if count > FILE_LINES:
            yield f"{name}: {count} lines, more than {FILE_LINES}"
        for function in functions(ast.parse(text)):
            count = (function.end_lineno or 0) - function.lineno + 1
            if count > FUNCTION_LINES:
                yield f"{name}: {function.name} has {count} lines, more than {FUNCTION_LINES}"


def functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All below `node`, without kernels and what is in them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if any(_name(decorator) in COMPILED for decorator in child.decorator_list):
                continue
            yield child
        yield from functions(child)


def _name(decorator: ast.expr) -> str:
    """`jit` of `@triton.jit(…)`."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


if __name__ == "__main__":
    sys.exit(main())
