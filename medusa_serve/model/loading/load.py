"""From a name to a model on its device, its tokenizer and what the engine must know, with a reason for each choice."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...config import DEFAULT_MODEL, EngineConfig
from ...errors import LoadError, reason_of
from ...presets import PRESETS, nearest
from ..cpu.warm_up import kernels_ahead
from ..forward.attention import has_numba
from ..forward.split import split_plan
from ..process_lock import TURN
from ..weights.int4 import Int4Linear, stored_in_few_bits, use_few_bits
from ..weights.int8 import COVERS, linear_share, quantize_linears
from ..weights.nf4 import loading_options, require_nf4
from ..weights.number_format import choose_format, int4_kind
from .default_model import cache_folder, ensure_default_model
from .gpu_facts import why_unusable
from .gpu_memory import CONTEXT, plan_memory, sizes_of
from .hub import base_of, refusal
from .tokenizer import Codec

# Tokens that end a chat turn. Some models' templates use one that their generation config does not list as an end.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|endofturn|>", "<|eom_id|>")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode without gradients, on `device`, and how to talk to it.

    name           short: "smollm2-135m", the folder's name, or the last part of a hub id
    dtype          that it computes in · weights  of its linear layers: "int8" (a changed model), "int4" (its own
                   numbers, see int4.py) or "" where they are of the dtype
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
        """For a person: the dtype, int8 or int4."""
        return self.weights or str(self.dtype).removeprefix("torch.")


def load_model(config: EngineConfig, *, progress: bool = True) -> LoadedModel:
    """Load `config.model` on `config.device` in `config.dtype`. Raises LoadError in a sentence or two.

    The default model comes from the package index (see default_model); everything else is a local folder or a hub id.
    Code that comes with a model is never run.
    """
    notes: list[str] = []
    device = _choose_device(config.device, notes)  # refused before anything is downloaded
    return _load(config, device, notes, *_source(config.model, progress))


def load_to_answer(config: EngineConfig) -> LoadedModel:
    """The same model for what only answers: with int4 weights where it would be loaded as it is on a CPU and its own
    are such numbers already, which answer several times as fast; elsewhere as load_model does. Raises LoadError."""
    notes: list[str] = []
    device = _choose_device(config.device, notes)
    source, name = _source(config.model, True)
    plain = config.quantize == "none" and config.dtype in ("auto", "bfloat16") and device.type == "cpu"
    if plain and stored_in_few_bits(Path(source)):
        with contextlib.suppress(LoadError):  # its first rows were, the others are not
            return _load(replace(config, quantize="int4"), device, notes.copy(), source, name)
    return _load(config, device, notes, source, name)


def _load(config: EngineConfig, device: torch.device, notes: list[str], source: str, name: str) -> LoadedModel:
    with _quiet(), _as_load_error(config.model):
        few_bits = device.type == "cpu" and stored_in_few_bits(Path(source))
        if few_bits and has_numba() and config.quantize in ("auto", "int4"):
            kernels_ahead()
        hf_config = _checked_config(source, config.model)
        dtype, weights = _choose_numbers(config, device, hf_config, notes, few_bits)
        tokenizer = _load_tokenizer(source)
        if config.model in PRESETS and not tokenizer.chat_template:
            tokenizer.chat_template = PRESETS[config.model].chat
        if config.device == "split":
            places, note = split_plan(hf_config, dtype)
            model = _from_pretrained(source, hf_config, dtype, device_map=places)
            notes.append(note)
        elif weights == "nf4":
            model = _from_pretrained(source, hf_config, dtype, **loading_options(device, dtype))
        else:
            model = _load_weights(source, hf_config, device, torch.float32 if weights == "int4" else dtype)
        weights = _shrink(model, config, weights, notes)
    codec = Codec(tokenizer)
    notes += codec.notes
    eos_ids = _end_ids(model, tokenizer, notes)
    _settle_generation_config(model, eos_ids)
    positions = _max_positions(model.config)
    return LoadedModel(model, tokenizer, codec, name, device, dtype, eos_ids, positions, weights, notes, source)


def device_of(config: EngineConfig) -> torch.device:
    """Where its model will be. Raises LoadError."""
    return _choose_device(config.device, [])


# ---- choices ---------------------------------------------------------------------------------------------------------


def _choose_device(wanted: str, notes: list[str]) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        notes.append("device cuda because one is there" if count else "device cpu because no CUDA device is there")
        wanted = "cuda" if count else "cpu"
    if wanted == "split" and count < 2:
        raise LoadError(f"device split needs two GPUs or more, and this machine has {count or 'none'}; use auto.")
    device = torch.device("cuda:0" if wanted == "split" else wanted)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if not count:
            raise LoadError("There is no CUDA device here, or PyTorch is built without CUDA; use device cpu or auto.")
        if (device.index or 0) >= count:
            raise LoadError(f"There is no device {device}; this machine has cuda:0 to cuda:{count - 1}.")
        if (why := why_unusable(device)) is not None:
            raise LoadError(why)
    return device


def _choose_numbers(
    config: EngineConfig, device: torch.device, hf_config: Any, notes: list[str], few_bits: bool = False
) -> tuple[torch.dtype, str]:
    """The dtype, and what the weights become: "int8", "int4" (where they are of `few_bits`) or "" for the dtype."""
    if config.quantize in ("int8", "int4"):
        if device.type != "cpu":
            raise LoadError(f"{config.quantize} weights are for a CPU; on a GPU quantize is auto, none or nf4.")
        if config.quantize == "int4" and not few_bits:
            raise LoadError(
                "int4 weights are for models whose weights are four-bit numbers already, stored in float32; "
                "this one's would be rounded."
            )
        return torch.bfloat16, config.quantize
    if config.quantize == "nf4":
        require_nf4(device)
    if device.type == "cuda":
        dtype = getattr(torch, config.dtype) if config.dtype != "auto" else _half(device, notes)
        return dtype, _quantized_to_fit(config, device, hf_config, dtype, notes)
    if config.dtype != "auto":
        return getattr(torch, config.dtype), ""
    small = () if config.quantize == "none" else ("int4", "int8") if few_bits else ("int8",)
    best, why = choose_format(hf_config, ("float32", "bfloat16", *small), cache_folder())
    notes.append(f"dtype {f'bfloat16 with {best} weights' if best in small else best} because {why}")
    return (torch.bfloat16, best) if best in small else (getattr(torch, best), "")


def _half(device: torch.device, notes: list[str]) -> torch.dtype:
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # by default a T4 says yes to emulation
    if native:
        notes.append("dtype bfloat16 because the GPU computes in it")
        return torch.bfloat16
    notes.append("dtype float16 because the GPU has no bfloat16 of its own")
    return torch.float16


def _quantized_to_fit(
    config: EngineConfig, device: torch.device, hf_config: Any, dtype: torch.dtype, notes: list[str]
) -> str:
    """nf4 or nothing: as asked, or as the GPU's free memory asks for it. Raises LoadError where nothing fits."""
    if config.device == "split":
        return ""
    try:
        sizes = sizes_of(hf_config)
    except (LoadError, ValueError, AttributeError):  # a family of another build: not planned, and not quantised
        return ""
    free = torch.cuda.mem_get_info(device)[0] + CONTEXT  # which this question itself has taken
    plan = plan_memory(sizes, free, dtype.itemsize, config)
    if not plan.slots:
        raise LoadError(f"{config.model}: {'; '.join(plan.verdict())} ({free / 2**30:.1f} GiB are free).")
    if plan.quantize != "nf4":
        return ""
    require_nf4(device)
    if config.quantize == "auto":
        notes.append(f"quantize nf4 because {plan.why}")
    notes.append("the text is that of the model in NF4, a changed model; quantize none keeps the model's own")
    return "nf4"


def _shrink(model: Any, config: EngineConfig, weights: str, notes: list[str]) -> str:
    """Give the linear layers the weights that were chosen; → what they have now. Raises LoadError where they are asked
    for and cannot be."""
    if weights in ("", "nf4"):  # the latter are quantised as they are read
        return weights
    kind = int4_kind(cache_folder()) if weights == "int4" else Int4Linear
    share = use_few_bits(model, kind) if weights == "int4" else linear_share(model)
    if share < COVERS:
        why = f"only {share:.0%} of its weights lie in plain linear layers"
        why += " and are four-bit numbers" if weights == "int4" else ""
        if config.quantize == weights:
            raise LoadError(f"This model cannot have {weights} weights: {why}.")
        notes.append(f"{'no' if weights == 'int8' else 'few'} {weights} weights because {why}")
        return ""
    if weights == "int4":
        notes.append("int4 weights because the model's are four-bit numbers already: read smaller, not changed")
        if kind is not Int4Linear:
            notes.append("int4 products by Numba because this machine makes them faster than torch's")
        return weights
    quantize_linears(model)
    notes.append("the text is that of the model in int8, a changed model; quantize none keeps the model's own")
    return weights


def _source(model: str, progress: bool) -> tuple[str, str]:
    """(what from_pretrained gets, short name)."""
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


# ---- loading ---------------------------------------------------------------------------------------------------------


def _checked_config(source: str, asked: str) -> Any:
    """The model's config, refused where it could name code to run (CVE-2026-4372) or is no causal language model's."""
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
    source, _ = _source(model, False)
    with _quiet(), _as_load_error(model):
        return _checked_config(source, model)


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _load_weights(source: str, hf_config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    # No device_map: it needs accelerate. Weights are read once, in the wanted dtype, then moved.
    model = _from_pretrained(source, hf_config, dtype).to(device)
    if device.type == "cpu":
        _own_the_memory(model)
    return model


def _from_pretrained(source: str, hf_config: Any, dtype: torch.dtype, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    options |= {"config": hf_config, "dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    with TURN:  # loading changes torch's default dtype, which is the process's
        model, info = load(source, **options)
    # transformers fills what is missing with random numbers and only warns
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise LoadError(f"{len(wrong)} weights of {source} are missing or of another shape, first {wrong[0]}.")
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise LoadError(f"{source} is not a decoder-only language model with an output layer.")
    return model.eval().requires_grad_(False)


def _own_the_memory(model: Any) -> None:
    """Copy weights that are views of the mapped file into memory of their own, one at a time.

    Its tensors lie at any multiple of 8 bytes, and MKL's products of a few rows are 5 to 40 times slower on these.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


_TOO_LARGE = "{} does not fit into the memory; choose a smaller model or a dtype of half the size."


@contextlib.contextmanager
def memory_as_load_error(asked: str) -> Iterator[None]:
    """That the memory is full, as a sentence that says what to do."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise LoadError(_TOO_LARGE.format(asked)) from error


@contextlib.contextmanager
def _as_load_error(asked: str) -> Iterator[None]:
    """What transformers and torch raise while loading, as one or two sentences."""
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
            f"{asked!r} is neither a local folder nor a model that could be had from the hub ({reason_of(error)}). "
            f"Check the name and the network; {DEFAULT_MODEL!r} needs no hub."
        ) from error
    except Exception as error:  # safetensors, tokenizers and transformers raise types of their own for damaged files
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise LoadError(_TOO_LARGE.format(asked)) from error
        raise LoadError(f"The model {asked} cannot be loaded: {type(error).__name__}: {reason_of(error)}.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Advice and bars of transformers off while loading (what matters of them is checked here), but the hub's download
    bars as they are. Restored afterwards."""
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


# ---- facts -----------------------------------------------------------------------------------------------------------


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
    """`generate` ends where the engine ends, and a checkpoint's sampling advice cannot warn or change comparisons."""
    from transformers import GenerationConfig

    old = model.generation_config
    pad = old.pad_token_id if old.pad_token_id is not None else min(eos_ids, default=None)
    model.generation_config = GenerationConfig(
        bos_token_id=old.bos_token_id, eos_token_id=sorted(eos_ids) or None, pad_token_id=pad
    )


def _max_positions(config: Any) -> int | None:
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None
