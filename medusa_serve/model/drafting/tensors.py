"""Tensor files of unknown origin → checked tensors by name. No code in them is ever run, and no number is trusted.

safetensors first; pickles (.pt, .bin) only with torch.load(weights_only=True). layouts.py says what a name means.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import LoadError

NATIVE_FILE = "heads.safetensors"
# in order of preference; the first that exists is read
HEAD_FILES = (
    NATIVE_FILE,
    "medusa_lm_head.safetensors",
    "medusa_lm_head.pt",
    "medusa_heads.safetensors",
    "medusa_heads.pt",
    "hydra_lm_head.safetensors",
    "hydra_lm_head.pt",
)
MODEL_FILES = (("model", ".safetensors"), ("pytorch_model", ".bin"))
FLOAT8 = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))


@dataclass
class TensorFiles:
    """names: all tensors of the files; tensors: the wanted ones; config: config.json beside them, {} without one."""

    path: Path
    files: list[Path]
    names: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_tensors(path: str | Path, wanted: Callable[[str], bool]) -> TensorFiles:
    """The tensors with a `wanted` name in a file or folder. Raises LoadError where something cannot be read."""
    path = Path(path).expanduser()
    found = TensorFiles(path, find_files(path))
    _read_config(found)
    for file in found.files:
        aliases: dict[str, str] = {}
        if file.suffix == ".safetensors":
            names, tensors, aliases = _read_safetensors(file, wanted)
        else:
            names, tensors = _read_pickle(file, wanted)
        for name in tensors:
            if name in found.tensors:
                raise LoadError(f"{path} holds the tensor {name} in more than one file.")
        found.names += names
        found.tensors |= tensors
        for name, kept in aliases.items():
            # safetensors cannot hold one tensor under two names; its save_model notes which name was dropped for which
            if name not in names and kept in found.tensors and wanted(name):
                found.tensors[name] = found.tensors[kept]
    return found


def find_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder that hold heads or a complete model."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise LoadError(f"There is no file or folder {path}.")
    for name in HEAD_FILES:
        if (path / name).is_file():
            return [path / name]
    for stem, suffix in MODEL_FILES:
        index = path / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _indexed(index)
        shards = sorted(path.glob(f"{stem}*{suffix}"))
        if shards:
            return shards
    raise LoadError(f"{path} holds no heads: no {HEAD_FILES[1]}, {HEAD_FILES[2]}, {NATIVE_FILE} or model*.safetensors.")


def _indexed(index: Path) -> list[Path]:
    """The shards that an index names; a file outside the index's folder is refused."""
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LoadError(f"{index} is not a shard index.") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not (index.parent / shard).is_file():
            raise LoadError(f"{index.name} names the file {shard!r}, which is not in {index.parent}.")
    return [index.parent / shard for shard in shards]


def _read_config(found: TensorFiles) -> None:
    file = (found.path if found.path.is_dir() else found.path.parent) / "config.json"
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError):
        config = None
    if isinstance(config, dict):
        found.config = config
    else:
        found.warnings.append(f"{file} is not a JSON object and was ignored.")


def _read_safetensors(file: Path, wanted: Callable[[str], bool]) -> tuple[list[str], dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            return names, {name: opened.get_tensor(name) for name in names if wanted(name)}, opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{file} is not a complete safetensors file ({error}).") from None


def _read_pickle(file: Path, wanted: Callable[[str], bool]) -> tuple[list[str], dict[str, Tensor]]:
    try:
        # mmap: only the heads' pages are read, even of a complete model
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # the unpickler meets arbitrary bytes: any exception means "not plain tensors"
        raise LoadError(
            f"{file} is not a file of plain tensors ({type(error).__name__}) and was not loaded."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise LoadError(f"{file} holds a {type(state).__name__}, not a dictionary of named tensors.")
    tensors = {name: value for name, value in state.items() if wanted(name)}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise LoadError(f"{name} in {file} is a {type(value).__name__}, not a tensor.")
    return list(state), tensors


def checked(found: TensorFiles, name: str, shape: tuple[int | None, ...], why: str = "") -> Tensor:
    """The tensor `name`, dense, floating, finite, of this shape (None: any number); fp8 is dequantised to fp32."""
    tensor = found.tensors.get(name)
    if tensor is None:
        raise LoadError(f"{found.path} is incomplete: the tensor {name} is missing{why}.")
    _check_dense(found, name, tensor)
    if tensor.dim() != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    ):
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise LoadError(f"{name} in {found.path} has shape {list(tensor.shape)}, expected [{want}]{why}.")
    if tensor.dtype in FLOAT8:
        tensor = _dequantised(found, name, tensor)
    if not tensor.is_floating_point():
        raise LoadError(
            f"{name} in {found.path} has dtype {_short(tensor.dtype)}; only floating-point heads can be read."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise LoadError(f"{name} in {found.path} holds NaN or infinite values.")
    return tensor


def checked_ids(found: TensorFiles, name: str) -> Tensor:
    """A token map: distinct non-negative ids, [V'] int64."""
    tensor = found.tensors[name]
    _check_dense(found, name, tensor)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.numel() == 0:
        raise LoadError(
            f"{name} in {found.path} is not a list of token ids ({_short(tensor.dtype)}{list(tensor.shape)})."
        )
    ids = tensor.long()
    if int(ids.min()) < 0 or ids.unique().numel() != ids.numel():
        raise LoadError(f"{name} in {found.path} holds negative or repeated token ids.")
    return ids


def _check_dense(found: TensorFiles, name: str, tensor: Tensor) -> None:
    """Checked before any computation: a sparse, quantised, meta or stride-0 tensor can claim any size."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise LoadError(f"{name} in {found.path} is not a dense tensor ({tensor.layout}).")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise LoadError(f"{name} in {found.path} claims more values ({list(tensor.shape)}) than it stores.")


def _dequantised(found: TensorFiles, name: str, tensor: Tensor) -> Tensor:
    """fp8 × its scale (one number, or one per output row), fp32. Block scales are refused."""
    scale = found.tensors.get(f"{name}_scale")
    if scale is None:
        raise LoadError(f"{name} in {found.path} is {_short(tensor.dtype)}, and its scale {name}_scale is missing.")
    _check_dense(found, f"{name}_scale", scale)
    per_row = tensor.dim() == 2 and tuple(scale.shape) in ((tensor.shape[0],), (tensor.shape[0], 1))
    if scale.numel() != 1 and not per_row:
        raise LoadError(
            f"{name}_scale in {found.path} has shape {list(scale.shape)}; only one scale a tensor or a row can be read."
        )
    return tensor.float() * scale.float().reshape(-1, 1) if per_row else tensor.float() * scale.float().reshape(())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
