"""Where a model comes from: what its name means, its config (refused where it could run code), and loading errors as
sentences."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...config import DEFAULT_MODEL
from ...errors import LoadError, reason_of
from ...presets import PRESETS, nearest
from .default_model import ensure_default_model
from .hub import base_of, refusal

_TOO_LARGE = "{} does not fit into the memory; choose a smaller model or a dtype of half the size."


def source_of(model: str, progress: bool) -> tuple[str, str]:
    """→ (the argument of from_pretrained, the short name). Raises LoadError."""
    if model == DEFAULT_MODEL:
        return str(ensure_default_model(progress=progress)), DEFAULT_MODEL
    if model in PRESETS:
        return base_of(PRESETS[model]), model
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"The folder {model} holds no model: there is no config.json in it.")
        return str(path), path.resolve().name
    if path.is_file():
        raise LoadError(f"{model} is a file; a model is a folder with config.json, weights and tokenizer, or a hub id.")
    if "://" in model:
        raise LoadError(f"A model of the hub is given by its id, not its address: {'/'.join(model.split('/')[-2:])}.")
    if path.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1:
        raise LoadError(f"There is no folder {model}.")
    if "/" not in model and (others := nearest(model)):
        raise LoadError(f"There is no model {model!r}.{others}")
    if progress:  # without a network the hub's client retries for half a minute
        print(f"Looking for {model} on the model hub.", file=sys.stderr, flush=True)
    return model, model.split("/")[-1]


def checked_config(source: str, asked: str) -> Any:
    """The model's config. LoadError if it could name code to run (CVE-2026-4372) or is no causal language model's."""
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    raw, _ = PretrainedConfig.get_config_dict(source)
    if not raw:
        raise LoadError(f"{asked} has no config.json: choose a repository that holds a transformers model.")
    _refuse_hidden_code(raw, asked)
    kind = raw.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if "auto_map" in raw:
            raise LoadError(
                f"{asked} needs Python code that comes with it, which is never run here; "
                "choose a model that transformers knows."
            )
        what = f"of type {kind!r}" if kind else "without a model_type"
        raise LoadError(f"{asked} is a model {what}, which this transformers does not know as a causal language model.")
    return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _refuse_hidden_code(raw: Any, asked: str) -> None:
    if isinstance(raw, dict):
        for key, value in raw.items():
            if key.endswith("_implementation_internal") or (key.endswith("attn_implementation") and "/" in str(value)):
                raise LoadError(f"The config.json of {asked} sets {key}, which can make foreign code run; not loaded.")
            _refuse_hidden_code(value, asked)


def hf_config_of(model: str) -> Any:
    """The transformers config of a preset, a folder or a hub id. Raises LoadError."""
    source, _ = source_of(model, False)
    with quiet(), as_load_error(model):
        return checked_config(source, model)


@contextlib.contextmanager
def memory_as_load_error(asked: str) -> Iterator[None]:
    """Turn an error of full memory into a LoadError that says what to do."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise LoadError(_TOO_LARGE.format(asked)) from error


@contextlib.contextmanager
def as_load_error(asked: str) -> Iterator[None]:
    """Turn what transformers and torch raise while loading into a LoadError of one or two sentences."""
    try:
        yield
    except LoadError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise LoadError(_TOO_LARGE.format(asked)) from error
    except OSError as error:
        if Path(asked).expanduser().is_dir():
            raise LoadError(f"The model in {asked} cannot be read: {reason_of(error)}.") from error
        if (said := refusal(asked, error)) is not None:
            raise LoadError(said) from error
        raise LoadError(
            f"{asked!r} is neither a local folder nor a model that the hub could provide ({reason_of(error)}). "
            f"Check the name and the network; {DEFAULT_MODEL!r} needs no hub."
        ) from error
    except Exception as error:  # safetensors, tokenizers and transformers have their own types for damaged files
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise LoadError(_TOO_LARGE.format(asked)) from error
        raise LoadError(f"The model {asked} cannot be loaded: {type(error).__name__}: {reason_of(error)}.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turn off transformers' advice and progress bars while loading (what matters is checked here), but not the hub's
    download bars. Restored afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    levels = logging.get_verbosity(), hub_logging.get_verbosity()
    bars, no_hub_bars = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()  # the hub's too
    if not no_hub_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bars:
            logging.enable_progress_bar()
