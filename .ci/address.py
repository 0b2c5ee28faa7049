"""Write the repository's address, `URL` in setup.py, to where it is used: the notebooks' first cells and the README.

python .ci/address.py           after the owner has set it
python .ci/address.py --check   exit code 1 where something else is written there
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- address -->\n", "<!-- end of address -->\n"
NONE = (
    "The repository's address is not set yet (`URL` in `setup.py`), so there is no badge. Make a zip of this folder:\n"
    "`git archive -o medusa_serve.zip HEAD`. In Colab: *File, Upload notebook*, `notebooks/01_serve.ipynb`; then the\n"
    "zip into *Files* at the left. In Kaggle: *File, Import Notebook*; the zip by *Add Input, Upload*. *Run all*.\n"
)
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
COLAB = "https://colab.research.google.com/github"


def address(setup: str) -> str:
    """Of setup.py's text. Raises ValueError for what is no https address."""
    found = re.search(r'^URL = "([^"]*)"$', setup, re.M)
    if found is None:
        raise ValueError('setup.py has no line URL = "…".')
    url = found[1].removesuffix("/").removesuffix(".git")
    if url and not re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+", url):
        raise ValueError(f"URL in setup.py is no https address of a repository: {url!r}.")
    return url


def notebook(text: str, url: str) -> str:
    """Its text with the address in the first cell that asks for it."""
    cells = json.loads(text)
    for cell in cells["cells"]:
        cell["source"] = [re.sub(r'^REPOSITORY = "[^"]*"', f'REPOSITORY = "{url}"', line) for line in cell["source"]]
    return json.dumps(cells, indent=1, ensure_ascii=False) + "\n"


def readme(text: str, url: str) -> str:
    """Its text with the block between the marks for this address."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + block(url) + END + rest.split(END)[1]


def block(url: str) -> str:
    if not url:
        return NONE
    lines = [f"`%pip install -q git+{url}` in a cell, or open `notebooks/01_serve.ipynb` and *Run all*."]
    if url.startswith("https://github.com/"):
        page = COLAB + url.removeprefix("https://github.com") + "/blob/main/notebooks/01_serve.ipynb"
        lines.insert(0, f"[![Open In Colab]({BADGE})]({page})")
    return "\n".join(lines) + "\n"


def main() -> int:
    url, wrong = address((ROOT / "setup.py").read_text(encoding="utf-8")), []
    for path in [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]:
        old = path.read_text(encoding="utf-8")
        new = readme(old, url) if path.suffix == ".md" else notebook(old, url)
        if new != old:
            wrong.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    if "--check" in sys.argv and wrong:
        print(f"not the address of setup.py: {', '.join(wrong)}; run python .ci/address.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
