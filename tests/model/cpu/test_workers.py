"""A thread that rests keeps no OpenMP workers, and computes on as before."""

import os
import threading
from pathlib import Path

import pytest
import torch

from medusa_serve.model.cpu import workers
from medusa_serve.model.cpu.workers import give_up_workers

TASKS = Path("/proc/self/task")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not TASKS.is_dir() or workers._pause() is None, reason="no OpenMP that can be told to rest")
def test_workers_end_and_come_back(two_threads):
    seen, a = [], torch.randn(700, 700)

    def count() -> int:
        return len(os.listdir(TASKS))

    def work() -> None:
        torch.set_num_threads(2)  # holds for the thread that says so
        before = count()
        first = a @ a
        with_workers = count()
        assert give_up_workers()
        seen.append((with_workers - before, with_workers - count(), torch.equal(a @ a, first)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(1, 1, True)]


def test_where_there_is_no_such_openmp_nothing_happens(monkeypatch):
    monkeypatch.setattr(workers, "_pause", lambda: None)
    assert give_up_workers() is False
