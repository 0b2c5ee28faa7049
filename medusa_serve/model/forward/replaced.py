"""The one way in which attributes of objects, a module's `forward` above all, give way to others for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

MISSING = object()


def replace_attributes(changes: Iterable[tuple[Any, str, Any]]) -> Callable[[], None]:
    """Put values in the place of attributes: (object, name, value) each. → what gives every object back as it was; a
    second call of it does nothing. What is replaced first is given back last."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for owner, name, value in changes:
        own = vars(owner)
        before.append((own, name, own.get(name, MISSING)))
        own[name] = value  # not by setattr: nn.Module's looks for parameters

    def undo() -> None:
        while before:
            own, name, value = before.pop()
            if value is MISSING:
                own.pop(name, None)
            else:
                own[name] = value

    return undo
