"""Replicas under Ray Serve. What needs no Ray is in the default suite; the rest is `-m ray` and fails without it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from medusa_serve.cluster.command import Cluster, cluster
from medusa_serve.cluster.config import ReplicasConfig
from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidConfig, LoadError
from medusa_serve.server.config import ServerConfig
from tests.tiny import save_tiny_folder

ROOT = Path(__file__).parents[2]
COUNT, CLIENTS = 2, 32
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(ray|pydantic).*")

# ---- without Ray -----------------------------------------------------------------------------------------------------


def test_a_gpu_each_or_an_even_part_of_the_cores() -> None:
    on_gpus = Cluster("", ServerConfig(), num_gpus=2, num_cpus=8)
    assert on_gpus.shares(2, EngineConfig()) == {"gpus": 1.0, "cpus": 1.0}
    assert on_gpus.shares(3, EngineConfig(device="cpu")) == {"gpus": 0.0, "cpus": 2.67}
    with pytest.raises(LoadError, match=r"^3 replicas need a GPU each, and this machine has 2 GPUs; ask for fewer\.$"):
        on_gpus.shares(3, EngineConfig())


def test_without_ray_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LoadError, match=r"^Replicas need Ray Serve, which is not installed: pip install 'ray\[serve\]"):
        cluster(ServerConfig(port=0)).__enter__()


@pytest.mark.parametrize(
    ("option", "value"), [("replicas", 0), ("max_replicas", 1), ("ingresses", 0), ("gpus", -1), ("drain_s", "long")]
)
def test_nonsense_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(InvalidConfig) as refused:
        ReplicasConfig(**{"replicas": 2, option: value})
    assert refused.value.param == option


# ---- what Ray is told ------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_serve_run_takes_our_options_by_name() -> None:
    from medusa_serve.cluster.app import app

    made = app({"model": "smollm2-135m", "slots": "4", "replicas": "2", "lookup": "false"})
    assert type(made).__name__ == "Application"
    with pytest.raises(InvalidConfig, match="Unknown option 'slot'"):
        app({"slot": "4"})
    with pytest.raises(InvalidConfig, match="slots must be an integer"):
        app({"slots": "many"})


@pytest.mark.ray
def test_the_readmes_yaml_is_what_serve_run_takes() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from medusa_serve.cluster.app import app

    block = (ROOT / "README.md").read_text().split("```yaml\n", 1)[1].split("```", 1)[0]
    [told] = ServeDeploySchema.model_validate(yaml.safe_load(block)).applications
    assert told.import_path == f"{app.__module__}:{app.__name__}"
    assert type(app(told.args)).__name__ == "Application"


@pytest.mark.ray
def test_serve_run_starts_a_file_and_scales_with_the_requests_in_progress(tmp_path: Path) -> None:
    import yaml

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    folder = save_tiny_folder(tmp_path / "tiny")
    ours = {"model": str(folder), "device": "cpu", "dtype": "float32", "slots": 8, "cpus": 0.5}
    args = {**ours, "replicas": 1, "max_replicas": 2, "target_ongoing": 1}
    application = {"name": "medusa", "import_path": "medusa_serve.cluster.app:app", "args": args}
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    url, command = f"http://127.0.0.1:{port}", [str(Path(sys.executable).with_name("serve")), "run", "serve.yaml"]
    answered: list[int] = []
    over = threading.Event()

    def ask_again() -> None:
        body = json.dumps({"prompt": "a", "max_tokens": 200}).encode()
        head = {"Content-Type": "application/json"}
        while not over.is_set():
            with urllib.request.urlopen(urllib.request.Request(f"{url}/generate", body, head), timeout=60) as answer:
                answered.append(json.loads(answer.read())["usage"]["completion_tokens"])

    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            until(lambda: replicas_of(url).get("running") == 1, 120)
            with ThreadPoolExecutor(8) as pool:
                asking = [pool.submit(ask_again) for _ in range(8)]

                def are_two(state: str) -> bool:
                    for ended in (each for each in asking if each.done()):
                        ended.result()  # raises what went wrong
                    return replicas_of(url).get(state) == 2

                try:
                    until(lambda: are_two("wanted"), 150)
                    until(lambda: are_two("running"), 240)  # it loads on a core that is busy
                finally:
                    over.set()
            for each in asking:
                each.result()  # no request failed meanwhile
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=120)
    assert min(answered) > 0


def replicas_of(url: str) -> dict[str, int]:
    """By /health; nothing before there is one."""
    with suppress(OSError, ValueError), urllib.request.urlopen(f"{url}/health", timeout=15) as response:
        told: dict[str, int] = json.loads(response.read())["replicas"]
        return told
    return {}


def until(true: Callable[[], Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.5)


@pytest.mark.ray
def test_the_shell_starts_two_replicas_and_stops_them(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path / "tiny")
    command = [sys.executable, "-m", "medusa_serve", "serve", "--replicas", "2", "--model", str(folder), "--port", "0"]
    command += ["--json", "--api-key", "k3y", "--device", "cpu", "--dtype", "float32"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        with urllib.request.urlopen(f"{told['url']}/health", timeout=60) as health:
            assert json.loads(health.read())["replicas"] == {"running": 2, "wanted": 2}
        answer = subprocess.run(told["curl"], shell=True, check=True, capture_output=True, text=True).stdout
        assert json.loads(answer)["usage"]["completion_tokens"] > 0
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(f"{told['url']}/generate", b"{}"), timeout=60)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=120) == 0


# ---- two replicas of the default model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of `tests.campaigns replicas`: both replicas loaded by 32 streams, one killed, all updated."""
    out = tmp_path_factory.mktemp("replicas") / "out.json"
    command = [sys.executable, "-m", "tests.campaigns", "replicas", "--clients", str(CLIENTS)]
    command += ["--seconds", "6", "--tokens", "32", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.ray
def test_32_streams_are_whole_and_two_replicas_are_compared_with_one(measured: dict[str, Any]) -> None:
    assert [row["replicas"] for row in measured["loads"]] == [1, COUNT]
    for row in measured["loads"]:
        assert row["errors"] == {}
        assert row["whole"] >= CLIENTS
    [ratio] = measured["ratios"]
    print(f"two replicas over one: {ratio['tokens_per_second']}x")  # two cores: about 1 is all that can be had
    assert ratio["tokens_per_second"] > 0.5


@pytest.mark.ray
def test_kill_minus_nine_costs_no_request_its_end(measured: dict[str, Any]) -> None:
    kill = measured["kill"]
    assert kill["one_terminal"] == kill["accepted"] > CLIENTS
    assert set(kill["lost"]) <= {"generation_failed"}  # those that the dead replica had begun to write
    assert kill["whole"] + sum(kill["lost"].values()) == kill["requests"]
    assert kill["all_back_after_s"] is not None


@pytest.mark.ray
def test_health_tells_of_the_dead_replica_and_of_its_return(measured: dict[str, Any]) -> None:
    seen = measured["kill"]["health"]
    counts = [told["running"] for told in seen]
    assert (counts[0], min(counts), counts[-1]) == (COUNT, COUNT - 1, COUNT)
    assert {told["code"] for told in seen} == {200}  # the other one serves all the while


@pytest.mark.ray
def test_a_rolling_update_loses_nothing(measured: dict[str, Any]) -> None:
    update = measured["update"]
    assert update["lost"] == {}
    assert update["one_terminal"] == update["accepted"] == update["requests"] > CLIENTS
    assert min(told["running"] for told in update["health"]) >= 1
