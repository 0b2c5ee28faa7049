"""Imports that let others run in between."""

import sys
import time

import pytest

from medusa_serve.model.gpu.background import imported


def test_an_import_holds_nobody_up(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.4)\n")
    monkeypatch.syspath_prepend(tmp_path)
    longest, began = 0.0, time.perf_counter()
    for _ in imported("slow_to_import"):
        longest, began = max(longest, time.perf_counter() - began), time.perf_counter()
    assert longest < 0.3
    assert sys.modules.pop("slow_to_import")


def test_an_import_that_fails_is_told_where_it_is_needed(tmp_path, monkeypatch):
    (tmp_path / "not_to_import.py").write_text("raise RuntimeError('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in imported("not_to_import", "nowhere_at_all"):
        pass
    with pytest.raises(RuntimeError, match="no"):
        import not_to_import  # noqa: F401
