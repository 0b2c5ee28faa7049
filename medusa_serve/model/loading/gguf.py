"""From a Llama's GGUF file to a folder that transformers reads: safetensors, config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_model(gguf: Path, folder: Path) -> None:
    """Write config, weights and tokenizer in Hugging Face's form.

    transformers' GGUF reader is not used: it needs accelerate, its tokenizer loses a step (see _tokenizer), and heads
    trained for these weights must not depend on how a later release dequantises. The values are the same, bit for bit.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(meta)
    weights = _weights(reader.tensors, config.num_attention_heads, config.num_key_value_heads)
    config.tie_word_embeddings = "lm_head.weight" not in weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    _tokenizer(meta).save_pretrained(folder)


def _config(meta: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    if meta["general.architecture"] != "llama":
        raise ValueError("not a model of the Llama family")
    epsilon = meta["llama.attention.layer_norm_rms_epsilon"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=float(f"{epsilon:.7g}"),  # GGUF keeps a float32: 9.999999747e-06 was 1e-05
        rope_parameters={"rope_type": "default", "rope_theta": float(meta["llama.rope.freq_base"])},
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        dtype="float32",
    )


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _weights(tensors: Any, num_heads: int, num_kv_heads: int) -> dict[str, Any]:
    """Hugging Face's names to float32 arrays, dequantised."""
    import numpy
    from gguf.quants import dequantize

    out = {}
    for tensor in tensors:
        *block, kind, _ = tensor.name.split(".")
        value = dequantize(tensor.data, tensor.tensor_type)
        if kind in ("attn_q", "attn_k"):  # GGUF interleaves the two halves that the rotary embedding pairs
            heads = num_heads if kind == "attn_q" else num_kv_heads
            value = value.reshape(heads, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        out[f"{prefix}{_NAMES[kind]}.weight"] = numpy.ascontiguousarray(value, dtype=numpy.float32)
    return out


def _tokenizer(meta: dict[str, Any]) -> Any:
    """The byte-level BPE tokenizer of the GGUF, with chat template.

    Pre-tokenizer "smollm" cuts out every digit before the byte-level rule sees the text. transformers' GGUF reader
    drops that step, and then splits line breaks before a digit ("\\n\\n1.", any list) unlike in training.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if meta["tokenizer.ggml.model"] != "gpt2" or meta["tokenizer.ggml.pre"] != "smollm":
        raise ValueError("not the tokenizer of SmolLM")
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    core.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
