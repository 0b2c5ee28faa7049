"""On a GPU: what launch prints about it, and that no memory stays with servers that were replaced or stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import medusa_serve
from medusa_serve.errors import LoadError
from medusa_serve.model.loading.gpu_facts import free_bytes, gpu_facts
from tests.tiny import save_tiny_folder

from .conftest import threads

pytestmark = pytest.mark.gpu

MIB = 2**20


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random weights that weigh something: some 200 MiB in float32."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    return str(save_tiny_folder(folder, hidden=1024, layers=6, positions=2048))


def launch(folder: str, **options: Any) -> Any:
    return medusa_serve.launch(folder, **{"heads": "none", "panel": False, "port": 0, "device": "cuda"} | options)


@pytest.mark.usefixtures("nothing_left")
def test_it_is_named_and_memory_comes_back(larger: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = gpu_facts()
    assert facts is not None
    free = []
    for slots in (4, 8, 4, 8, 4):
        server = launch(larger, slots=slots)
        assert server.generate("a", max_tokens=8).completion_tokens == 8
        assert server.stats()["memory"]["kind"] == "GPU"
        held = free_bytes()
        server.stop()
        free.append(free_bytes())
        assert free[-1] - held > 100 * MIB, "the weights at least are free again"
    shown = capsys.readouterr().out
    assert f"{facts.name} (" in shown
    assert "of GPU memory are free again" in shown
    # the first start leaves the context and the libraries' workspaces, the later ones nothing
    assert free[1] - free[-1] < 32 * MIB, [round(bytes_ / MIB) for bytes_ in free]


@pytest.mark.usefixtures("nothing_left")
def test_too_large_is_said_and_leaves_the_memory(larger: str) -> None:
    import torch

    launch(larger, slots=1).stop()
    before = free_bytes()
    hoard = torch.empty(int(before - 256 * MIB), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(LoadError, match=r"fit|memory"):
            launch(larger, slots=64)
    finally:
        del hoard
        torch.cuda.empty_cache()
    assert threads() == []
    assert before - free_bytes() < 32 * MIB
    assert launch(larger, slots=1).is_alive


def test_the_model_folder_is_made(larger: str) -> None:
    assert (Path(larger) / "model.safetensors").stat().st_size > 100 * MIB
