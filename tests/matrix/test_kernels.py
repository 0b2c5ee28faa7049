"""launch() in real kernels: two Pythons, two generations of ipykernel, both orders of nest-asyncio.

`.ci/matrix` runs it: minutes, and gigabytes for a second Python. Environments: environments.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import save_tiny_folder

from .environments import KERNELS, environment
from .kernel import Kernel

pytestmark = pytest.mark.matrix
PYTHONS = ("3.11", "3.13")
Start = Callable[..., Kernel]


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("MEDUSA_MATRIX_DIR")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("environments")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module", params=[(python, kernel) for python in PYTHONS for kernel in KERNELS], ids=str)
def python(request: pytest.FixtureRequest, environments: Path) -> Path:
    """The Python of a combination: (3.13, 6) is what Colab runs."""
    version, kernel = request.param
    program = environment(environments, version, kernel)
    with Kernel(program, environments) as fresh:
        found = json.loads(
            fresh.run(
                "import sys, json, ipykernel; print(json.dumps(["
                "'%d.%d' % sys.version_info[:2], ipykernel.__version__.split('.')[0]]))"
            )
        )
    assert found == [version, kernel], "another environment answers"
    return program


@pytest.fixture
def start(python: Path, tmp_path: Path) -> Start:
    def go(**env: str) -> Kernel:
        return Kernel(python, tmp_path, env)

    return go


LAUNCH = """
import medusa_serve, threading, urllib.request, json
def ours():
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("medusa-"))
def answers(url):
    body = json.dumps({{"prompt": "hello", "max_tokens": 8, "seed": 1}}).encode()
    request = urllib.request.Request(url + "/generate", body, {{"Content-Type": "application/json"}})
    return json.load(urllib.request.urlopen(request, timeout=30))["usage"]["completion_tokens"]
server = medusa_serve.launch({model!r}, heads="none", port=0, panel=False, max_context={context})
print("\\nRESULT", json.dumps([server.url, answers(server.url), ours()]))
"""


NESTED_RUN = """
import asyncio
async def many():
    return await asyncio.gather(*[server.generate_async("x", max_tokens=4) for _ in range(3)])
print([completion.completion_tokens for completion in asyncio.run(many())])
"""


def result(printed: str) -> list[object]:
    [line] = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    return list(json.loads(line.removeprefix("RESULT ")))


def launched(kernel: Kernel, model: str, context: int = 128) -> str:
    """The URL of a server that has answered over HTTP."""
    url, tokens, threads = result(kernel.run(LAUNCH.format(model=model, context=context)))
    assert tokens == 8
    assert [name for name in threads if "tokenize" not in name] == ["medusa-engine", "medusa-server"]
    return str(url)


def test_start_rerun_change_stop_start(start: Start, model: str) -> None:
    with start() as kernel:
        first = launched(kernel, model)
        assert launched(kernel, model) == first, "the same cell again is the same server"
        launched(kernel, model, context=96)  # another replaces it
        assert "stopped" in kernel.run("server.stop(); print('stopped', ours())")
        assert result(kernel.run("print('RESULT', json.dumps(ours()))")) == []
        launched(kernel, model)
        # the loop of the cell is the kernel's own, untouched
        assert "7" in kernel.run("import asyncio; await asyncio.sleep(0.01); print(3 + 4)")


@pytest.mark.parametrize("order", ["before", "after"])
def test_nest_asyncio_in_either_order(start: Start, model: str, order: str) -> None:
    """Applied by somebody else before uvicorn is imported it breaks `uvicorn.Server.run` on Python 3.12 and later."""
    patch = "import nest_asyncio; nest_asyncio.apply(); import uvicorn; print('patched')"
    with start() as kernel:
        if order == "before":
            assert "patched" in kernel.run(patch)
        launched(kernel, model)
        if order == "after":
            assert "patched" in kernel.run(patch)
        kernel.run("medusa_serve.allow_nested_loop()")
        printed = kernel.run(NESTED_RUN)
        assert "[4, 4, 4]" in printed
        assert launched(kernel, model)
        kernel.run("server.stop()")
        assert result(kernel.run("print('RESULT', json.dumps(ours()))")) == []
        launched(kernel, model)


def test_the_panel_answers_a_click(start: Start, model: str) -> None:
    with start() as kernel:
        launched(kernel, model)
        kernel.run("box = server.panel(); panel = server._panel; controls = panel._controls")
        kernel.run("controls.prompt.value = 'hello'; controls.send.click()")
        wait = "import time\nfor _ in range(300):\n    if not controls.busy: break\n    time.sleep(0.1)\n"
        printed = kernel.run(wait + "print('ANSWER', len(controls.transcript.value), controls.note.value)")
        assert int(printed.partition("ANSWER ")[2].split()[0]) > 50, printed


def test_a_kernel_that_ends_leaves_nothing(start: Start, model: str, tmp_path: Path) -> None:
    from medusa_serve.notebook.tunnel.tunnel import require_key_at

    with start() as kernel:
        url = launched(kernel, model)
    with pytest.raises(Exception, match="Nothing answers"):
        require_key_at(int(url.rpartition(":")[2]))


def test_a_killed_kernel_and_its_tunnel(start: Start, model: str, tmp_path: Path) -> None:
    """Its ngrok outlives it and holds the account's one address; the cell in a new kernel gets it back."""
    from tests.notebook.faked import FAKE, Fake

    state, temp = tmp_path / "state", tmp_path / "temp"
    state.mkdir()
    temp.mkdir()
    fake = Fake(state)
    fake.tell("linger", "1")
    env = {
        "MEDUSA_FAKE_NGROK": str(state),
        "PYNGROK_NGROK_PATH": str(FAKE),
        "TMPDIR": str(temp),
        "NGROK_AUTHTOKEN": "t",
    }
    cell = (
        f"import medusa_serve, urllib.request, urllib.error\n"
        f"server = medusa_serve.launch({model!r}, heads='none', port=0, panel=False, max_context=128, public=True)\n"
        "def status(key):\n"
        "    request = urllib.request.Request(server.public_url + '/openapi.json', headers={'X-API-Key': key})\n"
        "    try: return urllib.request.urlopen(request, timeout=20).status\n"
        "    except urllib.error.HTTPError as error: return error.code\n"
        "print('STATUS', status(server.api_key), status('wrong'))"
    )
    with start(**env) as kernel:
        assert "STATUS 200 401" in kernel.run(cell)
        [orphan] = fake.alive()
        kernel.kill()
    assert fake.alive() == [orphan], "this is what must be cleaned up"
    with start(**env) as kernel:
        assert "STATUS 200 401" in kernel.run(cell)
        assert "STATUS 200 401" in kernel.run(cell)  # again: no second tunnel
        [alive] = fake.alive()
        assert alive != orphan
    assert fake.alive() == []
    assert not list(temp.glob("medusa_serve-ngrok-*"))
