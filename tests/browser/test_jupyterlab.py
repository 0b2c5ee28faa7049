"""notebooks/01_serve.ipynb in a real JupyterLab, as a person uses it: Run all, then the panel by hand.

The default model answers, so the first run downloads it. MEDUSA_SMOKE=1 shrinks what the other cells generate.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
NOTEBOOK = "notebooks/01_serve.ipynb"
RUN_ALL_S = 300
ANSWER_S = 60
STORY = "Tell me a long story about a whale who learns to read."


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """JupyterLab over a copy of the notebooks beside the package; its URL with the token. Ends with its kernels."""
    if find_spec("jupyterlab") is None:
        pytest.fail("There is no jupyterlab: run .ci/browser, which installs what these tests need.")
    work = tmp_path / "work"
    (work / "notebooks").mkdir(parents=True)
    shutil.copy(ROOT / NOTEBOOK, work / NOTEBOOK)
    for name in ("medusa_serve", "requirements.txt"):
        (work / name).symlink_to(ROOT / name)
    settings = tmp_path / "settings"
    tracker = settings / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))  # all cells stay on the page
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_WORKSPACES_DIR": "spaces"}
    env = {**os.environ, "MEDUSA_SMOKE": "1", "JUPYTERLAB_SETTINGS_DIR": str(settings), "NGROK_AUTHTOKEN": ""}
    env |= {name: str(tmp_path / folder) for name, folder in folders.items()}
    token = secrets.token_hex(8)
    options = [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}", "--ServerApp.port=0"]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options]
    with (tmp_path / "lab.log").open("w") as log:
        process = subprocess.Popen(command, cwd=work, env=env, stdout=log, stderr=log)
        try:
            yield f"{_address(process, tmp_path / 'runtime')}lab/tree/{NOTEBOOK}?token={token}"
        finally:
            process.terminate()  # it shuts its kernels down
            process.wait(30)


def _address(process: subprocess.Popen[bytes], runtime: Path) -> str:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        assert process.poll() is None, "JupyterLab ended: see lab.log"
        for path in runtime.glob("jpserver-*.json"):
            return str(json.loads(path.read_text())["url"])
        time.sleep(0.2)
    raise AssertionError("JupyterLab did not start within 60 s.")


def test_a_person_runs_all_and_uses_the_panel(lab: str, visit: Callable[..., Any]) -> None:
    page = visit(lab)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.locator("#jp-main-statusbar", has_text="| Idle").wait_for(timeout=60_000)
    cells = page.locator(".jp-Notebook .jp-CodeCell")
    run_all(page, cells)
    cells.last.locator(".jp-OutputArea-output", has_text="tokens per step").wait_for(timeout=RUN_ALL_S * 1000)
    assert page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    assert cells.nth(1).inner_text().count("is ready after") == 1

    panel = Panel(cells.nth(1))
    panel.prompt.fill(STORY)
    panel.button("Send").click()
    lengths = [panel.grown(above=0)]
    for _ in range(3):  # it grows while one looks
        lengths.append(panel.grown(above=lengths[-1]))
    panel.button("Stop").click()
    panel.idle()
    stopped = panel.text()
    assert "(stopped)" in stopped
    assert len(panel.answer()) > 20

    panel.button("Regenerate").click()
    panel.begun()
    panel.idle()
    whole = panel.answer()
    assert "(stopped)" not in panel.text()
    assert panel.root.locator(".widget-html span[title$='tokens in one step']").count() > 0, "no run is coloured"
    assert len(whole) > len(stopped.rpartition("Model:")[2])
    assert panel.end_is_in_sight()

    panel.button("Compare with plain decoding").click()
    panel.root.locator(".widget-html", has_text="with and without speculation").wait_for(timeout=ANSWER_S * 1000)
    said = panel.root.locator(".widget-html", has_text="with and without speculation").last.inner_text()
    assert "identical" in said
    assert "×" in said or "times" in said, said


def run_all(page: Any, cells: Any) -> None:
    """By the menu, again where it was lost: Lab drops it while it still connects to the kernel it calls idle."""
    for _ in range(10):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
        page.wait_for_timeout(2000)
        if cells.first.locator(".jp-InputPrompt").inner_text().strip() != "[ ]:":
            return
    raise AssertionError("Run All Cells ran nothing.")


class Panel:
    """The panel in a cell's output, by what a person sees of it."""

    def __init__(self, cell: Any) -> None:
        self.root = cell.locator(".jupyter-widgets.widget-vbox").first
        self.root.wait_for()
        self.prompt = self.root.locator("textarea[placeholder='Ask something']")

    def button(self, name: str) -> Any:
        return self.root.locator(f"button:has-text('{name}')")

    def text(self) -> str:
        return str(self.root.locator(".widget-html").first.inner_text())

    def end_is_in_sight(self) -> bool:
        """Of a conversation that may be longer than its box: its last line lies within it."""
        box = self.root.locator(".widget-html").first.locator("div[style*='overflow-y']")
        last = box.locator("> div > div").last
        inner, outer = last.bounding_box(), box.bounding_box()
        return bool(inner["y"] + inner["height"] <= outer["y"] + outer["height"] + 1)

    def answer(self) -> str:
        return self.text().rpartition("Model:")[2].strip()

    def grown(self, above: int) -> int:
        until = time.monotonic() + ANSWER_S
        while len(self.answer()) <= above:
            assert time.monotonic() < until, self.text()
            time.sleep(0.05)
        return len(self.answer())

    def begun(self) -> None:
        self.root.locator("button:has-text('Stop'):enabled").wait_for(timeout=ANSWER_S * 1000)

    def idle(self) -> None:
        self.root.locator("button:has-text('Send'):enabled").wait_for(timeout=ANSWER_S * 1000)
