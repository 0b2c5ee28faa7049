"""Files of draft heads: one reader for the published layouts (evidence/medusa.md §1), and writers.

Every layout becomes the state_dict of one of our modules ("state" below), whose sizes are read from its tensors; one
function builds the module from them. The config is only compared: where it disagrees, a warning names both numbers.

A, B  {h}.{l}.linear.weight/.bias, {h}.{L}.weight (reference .pt; TGI safetensors)   C  the same without {h}.{L}: tied
D     medusa_head. + base model      F  medusa_heads. + base model (ModelOpt)        G  medusa_head_{h}.   H  medusa_head.
E     blocks.{h}.layers.{l}.weight, lm_heads.{h}.weight or one lm_head.weight, token_map (vLLM)
hydra hydra_mlp.{h}.…, hydra_lm_head.{h}.…   native  our state_dicts under medusa. / sequential. / hydra.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import LoadError
from .checkpoint_files import NATIVE_FILE, TensorFiles, checked, checked_ids, read_tensors
from .heads import Family, Heads, HeadsInfo, HydraHeads, MedusaHeads, SequentialHeads, num_parameters

State = dict[str, Tensor]
PADDING = 1024  # an output layer may have this many more rows than the base: padding, not another vocabulary

_WRAP = r"(?:(?:module|model|base_model|_orig_mod)\.)*"
_PARALLEL = re.compile(
    _WRAP + r"(?P<kind>medusa_heads?[._])?(?P<head>\d+)\.(?P<layer>\d+)\.(?P<linear>linear\.)?(?P<leaf>weight|bias)$"
)
_BLOCK = re.compile(_WRAP + r"(?:medusa_heads\.)?blocks\.(?P<head>\d+)\.layers\.(?P<layer>\d+)\.(?P<leaf>weight|bias)$")
_LM_HEAD = re.compile(_WRAP + r"(?:medusa_heads\.)?(?:lm_heads\.(?P<head>\d+)|lm_head)\.weight$")
_TOKEN_MAP = re.compile(_WRAP + r"(?:medusa_heads\.)?token_map$")
_HYDRA = re.compile(
    r"(?:module\.)?(?:hydra_head\.)?(?:hydra_mlp\.(?P<head>\d+)\.(?P<layer>\d+)\.(?P<part>linear|res_connection)"
    r"|hydra_lm_head\.(?P<out>\d+)(?P<dropout>\.1)?)\.(?P<leaf>weight|bias)$"
)
_HYDRA_PREFIX = re.compile(r"(?:module\.)?(?:hydra_head\.)?prefix_embed+ing_layer\.")
_NATIVE = re.compile(r"(medusa|sequential|hydra)\.(?=[a-z])(.+)$")
_BASE = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in)\.weight$|(?:^|\.)(?:layers|h)\.\d+\.\w*(?:attn|mlp|att)")
_BORROWED = re.compile(r"(?:^|\.)input_embed_fn\.|(?:input|output|weight)_(?:scale|scale_inv)$")


@dataclass
class Parsed:
    """A layout read: `state` is the state_dict of our module of that family, still in the file's dtypes."""

    family: Family
    layout: str
    state: State
    warnings: list[str] = field(default_factory=list)
    hidden_inputs: tuple[int, ...] = (-1,)


def load_heads(
    path: str | Path,
    *,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    base_model: Any = None,
    base_name: str | None = None,
) -> tuple[Heads, HeadsInfo]:
    """Heads of any layout, fitted to a base of this hidden size and vocabulary; attached to `base_model` if given.

    base_name: what the base was loaded from. Heads inside a full model (D, F) are given only to that very model.
    """
    found, parsed, config = _open(path)
    if full_model := split_names(found.names)[1]:
        same = base_name is not None and Path(base_name).expanduser().resolve() == found.path.resolve()
        if not same:
            raise LoadError(
                f"{path} is a whole model with its own heads ({len(full_model)} tensors of a base model beside them); they "
                "were trained with these base weights and do not fit another base. Load the model from the same folder."
            )
    _fit(parsed, found, hidden_size, vocab_size)
    named = config.get("base_model_name_or_path")
    if base_name and isinstance(named, str) and named not in ("", "N/A") and _stem(named) != _stem(base_name):
        parsed.warnings.append(f"The heads name {named} as their base, the base in use is {base_name}.")
    parsed.state = {name: t.to(device, t.dtype if name.endswith("token_map") else dtype) for name, t in parsed.state.items()}
    for name, tensor in parsed.state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise LoadError(f"{name} in {path} does not fit into {str(dtype).removeprefix('torch.')}: values overflow.")
    heads = build(parsed, path, config)
    info = replace(_info(heads, parsed, found, config), vocab_size=vocab_size)
    if base_model is not None:
        heads.attach(base_model.get_output_embeddings(), base_model.get_input_embeddings())
    return heads, info


def inspect_heads(path: str | Path) -> HeadsInfo:
    """What a file holds, without a base model; wrong or partial files raise LoadError as in `load_heads`."""
    found, parsed, config = _open(path)
    return _info(build(parsed, path, config), parsed, found, config)


def split_full_model(path: str | Path) -> tuple[list[str], list[str]]:
    """Names of the tensors that are heads, and of those that are the base model's (none: the file holds heads only)."""
    return split_names(read_tensors(path, lambda name: False).names)


def split_names(names: list[str]) -> tuple[list[str], list[str]]:
    """(heads, base) of a full model with embedded heads (D, F); base is empty where no base tensor stands beside heads."""
    heads = [name for name in names if (match := _PARALLEL.match(name)) and match["kind"]]
    if not heads or not any(_BASE.search(name) for name in names):
        return [name for name in names if _is_head(name)], []
    embedded = set(heads)
    return heads, [name for name in names if name not in embedded and not _BORROWED.search(name)]


def _is_head(name: str) -> bool:
    name = name.removesuffix("_scale")
    patterns = (_PARALLEL, _BLOCK, _LM_HEAD, _TOKEN_MAP, _HYDRA, _NATIVE)
    return any(pattern.match(name) for pattern in patterns)


def _open(path: str | Path) -> tuple[TensorFiles, Parsed, dict[str, Any]]:
    """Read, recognise the layout by tensor names, convert, compare with the config."""
    found = read_tensors(path, _is_head)
    names = list(found.tensors)
    if any(_HYDRA_PREFIX.match(name) for name in found.names):
        raise LoadError(
            f"{path} holds Hydra heads of the kind prefix-mlp: they need an attention layer over all earlier hidden states "
            "with a KV cache of its own (prefix_embeding_layer), which is not offered. Heads of the kind mlp can be read."
        )
    arch = found.config.get("hydra_head_arch", "mlp")
    if any(_NATIVE.match(name) for name in names):
        parsed = _native(found)
    elif any(_HYDRA.match(name) for name in names):
        parsed = _hydra(found)
    elif any(_BLOCK.match(name) or ".lm_heads." in f".{name}" for name in names):
        parsed = _vllm(found)
    elif any(_PARALLEL.match(name) for name in names):
        parsed = _parallel(found)
    elif arch != "mlp":
        raise LoadError(f"{path} holds Hydra heads of the kind {arch}; only mlp can be read.")
    else:
        some = ", ".join(found.names[:3]) or "none"
        raise LoadError(f"{path} holds no draft heads of a known layout (its first tensors: {some}).")
    parsed.warnings[:0] = found.warnings
    if not split_names(found.names)[1]:
        extra = [name for name in found.names if not _is_head(name) and not _BORROWED.search(name)]
        if extra:
            parsed.warnings.append(f"{len(extra)} tensors are no part of the heads and were ignored, first {extra[0]}.")
    return found, parsed, found.config


# --- layouts → state ---------------------------------------------------------------------------------------------------


@dataclass
class _Table:
    """Tensor names of parallel heads: `block` and `out` make the name for (head, layer, leaf) and (head, leaf)."""

    blocks: dict[tuple[int, int, str], str] = field(default_factory=dict)
    outs: dict[tuple[int, str], str] = field(default_factory=dict)
    shared_out: str | None = None

    def put(self, where: dict[Any, str], key: Any, name: str, found: TensorFiles) -> None:
        if key in where:
            raise LoadError(f"{found.path} holds the same tensor twice, as {where[key]} and as {name}.")
        where[key] = name


def _stack(table: _Table, found: TensorFiles, block_name: Any, out_name: Any, warnings: list[str], layers: int) -> State:
    """Stack the tensors of K heads: weight [L, K, H, H], bias [L, K, H], output.weight [K, V', H] or [V', H]."""
    heads = 1 + max([head for head, _, _ in table.blocks] + [head for head, _ in table.outs])
    rows = range(heads)
    has_bias = any(leaf == "bias" for _, _, leaf in table.blocks)
    for layer in range(1, layers):
        # [ResBlock] * L registers one block L times (the reference does); writers that drop repeated tensors keep the first
        if not any(key[1] == layer for key in table.blocks) and any(key[1] == 0 for key in table.blocks):
            warnings.append(f"Layer {layer} is not in the file; layer 0 is used again, as [block] * L shares it.")
            table.blocks |= {(h, layer, leaf): name for (h, l, leaf), name in table.blocks.items() if l == 0}
    first = found.tensors[next(iter(table.blocks.values() if table.blocks else [*table.outs.values(), table.shared_out]))]
    hidden = first.shape[-1] if first.dim() else 0

    def get(where: dict[Any, str], key: Any, name: str, *shape: int | None) -> Tensor:
        why = f" (the file has {heads} heads of {layers} layers, hidden size {hidden})"
        return checked(found, where.get(key, name), shape, why)

    def grid(leaf: str, *shape: int) -> Tensor:
        blocks = [[get(table.blocks, (h, l, leaf), block_name(h, l, leaf), *shape) for h in rows] for l in range(layers)]
        return torch.stack([torch.stack(of_layer) for of_layer in blocks]) if layers else torch.empty(0, heads, *shape)

    state = {"weight": grid("weight", hidden, hidden)}
    if has_bias:
        state["bias"] = grid("bias", hidden)
    if table.shared_out:
        state["output.weight"] = checked(found, table.shared_out, (None, hidden))
    elif table.outs:
        outs = [get(table.outs, (h, "weight"), out_name(h, "weight"), None, hidden) for h in rows]
        for h in rows:
            checked(found, table.outs[h, "weight"], tuple(outs[0].shape), " like the first head")
        state["output.weight"] = torch.stack(outs)
        if any(leaf == "bias" for _, leaf in table.outs):
            vocab = outs[0].shape[0]
            state["output.bias"] = torch.stack([get(table.outs, (h, "bias"), out_name(h, "bias"), vocab) for h in rows])
    return state
