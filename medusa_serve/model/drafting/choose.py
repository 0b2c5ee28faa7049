"""Find the heads that draft for a loaded model, read them, and make them as small as is useful."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...config import AS_ASKED, EngineConfig
from ...presets import FAMILIES, PRESETS, shipped_heads
from ..loading.default_model import cache_folder
from ..loading.hub import heads_at, heads_of
from .draft_formats import as_served
from .drafters import drafter_of
from .files import load_heads, own_heads
from .heads import HeadsInfo

if TYPE_CHECKING:
    from ..loading.load import LoadedModel


class ChosenDrafter(NamedTuple):
    """drafter: None without heads · name: the heads' family, or "none" · notes: the choices, with their reasons"""

    drafter: Any
    name: str
    notes: list[str]


def choose_drafter(config: EngineConfig, loaded: LoadedModel) -> ChosenDrafter:
    """The heads that the options ask for, attached to the model. Raises LoadError."""
    if config.heads == "none" or config.tree == "off":
        return ChosenDrafter(None, "none", [f"no heads ({AS_ASKED if config.heads == 'none' else 'the tree is off'})"])
    path, origin = _find(config.model, config.heads, loaded.source)
    if path is None:
        return ChosenDrafter(None, "none", ["no heads (none ship for this model)"])
    heads, info = heads_on(path, loaded, loaded.source or config.model)
    notes = [f"{info.family} heads from {_short(origin)}", *info.warnings]
    notes += as_served(heads, info, loaded.model, cache_folder(), config.draft_vocab)
    return ChosenDrafter(drafter_of(heads, info, config.tree), info.family, notes)


def heads_on(path: str | Path, loaded: LoadedModel, base_name: str) -> tuple[Any, HeadsInfo]:
    """The heads in a file or folder, attached to the model. base_name: what the user calls it. Raises LoadError."""
    model = loaded.model
    return load_heads(
        path,
        hidden_size=model.config.get_text_config().hidden_size,
        vocab_size=model.get_input_embeddings().num_embeddings,
        dtype=model.dtype,
        device=model.device,
        base_model=model,
        base_name=base_name,
    )


def _find(model: str, heads: str, source: str) -> tuple[Path | None, str]:
    """→ (the heads' file or folder, or None; its origin in words). heads: EngineConfig's, but not "none" """
    preset = PRESETS.get(model)
    if heads == "auto" and preset is not None and preset.heads is not None:
        return heads_of(preset), preset.heads
    if heads not in ("auto", *FAMILIES):
        return heads_at(heads), heads
    shipped = shipped_heads(model, heads)
    return (shipped, "the package") if shipped else (own_heads(source), "the model's own folder")


def _short(path: str) -> str:
    """The end of a long path: enough for the user who gave it."""
    parts = Path(path).parts
    return path if len(parts) < 4 else f"…/{parts[-2]}/{parts[-1]}"
