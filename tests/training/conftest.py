"""Short answers in the report that ends each training: how long they are is no matter of these tests."""

import pytest

from medusa_serve.training import report

TOKENS = 16


@pytest.fixture(autouse=True)
def short_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "TOKENS", TOKENS)
