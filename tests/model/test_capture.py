"""Captures beside others that use the device: `pytest -m gpu tests/model/test_capture.py`."""

import contextlib
import gc
import threading

import pytest
import torch

from medusa_serve.model.capture import CaptureFailed, capture, give_back, settle

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


def test_who_waits_for_the_device_breaks_a_capture_that_succeeds_the_next_time(product):
    a, b, body = product
    here, calls = torch.cuda.current_stream(), []

    def disturbed() -> torch.Tensor:
        calls.append(0)
        if len(calls) == 2:  # the first run is no capture

            def wait() -> None:
                with contextlib.suppress(RuntimeError):  # the capture is broken whether or not this one is told
                    torch.cuda.synchronize()

            thread = threading.Thread(target=wait)
            thread.start()
            thread.join()
        return body()

    with pytest.raises(CaptureFailed):
        capture(disturbed, a.device, None)
    assert torch.cuda.current_stream() == here
    graph, out = capture(body, a.device, None)
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
