"""Models of known shapes and drafters that need no training: what a step costs does not depend on the numbers."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidRequest

if TYPE_CHECKING:
    from medusa_serve.llm import LLM

SHAPES: dict[str, dict[str, Any]] = {  # the numbers of transformers' LlamaConfig
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 2048,
    },
}


def random_model(shape: str, engine: EngineConfig) -> Any:
    """A LoadedModel of random weights, made on the engine's device in its dtype; without a tokenizer. Raises
    LoadError."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from medusa_serve.model.kernels import few_bit_kernels
    from medusa_serve.model.loading.choose import choose_device, choose_numbers
    from medusa_serve.model.loading.load import LoadedModel, give_weights
    from medusa_serve.model.loading.process_lock import TURN

    none: Any = None
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    device, _ = choose_device(engine.device)
    numbers = choose_numbers(engine, device, config)
    with TURN, _seeded(device):  # see capture.py
        model = AutoModelForCausalLM.from_config(config, dtype=numbers.dtype).eval().requires_grad_(False)
    notes = list(numbers.notes)
    if numbers.weights == "nf4":
        quantize_nf4(model)
    if engine.device == "split":
        notes.append(_spread(model))
    weights, more = give_weights(model, numbers.weights, engine.quantize, few_bit_kernels())
    return LoadedModel(
        model=model,
        tokenizer=none,
        codec=none,
        name=f"random {shape}",
        device=device,
        dtype=numbers.dtype,
        eos_ids=frozenset(),
        max_positions=config.max_position_embeddings,
        weights=weights,
        notes=[*notes, *more],
    )


def _spread(model: Any) -> str:
    """Spread a model that lies elsewhere over the visible GPUs; → a note. Raises LoadError."""
    from medusa_serve.model.forward.split import device_map, gpu_shares, require_accelerate, sizes, split_note

    require_accelerate()
    from accelerate import dispatch_model

    devices, shares = gpu_shares(*sizes(model))
    dispatch_model(model, device_map(model, devices, shares), main_device=devices[0])
    return split_note(devices)


class ByteCodec:
    """A text codec for models without a tokenizer: an id is a byte of the prompt, and a letter of the answer."""

    has_chat_template = False
    token_texts = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        raise InvalidRequest("This model has no chat template; send `prompt`, not `messages`.", param="messages")

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + index % 26) for index in ids)


def random_llm(engine: EngineConfig, shape: str) -> LLM:
    """An LLM over random weights that speaks letters; without heads. Raises LoadError."""
    from medusa_serve.llm import LLM

    def load(config: EngineConfig) -> Any:
        return replace(random_model(shape, config), codec=ByteCodec())

    return LLM(replace(engine, heads="none", lookup=False), load=load)


def quantize_nf4(model: Any) -> None:
    """The linear layers of a model on a GPU, in place, one by one."""
    import bitsandbytes as bnb
    import torch

    from medusa_serve.model.forward.hidden_tap import decoder_layers

    for parent in decoder_layers(model).modules():
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear:
                continue
            size, dtype = (child.in_features, child.out_features), child.weight.dtype
            kind: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
            with torch.device("meta"):
                made = bnb.nn.Linear4bit(*size, bias=child.bias is not None, compute_dtype=dtype, **kind)
            weight: Any = bnb.nn.Params4bit(child.weight.data, requires_grad=False, blocksize=64, **kind)
            made.weight = weight.to(child.weight.device)
            made.bias = child.bias
            setattr(parent, name, made)


def random_drafter(model: Any) -> Any:
    """Sequential heads of the usual proportions, attached to the model, in the dtype that the engine would take."""
    from medusa_serve.model.drafting.draft_formats import make_fast
    from medusa_serve.model.drafting.drafters import SequentialDrafter
    from medusa_serve.model.drafting.heads import SequentialHeads
    from medusa_serve.model.loading.default_model import cache_folder

    hidden = model.config.hidden_size
    with _seeded(model.device):
        heads = SequentialHeads(hidden, inner=hidden // 4, readout=hidden // 8)
    heads.to(model.dtype).requires_grad_(False).attach(model.get_output_embeddings(), model.get_input_embeddings())
    make_fast(heads, cache_folder())
    return SequentialDrafter(heads)


def _seeded(device: Any) -> contextlib.ExitStack:
    """New tensors are made on the device, with the same random numbers each time; the generators stay as they were."""
    import torch

    stack = contextlib.ExitStack()
    stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
    stack.enter_context(torch.device(device))
    torch.manual_seed(0)
    return stack
