"""Captures beside others that use the device: `pytest -m gpu tests/model/test_capture.py`."""

import contextlib
import gc
import threading
from collections.abc import Callable

import pytest
import torch

from medusa_serve.model.gpu.capture import capture
from medusa_serve.model.process_lock import CaptureFailed, give_back, settle

pytestmark = pytest.mark.gpu
MIB = 2**20


@pytest.fixture
def product():
    a, b, out = (torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def body() -> torch.Tensor:
        torch.mm(a, b, out=out)
        return out

    return a, b, body


def test_a_graph_gives_what_the_pass_gives(product):
    a, b, body = product
    graph, out = capture(body, a.device, None)
    a.fill_(1.0)
    graph.replay()
    torch.testing.assert_close(out, a @ b)


def disturbed(body: Callable[[], torch.Tensor], runs: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """The pass, and in some of its runs another thread that waits for the device. The first run is no capture."""
    calls = []

    def wait() -> None:
        with contextlib.suppress(RuntimeError):  # the capture is broken whether or not this one is told
            torch.cuda.synchronize()

    def run() -> torch.Tensor:
        calls.append(0)
        if len(calls) in runs:
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join()
        return body()

    return run


def test_who_waits_for_the_device_breaks_a_capture_that_succeeds_the_next_time(product):
    a, b, body = product
    here = torch.cuda.current_stream()
    graph, out = capture(disturbed(body, (2,)), a.device, None)
    assert torch.cuda.current_stream() == here
    graph.replay()
    torch.testing.assert_close(out, a @ b)
    torch.randn(4, device="cuda")  # outside of captures again


@pytest.mark.parametrize("shared", [False, True])
def test_memory_comes_back_behind_broken_captures(product, shared):
    a, b, body = product
    graphs = [capture(body, a.device, None)] if shared else []
    pool = graphs[0][0].pool() if shared else None
    here = torch.cuda.current_stream()
    with pytest.raises(CaptureFailed):
        capture(disturbed(body, (2, 3)), a.device, pool)
    assert torch.cuda.current_stream() == here
    before = torch.cuda.mem_get_info()[0]
    held = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    assert before - torch.cuda.mem_get_info()[0] > 256 * MIB
    del held
    give_back()
    assert abs(before - torch.cuda.mem_get_info()[0]) < 32 * MIB
    graphs.append(capture(body, a.device, None))
    a.fill_(1.0)
    for graph, out in graphs:
        out.zero_()
        graph.replay()
        torch.testing.assert_close(out, a @ b)


def test_threads_capture_in_turn(product):
    a, b, body = product
    found, errors = [], []

    def work() -> None:
        try:
            for _ in range(5):
                with torch.cuda.stream(torch.cuda.Stream()):
                    found.append(capture(body, a.device, None))
                    settle(a.device)
        except Exception as error:  # reported below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 20
    for graph, out in found:
        graph.replay()
        torch.testing.assert_close(out, a @ b)


def test_many_captures_keep_no_memory(product):
    a, _, body = product

    def free() -> int:
        gc.collect()
        give_back()
        return torch.cuda.mem_get_info()[0]

    capture(body, a.device, None)
    before = free()
    for _ in range(20):
        capture(body, a.device, None)
    assert before - free() < 32 * MIB
