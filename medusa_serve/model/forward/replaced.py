"""The only place that replaces attributes of objects for a while, above all the `forward` of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

MISSING = object()


def replace_attributes(changes: Iterable[tuple[Any, str, Any]]) -> Callable[[], None]:
    """Replace attributes, each given as (object, name, value). → a function that restores them in reverse order; its
    second call does nothing."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for owner, name, value in changes:
        own = vars(owner)
        before.append((own, name, own.get(name, MISSING)))
        own[name] = value  # not by setattr: that of nn.Module looks for parameters

    def undo() -> None:
        while before:
            own, name, value = before.pop()
            if value is MISSING:
                own.pop(name, None)
            else:
                own[name] = value

    return undo
