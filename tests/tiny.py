"""Tiny random models of real families, made in the test process; and folders of them that load offline.

They must say something: with the usual initialisation a tiny model repeats one token, and mask or position bugs pass
unseen. `SCALE` is the standard deviation of all weights; tests/model/test_loader.py checks that the text is varied.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

SCALE = 0.3
VOCAB, HIDDEN, LAYERS, POSITIONS = 97, 32, 2, 512

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2 as in SmolLM2


def _llama_like(vocab: int, hidden: int, layers: int, positions: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": positions,
        "initializer_range": SCALE,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }


def _llama(**shape: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_llama_like(**shape))


def _qwen2(**shape: int) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**{**_llama_like(**shape), "tie_word_embeddings": True})


def _qwen3(**shape: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_llama_like(**shape))


def _mistral(**shape: int) -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_llama_like(**shape), sliding_window=16)


def _gemma2(**shape: int) -> Any:
    """Windows in every other layer, soft caps on scores and logits, a scale of its own for queries."""
    from transformers import Gemma2Config

    window = {"sliding_window": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 20.0}
    # untied: tied, with its embeddings scaled by √hidden, it only repeats its input
    return Gemma2Config(**_llama_like(**shape), **window)


def _gpt2(vocab: int, hidden: int, layers: int, positions: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=vocab,
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        n_positions=positions,
        initializer_range=SCALE,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gpt2": _gpt2,
}
FAMILIES = tuple(CONFIGS)


def tiny_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    *,
    vocab: int = VOCAB,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    positions: int = POSITIONS,
    eos_token_id: int | None = None,
    seed: int = 0,
) -> Any:
    """A model of `family` in eval mode without gradients; the same weights for the same arguments.

    llama, qwen2, qwen3, mistral and gemma2 have 4 query and 2 KV heads; mistral's window is 16, gemma2's too in every
    other layer; gpt2 has learned positions and no GQA. No EOS unless given, so that `generate` runs to its limit.
    """
    from transformers import AutoModelForCausalLM

    config = CONFIGS[family](vocab=vocab, hidden=hidden, layers=layers, positions=positions)
    config.eos_token_id = eos_token_id
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # some families scale parts of themselves down; norms and biases stay
                parameter.normal_(0.0, SCALE)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases of 0 would hide that one is dropped
    torch.random.set_rng_state(state)
    model.generation_config.eos_token_id = eos_token_id
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval().requires_grad_(False)


def tiny_prompts(count: int = 4, length: int = 12, vocab: int = VOCAB, seed: int = 0) -> list[list[int]]:
    """`count` lists of random ids (3 and up, so that no special token is among them), of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length + 3 * i,), generator=generator).tolist() for i in range(count)]


def greedy(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What `generate(do_sample=False)` appends to the prompt: the truth of many tests."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, use_cache=True
    )
    return out[0, len(prompt) :].tolist()


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Byte-level BPE over all 256 bytes and a few English pairs; ids 0 to 2 are SPECIAL, <|im_end|> is EOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("e", "r"), ("Ġ", "a"), ("o", "n")]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        chat_template=chat_template,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def at_once(parts: Generator[None, None, Any]) -> Any:
    """All parts of work that an idle engine does one by one; → what the work gives."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return end.value


def save_tiny_folder(
    path: str | Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    **options: Any,
) -> Path:
    """A model folder for load_model, with tiny_tokenizer and its vocabulary. `options` as in tiny_model."""
    tokenizer = tiny_tokenizer(chat_template)
    model = tiny_model(family, dtype, **{"vocab": len(tokenizer), "eos_token_id": 2, **options})
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)
