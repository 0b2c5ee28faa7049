"""`python -m tests.campaigns load`: a small run on a tiny model, its bars and its table; the full run is `-m load`."""

import json
from pathlib import Path
from typing import Any

import pytest

from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidConfig
from tests.campaigns.load import LoadConfig, bars, bench_load, table
from tests.tiny import save_tiny_folder

SMALL = LoadConfig(clients=4, seconds=0.5, open_seconds=0.3, burst=12, storms=1, storm=6, tokens=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = save_tiny_folder(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:  # an engine that audits its slots more often need not be waited for
        patch.setattr("medusa_serve.engine.batch_manager.IDLE_WAIT_S", 0.02)
        patch.setattr("tests.campaigns.invariants.AUDIT_S", 0.1)
        return bench_load(EngineConfig(model=str(folder), device="cpu", slots=4), SMALL)


def test_a_small_run(small: dict[str, Any]) -> None:
    assert [one["load"] for one in small["loads"]] == ["closed", *["open"] * 5, "burst", "storm"]
    assert small["bars"]["no unexpected status"]
    assert small["bars"]["below capacity nothing is refused"]
    assert small["bars"]["invariants hold after each load"], small["loads"]
    assert small["loads"][0]["statuses"] == {"200": small["loads"][0]["requests"]}
    assert sum(small["loads"][-1]["statuses"].values()) == 6
    told = table(json.loads(json.dumps(small)))
    assert "closed, 4 clients" in told
    assert "burst, 12 in 1 s" in told


def test_bars_are_missed_where_they_should_be(small: dict[str, Any]) -> None:
    def changed(place: int, **fields: Any) -> dict[str, bool]:
        loads = [one | (fields if n == place else {}) for n, one in enumerate(small["loads"])]
        return bars(small | {"loads": loads, "lag_ms": {"p99": 1.0}})

    assert all(changed(-5).values())
    assert not changed(0, statuses={"200": 5, "429": 1})["no unexpected status"]
    assert not changed(6, statuses={"500": 1})["no unexpected status"]
    assert not changed(1, statuses={"200": 5, "503": 1})["below capacity nothing is refused"]
    assert not changed(7, invariants={"held": False})["invariants hold after each load"]
    assert not bars(small | {"lag_ms": {"p99": 60.0}})["event loop lag p99 < 50 ms"]


def test_nonsense_is_refused() -> None:
    for field, value in (("clients", 0), ("seconds", 0), ("burst", -1), ("seed", "x")):
        with pytest.raises(InvalidConfig) as caught:
            LoadConfig(**{field: value})
        assert caught.value.param == field


@pytest.mark.load
def test_all_of_it_on_a_tiny_model(tmp_path: Path) -> None:
    """64 clients for three minutes, open loops, a burst of 500, five storms of 200."""
    folder = save_tiny_folder(tmp_path / "tiny")
    result = bench_load(EngineConfig(model=str(folder), device="cpu", slots=8), LoadConfig())
    assert all(result["bars"].values()), table(result)
