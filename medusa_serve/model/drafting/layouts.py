"""The published layouts of draft heads: recognised by tensor names, turned into the state_dict of one of our modules.

A, B    {h}.{l}.linear.weight/.bias, {h}.{L}.weight (reference .pt; TGI safetensors)
C       the same without {h}.{L}.weight: tied to the base's output layer
D, F    medusa_head. (reference v1.0) or medusa_heads. (ModelOpt) before A's names, beside a complete base model
G, H    medusa_head_{h}. (NxDI) or medusa_head. (MLC) before A's names, without a base model
E       blocks.{h}.layers.{l}.weight, lm_heads.{h}.weight or one lm_head.weight, token_map (vLLM)
hydra   hydra_mlp.{h}.…, hydra_lm_head.{h}.…
native  our own state_dicts under medusa. / sequential. / hydra.

h: head, l: layer. Letters in shapes: K heads, L layers, H hidden size, V' rows of the heads' own output layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import LoadError
from .heads import Family, Heads, HeadsInfo, MedusaHeads
from .tensors import TensorFiles, checked, checked_ids

State = dict[str, Tensor]
Config = dict[str, Any]
MAX_LAYERS = 16

_WRAP = r"(?:(?:module|model|base_model|_orig_mod)\.)*"
_PARALLEL = re.compile(
    _WRAP
    + r"(?P<kind>medusa_heads?[._])?(?P<head>\d{1,3})\.(?P<layer>\d{1,3})\.(?P<linear>linear\.)?(?P<leaf>weight|bias)$"
)
_BLOCK = re.compile(
    _WRAP + r"(?:medusa_heads\.)?blocks\.(?P<head>\d{1,3})\.layers\.(?P<layer>\d{1,3})\.(?P<leaf>weight|bias)$"
)
_LM_HEAD = re.compile(_WRAP + r"(?:medusa_heads\.)?lm_heads?(?:\.(?P<head>\d{1,3}))?\.(?P<leaf>weight)$")
_TOKEN_MAP = re.compile(_WRAP + r"(?:medusa_heads\.)?token_map$")
_HYDRA = re.compile(
    r"(?:module\.)?(?:hydra_head\.)?(?:hydra_mlp\.(?P<head>\d{1,3})\.(?P<layer>\d{1,3})\.(?P<part>linear|res_connection)"
    r"|hydra_lm_head\.(?P<out>\d{1,3})(?:\.1)?)\.(?P<leaf>weight|bias)$"
)
_HYDRA_PREFIX = re.compile(r"(?:module\.)?(?:hydra_head\.)?prefix_embed+ing_layer\.")
_NATIVE = re.compile(r"(?P<family>medusa|sequential|hydra)\.(?P<rest>[a-z].*)$")
_BASE = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in)\.weight$|(?:^|\.)(?:layers|h)\.\d+\.\w*(?:attn|attention|mlp)\b"
)
# tensors found beside heads that are not needed: Hydra's copy of the base embedding, activation scales
_BORROWED = re.compile(r"(?:^|\.)input_embed_fn\.|(?:input|output|weight)_scale(?:_inv)?$")


@dataclass
class Parsed:
    """A layout read: `state` is the state_dict of our module of that family, still in the file's dtypes."""

    family: Family
    layout: str
    state: State
    warnings: list[str] = field(default_factory=list)
    hidden_inputs: tuple[int, ...] = (-1,)


@dataclass
class _Table:
    """Names of the tensors of parallel heads; the two functions name a tensor that is missing."""

    block_name: Callable[[int, int, str], str]
    out_name: Callable[[int, str], str]
    blocks: dict[tuple[int, int, str], str] = field(default_factory=dict)  # (head, layer, leaf) → name
    outs: dict[tuple[int, str], str] = field(default_factory=dict)  # (head, leaf) → name
    shared_out: str | None = None


def is_head(name: str) -> bool:
    """Whether a tensor of this name can be part of heads, or the fp8 scale of such a part."""
    patterns = (_PARALLEL, _BLOCK, _LM_HEAD, _TOKEN_MAP, _HYDRA, _NATIVE)
    return any(pattern.match(name.removesuffix("_scale")) for pattern in patterns)


def split_names(names: list[str]) -> tuple[list[str], list[str]]:
    """(names of heads, names of the base): the latter is empty unless a complete model holds the heads (D, F)."""
    heads = [name for name in names if (m := _PARALLEL.match(name.removesuffix("_scale"))) and m["kind"]]
    if not heads or not any(_BASE.search(name) for name in names):
        return [name for name in names if is_head(name)], []
    embedded = re.compile(_WRAP + r"medusa_heads?[._]\d")
    return heads, [name for name in names if not embedded.match(name)]


def parse(found: TensorFiles) -> Parsed:
    """The layout of these tensors and the state made of them; LoadError names what is missing or wrong."""
    names = list(found.tensors)
    if any(_HYDRA_PREFIX.match(name) for name in found.names):
        raise LoadError(
            f"{found.path} holds Hydra heads of the kind prefix-mlp: they need an attention layer over all earlier "
            "hidden states, with its own KV cache (prefix_embeding_layer.*); only the kind mlp can be read."
        )
    base = split_names(found.names)[1]
    if any(_NATIVE.match(name) for name in names):
        parsed = _native(found)
    elif any(_HYDRA.match(name) for name in names):
        parsed = _hydra(found)
    elif any(_BLOCK.match(name) or "lm_heads." in name for name in names):
        parsed = _vllm(found)
    elif any(_PARALLEL.match(name) for name in names):
        parsed = _parallel(found, embedded=bool(base))
    elif (arch := found.config.get("hydra_head_arch", "mlp")) != "mlp":
        raise LoadError(f"{found.path} holds Hydra heads of the kind {arch}; only mlp can be read.")
    else:
        some = ", ".join(found.names[:3]) or "none"
        raise LoadError(f"{found.path} holds no draft heads of a known layout (its first tensors: {some}).")
    parsed.warnings[:0] = found.warnings
    extra = [name for name in found.names if not is_head(name) and not _BORROWED.search(name)]
    if extra and not base:
        parsed.warnings.append(f"{len(extra)} tensors are no part of the heads and were ignored, first {extra[0]}.")
    return parsed


def _put(where: dict[Any, str], key: Any, name: str, found: TensorFiles) -> None:
    if key in where:
        raise LoadError(f"{found.path} holds the same tensor twice, as {where[key]} and as {name}.")
    where[key] = name


def _parallel(found: TensorFiles, embedded: bool) -> Parsed:
    """A, B, C, D, F, G, H: numbers as names; K = 1 + the largest head, L = the index of the output layer."""
    matches = {name: m for name in found.tensors if (m := _PARALLEL.match(name))}
    name, match = next(iter(matches.items()))
    lead, kind = name[: match.start("head")], match["kind"]
    out_layers = {int(m["layer"]): name for name, m in matches.items() if not m["linear"]}
    if len(out_layers) > 1:
        raise LoadError(f"{found.path} holds output layers with different numbers: {', '.join(out_layers.values())}.")
    layers = next(iter(out_layers), None)
    if layers is None:
        layers = 1 + max(int(m["layer"]) for m in matches.values())
    table = _Table(
        lambda head, layer, leaf: f"{lead}{head}.{layer}.linear.{leaf}",
        lambda head, leaf: f"{lead}{head}.{layers}.{leaf}",
    )
    for name, m in matches.items():
        if not m["linear"]:
            _put(table.outs, (int(m["head"]), m["leaf"]), name, found)
        elif int(m["layer"]) < layers:
            _put(table.blocks, (int(m["head"]), int(m["layer"]), m["leaf"]), name, found)
        else:
            raise LoadError(f"{name} in {found.path} comes after the output layer {next(iter(out_layers.values()))}.")
    if embedded:
        layout = "D" if kind == "medusa_head." else "F"
    elif kind:
        layout = {"medusa_heads.": "F", "medusa_head.": "H"}.get(kind, "G")
    else:
        layout = "C" if not table.outs else "B" if found.files[0].suffix == ".safetensors" else "A"
    parsed = Parsed("medusa", layout, {})
    parsed.state = _stack(table, layers, found, parsed.warnings)
    return parsed


def _vllm(found: TensorFiles) -> Parsed:
    """E: one output layer a head, or one for all (lm_head, or lm_heads.0 alone), or none: tied."""
    names = list(found.tensors)
    sample = next(name for name in names if _BLOCK.match(name) or "lm_heads." in name)
    lead = re.split(r"blocks\.|lm_heads\.", sample)[0]
    table = _Table(
        lambda head, layer, leaf: f"{lead}blocks.{head}.layers.{layer}.{leaf}",
        lambda head, leaf: f"{lead}lm_heads.{head}.{leaf}",
    )
    for name in names:
        if m := _BLOCK.match(name):
            _put(table.blocks, (int(m["head"]), int(m["layer"]), m["leaf"]), name, found)
        elif (m := _LM_HEAD.match(name)) and m["head"]:
            _put(table.outs, (int(m["head"]), m["leaf"]), name, found)
        elif m:
            table.shared_out = name
    if set(table.outs) == {(0, "weight")} and any(head for head, _, _ in table.blocks):
        table.shared_out = table.shared_out or table.outs[0, "weight"]
        table.outs = {}
    layers = 1 + max((layer for _, layer, _ in table.blocks), default=-1)
    parsed = Parsed("medusa", "E", {})
    parsed.state = _stack(table, layers, found, parsed.warnings)
    for name in names:
        if _TOKEN_MAP.match(name):
            parsed.state["output.token_map"] = checked_ids(found, name)
    return parsed


def _stack(table: _Table, layers: int, found: TensorFiles, warnings: list[str]) -> State:
    """Tensors of K heads → weight [L, K, H, H], bias [L, K, H], output.weight [K, V', H] or [V', H], output.bias."""
    blocks, outs = table.blocks, table.outs
    heads = range(1 + max([head for head, _, _ in blocks] + [head for head, _ in outs], default=0))
    if layers > MAX_LAYERS:
        raise LoadError(f"{found.path} claims {layers} layers a head; at most {MAX_LAYERS} can be read.")
    for layer in range(1, layers):
        # `[ResBlock] * L` is one block used L times; writers that drop repeated tensors keep only the first
        if not any(key[1] == layer for key in blocks):
            warnings.append(f"Layer {layer} is not in the file; layer 0 is used again: one block for all layers.")
            blocks |= {(head, layer, leaf): name for (head, at, leaf), name in blocks.items() if at == 0}
    first = found.tensors[next(iter([*blocks.values(), *outs.values(), table.shared_out or ""]))]
    hidden = first.shape[-1] if first.dim() else 0
    why = f" ({len(heads)} heads of {layers} layers, hidden size {hidden})"

    def grid(leaf: str, *shape: int) -> Tensor:
        def get(head: int, layer: int) -> Tensor:
            name = blocks.get((head, layer, leaf), table.block_name(head, layer, leaf))
            return checked(found, name, shape, why)

        rows = [torch.stack([get(head, layer) for head in heads]) for layer in range(layers)]
        return torch.stack(rows) if rows else first.new_empty(0, len(heads), *shape, dtype=torch.get_default_dtype())

    def outputs(leaf: str, *shape: int | None) -> Tensor:
        tensors: list[Tensor] = []
        for head in heads:
            want = tuple(tensors[0].shape) if tensors else shape
            tensors.append(checked(found, outs.get((head, leaf), table.out_name(head, leaf)), want, why))
        return torch.stack(tensors)

    state = {"weight": grid("weight", hidden, hidden)}
    if any(leaf == "bias" for _, _, leaf in blocks):
        state["bias"] = grid("bias", hidden)
    if table.shared_out:
        state["output.weight"] = checked(found, table.shared_out, (None, hidden), why)
    elif outs:
        state["output.weight"] = outputs("weight", None, hidden)
        if any(leaf == "bias" for _, leaf in outs):
            state["output.bias"] = outputs("bias", state["output.weight"].shape[1])
    return state


def _hydra(found: TensorFiles) -> Parsed:
    """Hydra's mlp heads. Grounded ones see drafted tokens; others are Medusa heads with a bias in the output layer."""
    matches = {name: m for name in found.tensors if (m := _HYDRA.match(name))}
    indexes = [int(m["layer"]) for m in matches.values() if m["part"]]
    step = 2 if indexes and min(indexes) == 1 else 1  # a Dropout before each block moves it to an odd index
    layers = 0 if not indexes else (max(indexes) + 1) // step
    lead = re.split(r"hydra_mlp\.|hydra_lm_head\.", next(iter(matches)))[0]
    dropout = ".1" if any(f"{lead}hydra_lm_head.0.1.{leaf}" in matches for leaf in ("weight", "bias")) else ""

    def name_of(head: int, layer: int, leaf: str, part: str = "linear") -> str:
        return f"{lead}hydra_mlp.{head}.{layer * step + step - 1}.{part}.{leaf}"

    table = _Table(name_of, lambda head, leaf: f"{lead}hydra_lm_head.{head}{dropout}.{leaf}")
    for name, m in matches.items():
        if m["out"]:
            _put(table.outs, (int(m["out"]), m["leaf"]), name, found)
        elif m["part"] == "linear":
            _put(table.blocks, (int(m["head"]), int(m["layer"]) // step, m["leaf"]), name, found)
    if not layers or not table.outs:
        name = table.out_name(0, "weight") if layers else name_of(0, 0, "weight")
        raise LoadError(f"{found.path} is incomplete: the tensor {name} is missing.")
    offset = found.config.get("hidden_state_offset", 0)
    inputs = (-(offset + 1),) if isinstance(offset, int) and 0 <= offset < 1000 else (-1,)
    if not any(m["part"] == "res_connection" for m in matches.values()):
        parsed = Parsed("medusa", "hydra", {}, hidden_inputs=inputs)
        parsed.state = _stack(table, layers, found, parsed.warnings)
        return parsed

    heads = 1 + max([head for head, _, _ in table.blocks] + [head for head, _ in table.outs])
    parsed = Parsed("hydra", "hydra", {}, hidden_inputs=inputs)
    hidden = checked(found, name_of(0, 0, "weight"), (None, None)).shape[0]
    for head in range(heads):
        for leaf, shape in (("weight", (hidden, (head + 2) * hidden)), ("bias", (hidden,))):
            parts = [checked(found, name_of(head, 0, leaf, part), shape) for part in ("linear", "res_connection")]
            parsed.state[f"first.{head}.{leaf}"] = torch.cat(parts)
    # after the first block come Medusa's blocks, numbered one layer higher
    table.blocks = {(head, at - 1, leaf): name for (head, at, leaf), name in table.blocks.items() if at}
    table.block_name = lambda head, layer, leaf: name_of(head, layer + 1, leaf)
    parsed.state |= _stack(table, layers - 1, found, parsed.warnings)
    if layers == 1:
        parsed.state["bias"] = parsed.state["weight"].new_empty(0, heads, hidden)
    return parsed


def _native(found: TensorFiles) -> Parsed:
    """Our own: names and shapes are compared with the module when it is built."""
    matches = {name: m for name in found.tensors if (m := _NATIVE.match(name))}
    families = sorted({m["family"] for m in matches.values()})
    if len(families) > 1:
        raise LoadError(f"{found.path} mixes heads of several families: {', '.join(families)}.")
    state: State = {}
    for name, m in matches.items():
        if m["rest"] == "output.token_map":
            state[m["rest"]] = checked_ids(found, name)
        else:
            state[m["rest"]] = checked(found, name, (None,) * found.tensors[name].dim())
    return Parsed(families[0], "native", state)  # type: ignore[arg-type]


def to_layout(heads: Heads, info: HeadsInfo, layout: str) -> tuple[State, Config]:
    """The reverse of `parse`: (tensors by the layout's names, config.json). LoadError where it cannot hold them."""
    if layout == "native":
        return _native_state(heads, info)
    writers = {"A": _reference_state, "B": _reference_state, "C": _tied_state, "E": _vllm_state}
    if layout not in writers:
        raise LoadError(f"Heads cannot be written in the layout {layout!r}; there are native, {', '.join(writers)}.")
    if not isinstance(heads, MedusaHeads):
        raise LoadError(f"Layout {layout} holds Medusa heads only; {heads.family} heads are written as native.")
    return writers[layout](heads, info, layout)


def _native_state(heads: Heads, info: HeadsInfo) -> tuple[State, Config]:
    config = {
        "format": "medusa_serve heads",
        "family": heads.family,
        "hidden_size": heads.hidden_size,
        "vocab_size": info.vocab_size or None,
        "max_depth": heads.max_depth,
        "hidden_inputs": list(info.hidden_inputs),
    }
    return {f"{heads.family}.{name}": tensor for name, tensor in heads.state_dict().items()}, config


def _blocks(heads: MedusaHeads, name: str, layout: str) -> State:
    """The blocks under the names that `name` ("{h}", "{l}", "{leaf}") makes; A, B, C always hold a bias."""
    num_layers, num_heads, _, hidden = heads.weight.shape
    bias: Tensor | None = heads.bias
    if bias is None and layout != "E":
        bias = heads.weight.new_zeros(num_layers, num_heads, hidden)
    state: State = {}
    for h in range(num_heads):
        for layer in range(num_layers):
            state[name.format(h=h, l=layer, leaf="weight")] = heads.weight[layer, h]
            if bias is not None:
                state[name.format(h=h, l=layer, leaf="bias")] = bias[layer, h]
    return state


def _outputs(heads: MedusaHeads, layout: str) -> list[Tensor]:
    """The output weight of each head [V', H]; the base's where they are tied."""
    weight = heads.output.weight
    if weight is None:
        raise LoadError(f"Layout {layout} holds output layers and these heads are tied: attach them to the base first.")
    if heads.output.bias is not None:
        raise LoadError(f"Layout {layout} has no place for the bias of the output layer.")
    return list(weight) if weight.dim() == 3 else [weight] * heads.max_depth


def _reference_state(heads: MedusaHeads, info: HeadsInfo, layout: str) -> tuple[State, Config]:
    """A and B: every head with its own output layer."""
    if heads.output.token_map is not None:
        raise LoadError(f"Layout {layout} has no place for a draft vocabulary (token_map); E and native have.")
    num_layers = heads.weight.shape[0]
    state = _blocks(heads, "{h}.{l}.linear.{leaf}", layout)
    state |= {f"{h}.{num_layers}.weight": weight for h, weight in enumerate(_outputs(heads, layout))}
    return state, _reference_config(heads, info)


def _tied_state(heads: MedusaHeads, info: HeadsInfo, layout: str) -> tuple[State, Config]:
    """C: blocks only; its readers take one block a head."""
    if not heads.output.tied or heads.output.token_map is not None:
        raise LoadError("Layout C holds tied heads without a draft vocabulary only; B, E and native hold the others.")
    if heads.weight.shape[0] != 1:
        raise LoadError(f"Layout C holds heads of one layer, these have {heads.weight.shape[0]}.")
    return _blocks(heads, "{h}.{l}.linear.{leaf}", layout), _reference_config(heads, info) | {"version": "2"}


def _reference_config(heads: MedusaHeads, info: HeadsInfo) -> Config:
    config: Config = {"medusa_num_heads": heads.max_depth, "medusa_num_layers": heads.weight.shape[0]}
    base = info.provenance.get("base_model")
    return config | ({"base_model_name_or_path": base} if base else {})


def _vllm_state(heads: MedusaHeads, info: HeadsInfo, layout: str) -> tuple[State, Config]:
    """E: medusa_fc_bias says whether the blocks have a bias (vLLM drops it silently otherwise)."""
    outputs, ids = _outputs(heads, layout), heads.output.token_map
    shared = heads.output.tied or (heads.output.weight is not None and heads.output.weight.dim() == 2)
    state = _blocks(heads, "blocks.{h}.layers.{l}.{leaf}", layout)
    if shared:
        state["lm_head.weight"] = outputs[0]
    else:
        state |= {f"lm_heads.{h}.weight": weight for h, weight in enumerate(outputs)}
    if ids is not None:
        state["token_map"] = ids
    config: Config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": heads.hidden_size,
        "vocab_size": info.vocab_size or outputs[0].shape[0],
        "truncated_vocab_size": None if ids is None else ids.numel(),
        "num_heads": heads.max_depth,
        "num_hidden_layers": heads.weight.shape[0],
        "medusa_fc_bias": heads.bias is not None,
        "original_lm_head": shared,
    }
    return state, config
