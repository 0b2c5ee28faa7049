"""The replicas' options. Without Ray, so that the command line can check them before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import check_int
from ..errors import InvalidConfig


@dataclass(frozen=True, kw_only=True)
class ReplicasConfig:
    """Copies of the model at one address, under Ray Serve.

    replicas        how many; with max_replicas the least
    max_replicas    None: no scaling; else as many as the requests in progress ask for, up to this
    target_ongoing  requests in progress per replica that scaling aims at; None: its slots
    gpus, cpus      of each replica; fractions share one
    ingresses       processes that pass requests on; None: one a replica
    drain_s         how long a replica that is to stop may finish its answers
    """

    replicas: int = 1
    max_replicas: int | None = None
    target_ongoing: float | None = None
    gpus: float = 0.0
    cpus: float = 1.0
    ingresses: int | None = None
    drain_s: float = 120.0

    def __post_init__(self) -> None:
        check_int(self, "replicas", 1, 1024)
        check_int(self, "max_replicas", self.replicas, 1024, optional=True)
        check_int(self, "ingresses", 1, 1024, optional=True)
        for name in ("gpus", "cpus", "target_ongoing", "drain_s"):
            value = getattr(self, name)
            if value is None and name == "target_ongoing":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 86_400:
                raise InvalidConfig(f"{name} must be a number from 0 to 86400, not {value!r}.", param=name)
