"""What `heads convert --to vllm` writes against the published loader rules of vLLM's MedusaModel
(vllm/model_executor/models/medusa.py and transformers_utils/configs/medusa.py): parameters by name and shape as its
config makes them, every tensor taken, none silently dropped, none left unfilled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medusa_serve import cli
from tests.model.drafting.test_files import MAP, H, V, info_of, random_medusa
from tests.tiny import save_tiny_folder


def config_as_vllm_reads(folder: Path) -> dict[str, Any]:
    """Any key with "num" and "heads" in it becomes num_heads, with "num" and "layers" num_hidden_layers; defaults."""
    told = json.loads((folder / "config.json").read_text())
    assert (told["model_type"], told["architectures"]) == ("medusa", ["MedusaModel"])
    for key in list(told):
        if "num" in key and "heads" in key:
            told["num_heads"] = told.pop(key)
        elif "num" in key and "layers" in key:
            told["num_hidden_layers"] = told.pop(key)
    config = {"hidden_size": 4096, "vocab_size": 32001, "num_heads": 5, "num_hidden_layers": 1} | told
    config["truncated_vocab_size"] = config.get("truncated_vocab_size") or config["vocab_size"]
    return config


def parameters(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, rows = config["hidden_size"], config["truncated_vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(config["num_heads"]):
        for layer in range(config["num_hidden_layers"]):
            shapes[f"blocks.{head}.layers.{layer}.weight"] = (hidden, hidden)
            if config.get("medusa_fc_bias", False):
                shapes[f"blocks.{head}.layers.{layer}.bias"] = (hidden,)
        if not config.get("original_lm_head", False):
            shapes[f"lm_heads.{head}.weight"] = (rows, hidden)
    if config.get("original_lm_head", False):
        shapes["lm_head.weight"] = (rows, hidden)
    return shapes


def check(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, tensors = config_as_vllm_reads(folder), load_file(folder / "model.safetensors")
    shapes, filled, token_map = parameters(config), {}, None
    for name, tensor in tensors.items():
        if name == "token_map":
            assert config["truncated_vocab_size"] < config["vocab_size"]  # else vLLM leaves the map out
            token_map = tensor
        else:
            assert name in shapes, f"{name} would be dropped"
            filled[name] = tensor
    for name, tensor in filled.items():
        if "lm_head" in name and token_map is not None and len(tensor) > len(token_map):
            filled[name] = tensor[token_map]
    assert {name: tuple(tensor.shape) for name, tensor in filled.items()} == shapes
    assert config["truncated_vocab_size"] == config["vocab_size"] or token_map is not None
    return config, filled


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bias": False},
        {"num_layers": 2},
        {"vocab_size": V},
        {"vocab_size": V, "shared_output": True},
        {"token_map": MAP},
        {"token_map": MAP, "vocab_size": 4},
    ],
    ids=str,
)
def test_every_kind_of_heads_loads_whole(kwargs: dict[str, Any], tmp_path: Path) -> None:
    from medusa_serve.model.drafting.files import save_heads

    heads, output = random_medusa(**kwargs), torch.nn.Linear(H, V, bias=False)
    heads.attach(output)
    save_heads(heads, info_of(heads, vocab_size=V), tmp_path / "out", layout="E", dtype=torch.float32)
    config, filled = check(tmp_path / "out")
    assert (config["num_heads"], config["num_hidden_layers"]) == (heads.max_depth, heads.weight.shape[0])
    # and they say there what they say here
    hidden = torch.randn(3, H)
    for head in range(config["num_heads"]):
        x = hidden
        for layer in range(config["num_hidden_layers"]):
            name = f"blocks.{head}.layers.{layer}"
            x = x + torch.nn.functional.silu(
                torch.nn.functional.linear(x, filled[f"{name}.weight"], filled.get(f"{name}.bias"))
            )
        weight = filled.get(f"lm_heads.{head}.weight", filled.get("lm_head.weight"))
        torch.testing.assert_close(x @ weight.T, heads.logits(hidden)[:, head])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Heads as the reference trainer leaves them, tied to a base, become a folder that vLLM takes whole."""
    base = save_tiny_folder(tmp_path / "base")
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    from medusa_serve.model.drafting.files import save_heads
    from medusa_serve.model.drafting.heads import MedusaHeads

    heads = MedusaHeads(32, 3, 1)
    heads.attach(torch.nn.Linear(32, vocab, bias=False))
    save_heads(heads, info_of(heads, vocab_size=vocab), tmp_path / "tied", layout="C", dtype=torch.float32)
    out = tmp_path / "vllm"
    assert cli.main(["heads", "convert", str(tmp_path / "tied"), str(out), "--to", "vllm", "--base", str(base)]) == 0
    assert "E: vLLM's" in capsys.readouterr().out
    config, filled = check(out)
    assert (config["original_lm_head"], config["medusa_fc_bias"], config["vocab_size"]) == (True, True, vocab)
    assert torch.equal(filled["lm_head.weight"], load_file(base / "model.safetensors")["lm_head.weight"])
