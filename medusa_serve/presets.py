"""What ships with the package: heads for the default model."""

from __future__ import annotations

from pathlib import Path

from .errors import LoadError

FAMILIES = ("sequential", "medusa")  # the better one first: `auto` takes it


def shipped_heads(model: str, heads: str) -> Path | None:
    """The folder of heads for `model` that ships under the name `heads`, or the best that ships for auto.

    None where auto finds nothing. Raises LoadError where a family is asked for that does not ship for the model.
    """
    home = Path(__file__).parent / "heads" / model
    wanted = FAMILIES if heads == "auto" else (heads,)
    found = [home / family for family in wanted if (home / family / "config.json").is_file()]
    if not found and heads != "auto":
        raise LoadError(f"no {heads} heads ship for {model}; give --heads a file or folder, or auto, or none.")
    return found[0] if found else None
