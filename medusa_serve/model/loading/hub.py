"""Downloads from a model hub: heads and jointly trained models as local folders, and a sentence for each refusal."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import Any

from ...errors import LoadError, reason_of
from ...presets import PRESETS, Preset
from ..drafting.tensors import HEAD_FILES

HEADS_ONLY = ["config.json", *HEAD_FILES, "model*.safetensors*", "pytorch_model*.bin*"]


def base_of(preset: Preset) -> str:
    """The argument of from_pretrained: the base's id; or a folder, if the heads are read from there too (joint)."""
    return str(folder_of(preset.base, None)) if preset.joint else preset.base


def heads_of(preset: Preset) -> Path:
    """The folder of a preset's heads. Raises LoadError."""
    assert preset.heads is not None
    return folder_of(preset.heads, None if preset.joint else HEADS_ONLY)


def heads_at(place: str) -> Path:
    """The file or folder of heads, or the local folder of a hub id. Raises LoadError."""
    path = Path(place).expanduser()
    if path.exists():
        return path
    if place.count("/") != 1 or place[0] in "./~":
        raise LoadError(f"There is no file or folder {place}; heads are auto, none, a file, a folder, or a hub id.")
    return folder_of(place, HEADS_ONLY)


def folder_of(repo: str, patterns: list[str] | None) -> Path:
    """A local folder itself; for a hub id, the folder in the hub's cache once its files (of these patterns only) are
    there. Of two formats of the same weights, the one without code is taken. Raises LoadError."""
    if Path(repo).is_dir():
        return Path(repo)
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(repo)
        ignore = ["*.bin", "*.pt"] if any(name.endswith(".safetensors") for name in names) else None
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=ignore))
    except Exception as error:  # the hub's client raises its own types, httpx's and the operating system's
        said = refusal(repo, error) or f"{repo} could not be downloaded from the model hub ({reason_of(error)})."
        raise LoadError(said) from error


def refusal(repo: str, error: BaseException) -> str | None:
    """A sentence that says what to do where the hub refuses `repo`; None for any other error. transformers wraps the
    errors of the hub's client, so causes are searched too."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    causes: list[BaseException | None] = [error]
    while (last := causes[-1]) is not None:
        causes.append(last.__cause__ or last.__context__)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, put a token of yours (from"
            " huggingface.co/settings/tokens) into the environment variable HF_TOKEN, and run this again."
        )
    if any("Invalid credentials" in str(cause) for cause in causes):
        return "The model hub refuses the token in HF_TOKEN: replace or remove it, and run this again."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        others = _spelt_alike(repo)
        what_to_do = f"Did you mean {' or '.join(others)}?" if others else "Check how it is spelt."
        return f"The model hub has no {repo}, or it is private (then HF_TOKEN must hold a token). {what_to_do}"
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return f"{repo!r} is not a model hub id: these look like Qwen/Qwen2.5-0.5B-Instruct."
    return None


def _spelt_alike(repo: str) -> list[str]:
    """Hub ids spelt like `repo`, the likeliest first: of the presets, of the same owner, or of the same name."""
    from huggingface_hub import HfApi

    owner, _, name = repo.rpartition("/")
    known = {preset.base for preset in PRESETS.values()}
    queries: list[dict[str, Any]] = [
        {"search": name, "limit": 20},
        *([{"author": owner, "limit": 500}] if owner else []),
    ]
    for query in queries:
        with contextlib.suppress(Exception):  # it is a guess: without it the sentence is shorter
            known |= {model.id for model in HfApi().list_models(sort="downloads", **query)}
    lower = {one.lower(): one for one in known}
    return [lower[one] for one in difflib.get_close_matches(repo.lower(), lower, n=2, cutoff=0.75)]
