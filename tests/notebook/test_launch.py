"""One server, however often the cell runs; failures in a sentence, after which the cell can simply run again."""

from __future__ import annotations

import _thread
import asyncio
import importlib
import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import medusa_serve
from medusa_serve.errors import InvalidConfig, InvalidRequest, LoadError, ShuttingDown
from medusa_serve.model.loading import choose
from medusa_serve.model.loading import gpu_facts as gpu
from medusa_serve.notebook import background, env
from medusa_serve.notebook.background import running
from tests.fake_hub import GATED, fake_hub, stand_in

from .conftest import threads

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

ROOT = Path(__file__).parents[2]
ONE = ["medusa-engine", "medusa-server"]


def launch(folder: str, **options: Any) -> Any:
    return medusa_serve.launch(folder, **{"heads": "none", "panel": False, "port": 0, "max_context": 128} | options)


# ---- one server ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
def test_the_same_again_is_the_same_server(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    server = launch(folder)
    shown = capsys.readouterr().out
    for word in ("device", "slots     8 × 128 tokens", "drafts    lookup", "nodes", "expected", "because", "curl -s"):
        assert word in shown
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    assert launch(folder) is server
    assert "already running" in capsys.readouterr().out
    assert threads() == ONE


@pytest.mark.usefixtures("nothing_left")
def test_other_options_replace_it(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = launch(folder)
    url = first.url
    second = launch(folder, slots=2)
    assert second is not first
    assert second.describe()["slots"] == 2
    assert threads() == ONE
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    assert "stopped" in repr(first)
    with pytest.raises(ShuttingDown, match="was stopped"):
        first.generate("a")
    first.stop()  # again: nothing happens
    assert threads() == ONE
    assert "replacing tiny" in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_left")
def test_a_package_that_is_imported_anew_finds_it(folder: str) -> None:
    server = launch(folder)
    importlib.reload(background)
    assert background.running() is server
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("medusa_serve.notebook")}
    try:
        again = importlib.import_module("medusa_serve.notebook.background")
        assert again.running() is server
    finally:
        sys.modules.update(kept)


@pytest.mark.usefixtures("nothing_left")
def test_stop_ends_what_is_open_and_frees_the_model(folder: str) -> None:
    import gc
    import weakref

    server = launch(folder, drain_s=0.0)
    model = weakref.ref(server._llm())
    stream = server.stream("a", max_tokens=100)
    next(stream)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 5
    with pytest.raises(ShuttingDown):
        list(stream)
    del stream
    gc.collect()
    assert model() is None
    assert threads() == []
    handlers = logging.getLogger("medusa_serve").handlers
    assert not [handler for handler in handlers if type(handler).__name__ == "RingLog"]


# ---- what it does --------------------------------------------------------------------------------------------------


def test_text(server: Any) -> None:
    one = server.generate("Name a colour", max_tokens=6, seed=3, temperature=0.8)
    streamed = list(server.stream("Name a colour", max_tokens=6, seed=3, temperature=0.8))
    assert "".join(delta.text for delta in streamed) == one.text
    assert streamed[-1].completion.token_ids == one.token_ids
    chat = [{"role": "user", "content": "Name a colour"}]
    assert server.generate(chat, max_tokens=6, seed=3, temperature=0.8).text == one.text
    assert server.generate("Name a colour", max_tokens=6, raw=True).prompt_tokens < one.prompt_tokens
    assert server.generate("Name a colour", max_tokens=6, system="Be brief.").prompt_tokens > one.prompt_tokens
    many = server.generate_many(["a", "Name a colour", "b"], max_tokens=6, seed=3, temperature=0.8)
    assert many[1].text == one.text
    with pytest.raises(InvalidRequest, match="nosuch"):
        server.generate("a", nosuch=1)
    assert server.stats()["tokens_per_step"] >= 1
    assert server.stats()["memory"]["used"] > 0


def test_awaited_text_is_the_same_and_leaving_cancels(server: Any) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(*(server.generate_async(text, max_tokens=6) for text in ("a", "b")))

    assert [c.text for c in asyncio.run(both())] == [server.generate(t, max_tokens=6).text for t in ("a", "b")]

    async def leave() -> None:
        await asyncio.wait_for(server.generate_async("a", max_tokens=100), 0.02)

    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    until = time.monotonic() + 5
    while server.stats()["in_flight"] and time.monotonic() < until:
        time.sleep(0.01)
    assert server.stats()["in_flight"] == 0


def test_one_prompt_beside_many(server: Any) -> None:
    prompts = ["Name a colour", "a", "b"]
    found = asyncio.run(server.one_and_many(prompts, max_tokens=6))
    assert [one.text for one in found.answers] == [server.generate(text, max_tokens=6).text for text in prompts]
    assert found.gain == found.together / found.alone > 0
    assert "3 prompts at once" in str(found)
    assert "(8 decode at a time)" in str(found)


def test_repr_has_lines_to_copy(server: Any) -> None:
    text = repr(server)
    assert server.url in text
    assert f'base_url="{server.url}/v1"' in text
    curl = next(line for line in text.splitlines() if line.startswith("curl"))
    answer = subprocess.run(curl.replace('": 64', '": 3'), shell=True, capture_output=True, check=True).stdout
    assert b'"completion_tokens":3' in answer
    compile(text[text.index("from openai") : text.index("\n\n.panel")], "snippet", "exec")


def test_logs_hold_what_would_fall_into_cells(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("medusa_serve.server").warning("something odd")
    assert server.logs(1).endswith("something odd")
    assert capsys.readouterr() == ("", "")


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
def test_nonsense_is_refused_before_anything_stops(folder: str) -> None:
    server = launch(folder)
    for options, message in (
        ({"nosuch": 1}, "Unknown option 'nosuch'"),
        ({"slots": 0}, "slots must be an integer"),
        ({"port": -1}, "port must be an integer"),
        ({"public": "yes"}, "public must be true or false"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            launch(folder, **options)
    assert running() is server
    assert server.is_alive


@pytest.mark.usefixtures("nothing_left")
def test_a_model_that_is_not_there_leaves_the_one_that_runs(folder: str, tmp_path: Path) -> None:
    server = launch(folder)
    for model in (f"{folder}-typo", str(tmp_path)):
        with pytest.raises(LoadError, match=f"no folder|holds no model.* {server.name} goes on"):
            launch(model)
    assert server.generate("a", max_tokens=2).completion_tokens == 2
    assert launch(folder) is server


@pytest.mark.usefixtures("nothing_left")
def test_a_failed_load_leaves_nothing_and_the_cell_runs_again(folder: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    shipped = ROOT / "medusa_serve/heads/smollm2-135m/sequential"
    for model, heads, message in (
        ("./no-such-folder", "none", "There is no folder"),
        (str(tmp_path), "none", "not know as a causal language model"),
        (folder, str(shipped), "hidden size 576, the base model 32: they belong to another model"),
        (folder, "sequential", "no sequential heads ship for"),
    ):
        with pytest.raises(LoadError, match=message) as caught:
            launch(model, heads=heads)
        assert caught.value._render_traceback_() == [f"LoadError: {caught.value.message}"]
        assert threads() == []
    assert launch(folder).is_alive


@pytest.mark.usefixtures("nothing_left")
def test_a_hub_that_refuses_says_what_to_do_and_the_cell_runs_again(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.gguf").write_text("a repository that is no transformers model")
    repos = {"some/tiny-model": Path(folder), "some/gguf": tmp_path}
    with fake_hub(monkeypatch, tmp_path / "hub", repos, listed=("Qwen/Qwen9-2B-Instruct",)):
        for model, sentence in (
            ("some/tiny-modle", "has no some/tiny-modle.* Did you mean some/tiny-model[?]$"),
            ("sone/tiny-model", "Did you mean some/tiny-model[?]$"),
            ("Qwen/Qwen9-2b-Intsruct", "Did you mean Qwen/Qwen9-2B-Instruct"),
            ("qwen2.5-0.5", "^There is no model 'qwen2.5-0.5'. Did you mean qwen2.5-0.5b"),
            ("qwen/qwen2.5-0.5b-instuct", "Did you mean Qwen/Qwen2.5-0.5B-Instruct"),
            ("nobody/nothing-like-it", "Check how it is spelt[.]$"),
            ("some/tiny model", "'some/tiny model' is not a model hub id"),
            ("some/gguf", "some/gguf has no config.json"),
            ("https://huggingface.co/some/tiny-model", "by its id, not its address: some/tiny-model[.]$"),
            (GATED, f"{GATED} is gated: accept its terms at https://huggingface.co/{GATED}"),
        ):
            with pytest.raises(LoadError, match=sentence) as caught:
                launch(model)
            assert "\n" not in caught.value.message
            assert threads() == []
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        with pytest.raises(LoadError, match="refuses the token in HF_TOKEN"):
            launch("some/tiny-model")
        monkeypatch.delenv("HF_TOKEN")
        server = launch("some/tiny-model")
        assert server.generate("a", max_tokens=2).completion_tokens == 2


@pytest.mark.usefixtures("nothing_left")
def test_kaggle_without_internet(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import _http

    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    stand_in(monkeypatch, tmp_path / "hub", nobody)
    monkeypatch.setattr(_http, "time", SimpleNamespace(time=time.time, sleep=lambda seconds: None))  # between its tries
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(env, "online", lambda: False)
    with pytest.raises(LoadError, match="'some/model' .*network.* This Kaggle notebook has no internet: turn it on"):
        launch("some/model")
    assert threads() == []
    assert launch(folder).is_alive


@pytest.mark.usefixtures("nothing_left")
def test_a_busy_port(folder: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidConfig, match=f"Port {port} on 127.0.0.1 is in use; choose another"):
            launch(folder, port=port)
        assert threads() == []
    assert launch(folder, port=port).url.endswith(str(port))


def test_without_a_port_any_free_one_does(capsys: pytest.CaptureFixture[str]) -> None:
    from medusa_serve.server.config import ServerConfig

    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted = ServerConfig(port=taken.getsockname()[1])
        with background.listen(wanted, any_port=True) as sock:
            other = sock.getsockname()[1]
        assert other != wanted.port
        assert capsys.readouterr().out == f"port {wanted.port} is taken; this server has port {other}\n"
        with pytest.raises(InvalidConfig):
            background.listen(wanted, any_port=False)


@pytest.mark.usefixtures("nothing_left")
def test_interrupted_while_it_loads(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medusa_serve import llm

    loads, gate = [], threading.Event()
    made = llm.LLM

    def slow(config: Any) -> Any:
        loads.append(config)
        gate.wait(10 if len(loads) == 1 else 0)
        return made(config)

    monkeypatch.setattr(llm, "LLM", slow)
    threading.Timer(0.4, _thread.interrupt_main).start()
    with pytest.raises(LoadError, match="interrupted; run the cell again"):
        launch(folder)
    assert threads() == ["medusa-load"]
    threading.Timer(0.3, gate.set).start()
    assert launch(folder).is_alive
    assert "waiting for the end of a load" in capsys.readouterr().out
    assert threads() == ONE


@pytest.mark.usefixtures("nothing_left")
def test_out_of_memory(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from medusa_serve.model import build

    def greedy(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(build, "build_runner", greedy)
        with pytest.raises(LoadError, match=r"fits? .*(choose|take) a smaller"):
            launch(folder)
    assert threads() == []
    assert launch(folder).is_alive


@pytest.mark.usefixtures("nothing_left")
def test_a_gpu_without_code_for_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P100-PCIE-16GB")
    for archs, usable in (
        (["sm_70", "sm_75", "sm_90a", "compute_120"], False),
        (["sm_60", "sm_70"], True),
        (["sm_50"], False),
        (["compute_50"], True),
        ([], True),
    ):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda archs=archs: archs)
        reason = gpu.why_unusable(torch.device("cuda", 0))
        assert (reason is None) == usable, archs
        assert usable or "in Kaggle: GPU T4 x2" in str(reason)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(LoadError, match="no code for the GPU here"):
            choose.choose_device(device)
    assert choose.choose_device("cpu").value.type == "cpu"
    with pytest.raises(LoadError, match="in Kaggle: GPU T4 x2"):
        launch(folder)
    assert threads() == []
    monkeypatch.undo()  # another GPU, or none: the cell runs again
    assert launch(folder).is_alive


# ---- the end of the process ----------------------------------------------------------------------------------------

AT_EXIT = """
    import threading
    import nest_asyncio  # as other libraries do, in the order that breaks uvicorn's own run on Python 3.12 and later
    nest_asyncio.apply()
    import medusa_serve
    server = medusa_serve.launch({folder!r}, heads="none", panel=False, port=0, max_context=128)
    threading.Thread(target=lambda: list(server.stream("a", max_tokens=100)), daemon=True).start()
    print("left", flush=True)
"""


def test_a_process_that_ends_stops_its_server(folder: str) -> None:
    script = textwrap.dedent(AT_EXIT.format(folder=folder))
    began = time.monotonic()
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ, check=True
    ).stdout
    assert out.splitlines()[-2:] == ["left", "stopped tiny"], out
    assert time.monotonic() - began < 30
