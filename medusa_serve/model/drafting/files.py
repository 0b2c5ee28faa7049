"""Heads in files: load (any published layout), inspect (without a base model), save.

layouts.py turns each layout into the state_dict of one of our modules. Here the sizes are read from the tensors, and
the module is built and fitted to the base. The config is only compared: a warning names both numbers.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ...errors import LoadError
from .heads import Heads, HeadsInfo, HydraHeads, MedusaHeads, SequentialHeads, num_parameters
from .layouts import Config, Parsed, is_head, parse, split_names, to_layout
from .tensors import HEAD_FILES, NATIVE_FILE, read_tensors

PADDING = 1024  # vocabularies may differ by this much: one of them is then only padded
DEFAULT_DEPTH = 5


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

    base_name: what the base was loaded from. Heads inside a complete model (D, F) are only for that model.
    """
    found = read_tensors(path, is_head)
    base = split_names(found.names)[1]
    if base and (base_name is None or Path(base_name).expanduser().resolve() != found.path.resolve()):
        raise LoadError(
            f"{path} is a complete model with heads ({len(base)} tensors of a base model): the heads were trained "
            "with that base and are not attached to another one. Load the model itself from that folder."
        )
    parsed = parse(found)
    heads = build(parsed, path, found.config)
    info = _info(heads, parsed, path, found.config)
    heads.hidden_indexes = info.hidden_inputs
    notes = _fit(heads, info.vocab_size, path, hidden_size, vocab_size)
    named = found.config.get("base_model_name_or_path")
    if base_name and isinstance(named, str) and named not in ("", "N/A") and _stem(named) != _stem(base_name):
        if all("/" in name and not Path(name).is_absolute() and not Path(name).exists() for name in (named, base_name)):
            # both are hub ids: these are two models
            raise LoadError(
                f"The heads in {path} are for {named}, and the model is {base_name}; choose one of the two."
            )
        notes.append(f"The heads name {named} as their base; the base in use is {base_name}.")
    heads.to(device=device, dtype=dtype)
    for name, tensor in heads.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise LoadError(f"{name} of {path} does not fit into {str(dtype).removeprefix('torch.')}: values overflow.")
    if base_model is not None:
        heads.attach(base_model.get_output_embeddings(), base_model.get_input_embeddings())
    size = num_parameters(heads)
    return heads, replace(info, vocab_size=vocab_size, num_parameters=size, warnings=(*info.warnings, *notes))


def inspect_heads(path: str | Path) -> HeadsInfo:
    """What a file holds, without a base model; wrong and partial files raise LoadError as in `load_heads`."""
    found = read_tensors(path, is_head)
    parsed = parse(found)
    return _info(build(parsed, path, found.config), parsed, path, found.config)


def split_full_model(path: str | Path) -> tuple[list[str], list[str]]:
    """Names of the heads' tensors, and of the base model's (none: the file holds heads only)."""
    return split_names(read_tensors(path, lambda name: False).names)


def own_heads(folder: str) -> Path | None:
    """The folder, if it holds a model together with its heads (D, F); else None."""
    if not Path(folder).is_dir() or not folder:
        return None
    try:
        return Path(folder) if split_full_model(folder)[1] else None
    except LoadError:
        return None


def build(parsed: Parsed, path: str | Path, config: Config) -> Heads:
    """The module with the sizes of the state's tensors; it holds these tensors, frozen. No memory is copied."""
    state = parsed.state

    def size(name: str, dim: int) -> int:
        if name not in state:
            raise LoadError(f"{path} is incomplete: the tensor {parsed.family}.{name} is missing.")
        if state[name].dim() <= dim:
            raise LoadError(
                f"{parsed.family}.{name} in {path} has shape {list(state[name].shape)}: too few dimensions."
            )
        return state[name].shape[dim]

    own = state.get("output.weight")
    shared: Config = {"vocab_size": None if own is None else own.shape[-2], "token_map": state.get("output.token_map")}
    heads: Heads
    with torch.device("meta"):  # sizes only; the tensors come from the file
        if parsed.family == "medusa":
            sizes = size("weight", 3), size("weight", 1), size("weight", 0)
            shared |= {"bias": "bias" in state, "output_bias": "output.bias" in state}
            heads = MedusaHeads(*sizes, shared_output=own is not None and own.dim() == 2, **shared)
        elif parsed.family == "hydra":
            size("output.weight", 2)
            heads = HydraHeads(
                size("weight", 3), size("weight", 1), size("weight", 0) + 1, vocab_size=shared["vocab_size"]
            )
        else:
            hidden, width = size("norm", 0), size("cell.0.w_out.weight", 0)
            read = size("mix.weight" if "mix.weight" in state else "start_proj.weight", 1)
            heads = SequentialHeads(
                hidden,
                width=width,
                inner=size("cell.0.w_out.weight", 1),
                readout=size("readout.w_out.weight", 1),
                layers=sum(name.startswith("cell.") and name.endswith(".norm") for name in state),
                hidden_inputs=max(1, read // max(hidden, 1)),
                embed_size=size("cell.0.w_in.weight", 1) - width,
                max_depth=_depth(config),
                **shared,
            )
    _check_state(heads, parsed, path)
    heads.load_state_dict(state, assign=True)
    return heads.requires_grad_(False).eval()


def _check_state(heads: nn.Module, parsed: Parsed, path: str | Path) -> None:
    """Raise LoadError unless names and shapes of module and state agree; only native files can fail here."""
    expected = {name: tensor.shape for name, tensor in heads.state_dict().items()}
    for name, shape in expected.items():
        if name not in parsed.state:
            raise LoadError(f"{path} is incomplete: the tensor {parsed.family}.{name} is missing.")
        have = parsed.state[name].shape
        if have != shape:
            raise LoadError(f"{parsed.family}.{name} in {path} has shape {list(have)}, expected {list(shape)}.")
    for name in sorted(parsed.state.keys() - expected.keys()):
        parsed.warnings.append(f"{parsed.family}.{name} is no part of the heads and was ignored.")
        del parsed.state[name]


def _fit(heads: Heads, trained: int, path: str | Path, hidden_size: int, vocab_size: int) -> list[str]:
    """Compare with the base, and cut the padding rows of the heads' own output layer. → warnings. Raises LoadError.

    trained: the vocabulary that the heads were trained with, from their output layer or else the config; 0: unknown
    """
    if heads.hidden_size != hidden_size:
        raise LoadError(
            f"The heads in {path} have hidden size {heads.hidden_size}, the base model {hidden_size}: they belong to "
            "another model; take heads that were trained for this one, or none."
        )
    if trained and abs(trained - vocab_size) > PADDING:
        raise LoadError(f"The heads in {path} have a vocabulary of {trained}, the base vocabulary has {vocab_size}.")
    output, rows = heads.output, heads.output.vocab_size
    notes, limit, what = [], vocab_size, "the base vocabulary"
    if trained not in (0, vocab_size) and (output.tied or output.token_map is not None):  # else see the rows below
        notes = [f"The heads have a vocabulary of {trained}, the base vocabulary has {vocab_size}: taken for padding."]
    if output.token_map is not None:
        top, limit, what = int(output.token_map.max()), output.token_map.numel(), "token_map"
        if top >= vocab_size:
            raise LoadError(f"token_map in {path} names token {top}, the base vocabulary ends at {vocab_size - 1}.")
        if rows and rows < limit:
            raise LoadError(f"The output layer in {path} has {rows} rows, its token_map {limit} entries.")
    if rows > limit + PADDING:
        raise LoadError(f"The heads in {path} have a vocabulary of {rows}, {what} has {limit}.")
    if output.tied or rows == limit:
        return notes
    if rows < limit:
        return [*notes, f"The output layer has {rows} rows, {what} {limit}: tokens from {rows} on are never drafted."]
    assert output.weight is not None
    output.weight = nn.Parameter(output.weight[..., :limit, :].contiguous(), requires_grad=False)
    if output.bias is not None:
        output.bias = nn.Parameter(output.bias[..., :limit].contiguous(), requires_grad=False)
    return [*notes, f"The output layer has {rows} rows, {what} {limit}: the last {rows - limit} are cut off."]


def _info(heads: Heads, parsed: Parsed, path: str | Path, config: Config) -> HeadsInfo:
    if isinstance(heads, SequentialHeads):
        num_layers = len(heads.cell)
    else:
        num_layers = heads.weight.shape[0] + isinstance(heads, HydraHeads)
    rows, mapped = heads.output.vocab_size, heads.output.token_map
    vocab = rows if rows and mapped is None else _number(config.get("vocab_size")) or 0
    bias = not isinstance(heads, MedusaHeads) or heads.bias is not None
    ranks, tau, noise_tau = _calibration(config, parsed.warnings)
    inputs = config.get("hidden_inputs") if parsed.layout == "native" else None
    if isinstance(inputs, list) and all(isinstance(index, int) for index in inputs):
        parsed.hidden_inputs = tuple(inputs)
    read, named = heads.hidden_inputs if isinstance(heads, SequentialHeads) else 1, len(parsed.hidden_inputs)
    if read != named:
        raise LoadError(f"The heads in {path} read {read} hidden states, the config names {named}.")
    provenance = config.get("provenance")
    info = HeadsInfo(
        family=heads.family,
        num_heads=heads.max_depth,
        num_layers=num_layers,
        hidden_size=heads.hidden_size,
        vocab_size=vocab,
        tied=heads.output.tied,
        bias=bias,
        token_map=0 if mapped is None else mapped.numel(),
        path=str(path),
        layout=parsed.layout,
        num_parameters=num_parameters(heads),
        hidden_inputs=parsed.hidden_inputs,
        ranks=ranks,
        tau=tau,
        noise_tau=noise_tau,
        provenance=provenance if isinstance(provenance, dict) else {},
    )
    return replace(info, warnings=(*parsed.warnings, *_disagreements(info, config)))


def _disagreements(info: HeadsInfo, config: Config) -> list[str]:
    """One sentence for each number in the config that differs from the tensors."""
    nested = config.get("medusa") if isinstance(config.get("medusa"), dict) else {}
    vllm, full = info.layout == "E", info.layout in ("D", "F")
    claims = [("heads", key, info.num_heads) for key in ("medusa_num_heads", "num_medusa_heads", "hydra_num_heads")]
    claims += [
        ("layers", key, info.num_layers) for key in ("medusa_num_layers", "num_medusa_layers", "hydra_num_layers")
    ]
    claims += [("hidden size", "hidden_size", info.hidden_size)]
    if vllm or info.layout == "native":
        claims += [("heads", "num_heads", info.num_heads)]
        claims += [("layers", "num_hidden_layers" if vllm else "num_layers", info.num_layers)]
        claims += [("draft vocabulary", "truncated_vocab_size", info.token_map or info.vocab_size)]
    if info.vocab_size and not full and config.get("truncated_vocab_size") is None:
        claims += [("vocabulary", "vocab_size", info.vocab_size)]
    out = []
    for what, key, have in claims:
        for section in (config, nested or {}):
            claim = _number(section.get(key))
            if claim is not None and claim != have:
                out.append(f"The config says {what} {claim} ({key}), the tensors say {have}; the tensors are right.")
    version = str(config.get("version", ""))
    if info.layout in "ABC" and version == "2" and not info.tied:
        out.append("The config says version 2 (tied), the file holds its own output layers; they are used.")
    if info.layout == "C" and config and version != "2":
        out.append("The file has no output layers and the config no version 2; the heads are read as tied.")
    fc_bias = bool(config.get("medusa_fc_bias", False))  # vLLM's default, with which it drops a bias silently
    if vllm and config and info.num_layers and fc_bias != info.bias:
        out.append(f"The config says medusa_fc_bias {fc_bias}, the blocks have {'a' if info.bias else 'no'} bias.")
    return out


def _calibration(
    config: Config, warnings: list[str]
) -> tuple[list[list[float]] | None, list[float] | None, list[float] | None]:
    """(ranks, tau, noise_tau) of the config; a value that is no list of numbers in range is ignored with a warning."""
    stored = config.get("calibration")
    if stored is None:
        return None, None, None
    fields: Config = stored if isinstance(stored, dict) else {"ranks": 0, "tau": 0}
    ranks, taus = fields.get("ranks"), [fields.get("tau"), fields.get("noise_tau")]
    rows = ranks if isinstance(ranks, list) else []
    if ranks is not None and not (rows and all(_numbers(row, 0.0, 1.0) for row in rows)):
        warnings.append("The calibration's ranks are not lists of probabilities and were ignored.")
        ranks = None
    for index, name in enumerate(("tau", "noise_tau")):
        if taus[index] is not None and not _numbers(taus[index], 1e-3, 1e3):
            warnings.append(f"The calibration's {name} is not a list of positive numbers and was ignored.")
            taus[index] = None
    return ranks, taus[0], taus[1]


def _numbers(values: Any, low: float, high: float) -> bool:
    if not isinstance(values, list) or not values:
        return False
    return all(type(x) in (int, float) and math.isfinite(x) and low <= x <= high for x in values)


def _number(value: Any) -> int | None:
    return value if type(value) is int else None


def _depth(config: Config) -> int:
    """How many depths a sequential head was trained for; its tensors do not say it."""
    depth = _number(config.get("max_depth"))
    return depth if depth is not None and 1 <= depth <= 64 else DEFAULT_DEPTH


def _stem(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def save_heads(
    heads: Heads,
    info: HeadsInfo,
    path: str | Path,
    *,
    layout: str = "native",
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> Path:
    """Write heads and config.json into the folder `path`; returns the tensor file, which is never half written.

    layout  native (every family), or for the Medusa family A (.pt), B (safetensors), C (tied), E (vLLM)
    A, B and E need output layers: tied heads must be attached, and the file then holds a copy of the base's.
    """
    state, config = to_layout(heads, info, layout)
    files = {"native": NATIVE_FILE, "A": "medusa_lm_head.pt", "E": "model.safetensors"}
    folder = Path(path)
    target = folder / files.get(layout, "medusa_lm_head.safetensors")
    if not overwrite and any((folder / name).exists() for name in (*HEAD_FILES, target.name, "config.json")):
        raise LoadError(f"{folder} already holds a model or heads; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    # copied: stacked heads are views of one storage; safetensors refuses these, torch.save would write all of it
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else torch.int64, copy=True).contiguous()
        for name, tensor in state.items()
    }
    part = target.with_name(target.name + ".part")
    if layout == "A":
        torch.save(state, part)
    else:
        save_file(state, part, metadata={"format": "pt"})
    fitted = {name: getattr(info, name) for name in ("ranks", "tau", "noise_tau")}
    calibration = {name: value for name, value in fitted.items() if value} or None
    extras = {"calibration": calibration, "provenance": info.provenance or None}
    config |= {name: value for name, value in extras.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(part, target)
    return target
