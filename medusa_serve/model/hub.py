"""Heads and jointly trained models from a model hub, as local folders."""

from __future__ import annotations

from pathlib import Path

from ..errors import LoadError
from ..presets import Preset
from .checkpoint_files import HEAD_FILES
from .codec import reason_of

HEADS_ONLY = ["config.json", *HEAD_FILES, "model*.safetensors*", "pytorch_model*.bin*"]


def base_of(preset: Preset) -> str:
    """What from_pretrained gets: the base's id; of a jointly trained one a folder, as its heads are read from there."""
    return str(folder_of(preset.base, None)) if preset.joint else preset.base


def heads_of(preset: Preset) -> Path:
    """The folder of a preset's heads. Raises LoadError."""
    assert preset.heads is not None
    return folder_of(preset.heads, None if preset.joint else HEADS_ONLY)


def folder_of(repo: str, patterns: list[str] | None) -> Path:
    """A local folder as it is; a hub id once its files (of these patterns alone) are in the hub's own cache. Of two
    formats of the same weights the one that holds no code is taken. Raises LoadError."""
    if Path(repo).is_dir():
        return Path(repo)
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(repo)
        ignore = ["*.bin", "*.pt"] if any(name.endswith(".safetensors") for name in names) else None
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=ignore))
    except Exception as error:  # the hub's client raises types of its own, httpx's and the operating system's
        raise LoadError(f"{repo} could not be had from the model hub ({reason_of(error)}).") from error
