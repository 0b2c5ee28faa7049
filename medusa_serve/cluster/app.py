"""Replicas: the same app, each with its own model, at one address. Ray Serve runs them (extra `ray`).

client ─► HAProxy (or Ray's own proxy) ─► Ingress (no model) ─► one of the Replicas: create_app over its own LLM

Ray starts the replicas, chooses the least busy for each request, scales them, replaces dead ones and drains old ones in
an update. Requests and answers go by HTTP from the Ingress to the replica's own port: that costs one call of Ray a
request, where each message through Ray costs as much as many events.
The Ingress does what a replica cannot do for itself: when a replica dies, its open answers get their one terminal
event, or are asked of another replica where nothing of them was sent yet. Each replica has its own limits (slots,
max_queue).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from ..config import EngineConfig
from ..errors import InvalidConfig
from ..server.config import ServerConfig
from .config import ReplicasConfig
from .ingress import INGRESS, REPLICA, Ingress
from .replica import Load, Replica

DEFAULT_SLOTS = 64  # where the replica chooses them from its memory


def application(
    engine: EngineConfig, server: ServerConfig, config: ReplicasConfig, load: Load | None = None
) -> serve.Application:
    """What `serve.run` takes. load: makes a replica's model from the engine's config; LLM by default."""
    slots = engine.slots or DEFAULT_SLOTS
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        target = config.target_ongoing or slots
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=config.replicas, max_replicas=config.max_replicas, target_ongoing_requests=target
            )
        }
    deployment: Any = serve.deployment
    replicas = deployment(
        Replica,
        name=REPLICA,
        ray_actor_options={"num_gpus": config.gpus, "num_cpus": config.cpus},
        max_ongoing_requests=slots + engine.max_queue + 8,  # its engine refuses first; /health has to get through
        max_queued_requests=engine.max_queue if engine.max_queue else -1,
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=30,
        max_constructor_retry_count=1,
        **scaling,
    ).bind(engine, server, load)
    ingress = deployment(
        serve.ingress(None)(Ingress),
        name=INGRESS,
        num_replicas=config.ingresses or max(config.replicas, config.max_replicas or 0),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,  # the replicas limit
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
    )
    # the replicas ask for keys, the ingress does not
    made: serve.Application = ingress.bind(replicas, replace(server, api_key=None, guest_keys=()))
    return made


def app(args: Mapping[str, Any]) -> serve.Application:
    """For `serve run medusa_serve.cluster.app:app model=… replicas=2` and a YAML file's `args`: fields of
    EngineConfig, ServerConfig and ReplicasConfig. Raises InvalidConfig."""
    left, made = dict(args), []
    for kind in (EngineConfig, ServerConfig, ReplicasConfig):
        types = {field.name: str(field.type) for field in fields(kind)}
        mine = {name: _parsed(left.pop(name), types[name]) for name in list(left) if name in types}
        made.append(kind(**mine))
    if left:
        raise InvalidConfig(f"Unknown option {sorted(left)[0]!r}.", param=sorted(left)[0])
    engine, server, config = made
    return application(engine, server, config)  # type: ignore[arg-type]


def _parsed(value: Any, kind: str) -> Any:
    """`serve run name=value` gives strings."""
    if not isinstance(value, str) or kind.startswith("str"):
        return value
    if kind.startswith("bool"):
        return {"true": True, "false": False}.get(value.lower(), value)
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(value)
    return value
