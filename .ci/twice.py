"""Copies of the notebooks for nbmake, in the folder argv[1]: all cells, checks, all cells again, checks again.

The checks are tests/notebook/checks/: they run in the notebook's own kernel and see its variables. The cells stay as
they are. Whatever the notebooks write lands in that folder.
"""

import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
CHECKS = ROOT / "tests/notebook/checks"


def twice(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    checks = [(CHECKS / name).read_text(encoding="utf-8") for name in ("every.py", f"{path.stem}.py")]
    notebook.cells = []
    for number in (1, 2):
        notebook.cells += [nbformat.v4.new_code_cell(cell.source) for cell in cells]
        notebook.cells += [nbformat.v4.new_code_cell(check) for check in (f"PASS = {number}", *checks)]
    return notebook


def main(out: Path) -> None:
    (out / "notebooks").mkdir(parents=True)
    for name in ("medusa_serve", "requirements.txt"):  # a checkout, as the first cell looks for it
        (out / name).symlink_to(ROOT / name)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        nbformat.write(twice(path), out / "notebooks" / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
