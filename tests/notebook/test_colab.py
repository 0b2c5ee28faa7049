"""Colab's port proxy, by a stand-in for its package: the real one is only there."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from medusa_serve.errors import TunnelError
from medusa_serve.notebook import colab


def test_colabs_own_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TunnelError, match="Only Colab"):
        colab.proxy_url(8000)
    with pytest.raises(TunnelError, match="Only Colab"):
        colab.show_page(8000)
    calls: list[Any] = []
    output = types.ModuleType("google.colab.output")
    answers: list[Any] = ["https://8000-x.colab.dev/"]
    output.eval_js = lambda code, timeout_sec: calls.append(code) or answers.pop()  # type: ignore[attr-defined]
    output.serve_kernel_port_as_iframe = lambda *a, **k: calls.append((a, k))  # type: ignore[attr-defined]
    module = types.ModuleType("google.colab")
    module.output = output  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", module)
    assert colab.proxy_url(8000) == "https://8000-x.colab.dev/"
    assert "google.colab.kernel.proxyPort(8000" in calls.pop()
    for nothing in ([None], []):  # a page that refuses, and none that answers: an error of Colab's
        answers[:] = nothing
        with pytest.raises(TunnelError, match="run the cell from its page"):
            colab.proxy_url(8000)
        calls.clear()
    colab.show_page(8000, key="a&b=c")
    [((port,), options)] = calls
    assert port == 8000
    assert options["path"] == "/#key=a%26b%3Dc"
    assert options["cache_in_notebook"] is False
