"""Presets: their data, and loading in the published layouts from local folders that stand in the hub's place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_serve import presets
from medusa_serve.errors import LoadError
from medusa_serve.llm import LLM
from medusa_serve.model.loading import hub
from medusa_serve.presets import PRESETS, VICUNA, Preset
from medusa_serve.types import SamplingParams
from tests.fake_hub import fake_hub
from tests.tiny import HIDDEN, save_tiny_folder

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "slots": 2, "max_context": 128}


def head_state(prefix: str, vocab: int, *, tied: bool = False, heads: int = 5) -> dict[str, torch.Tensor]:
    """Heads as the reference trainer writes them, fresh: zero blocks, output layers of noise."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for head in range(heads):
        state[f"{prefix}{head}.0.linear.weight"] = torch.zeros(HIDDEN, HIDDEN)
        state[f"{prefix}{head}.0.linear.bias"] = torch.zeros(HIDDEN)
        if not tied:
            state[f"{prefix}{head}.1.weight"] = torch.randn(vocab, HIDDEN, generator=generator)
    return state


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_folder(tmp_path / "base", chat_template=None)


def vocab_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def joint(base: Path, tmp_path: Path) -> Path:
    """A v1.0 repository: the whole model's weights with medusa_head.* beside them, in one folder."""
    whole = tmp_path / "medusa-1.0"
    whole.mkdir()
    for file in base.iterdir():
        (whole / file.name).write_bytes(file.read_bytes())
    state = load_file(base / "model.safetensors") | head_state("medusa_head.", vocab_of(base))
    save_file(state, whole / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"medusa_num_heads": 5, "medusa_num_layers": 1}
    (whole / "config.json").write_text(json.dumps(config))
    return whole


def published(tmp_path: Path, base: Path, layout: str) -> Path:
    folder = tmp_path / f"heads-{layout}"
    folder.mkdir()
    state = head_state("", vocab_of(base), tied=layout == "C")
    # the published v1.3 configs say 2 heads, the files hold 5
    config: dict[str, Any] = {"base_model_name_or_path": "lmsys/vicuna-7b-v1.3", "medusa_num_heads": 2}
    config |= {"medusa_num_layers": 1, "transformers_version": "4.31.0"} | ({"version": "2"} if layout == "C" else {})
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "A":
        torch.save(state, folder / "medusa_lm_head.pt")
    else:
        save_file(state, folder / "medusa_lm_head.safetensors")
    return folder


def put(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], **changes))


@pytest.mark.parametrize(("name", "layout"), [("vicuna-7b-v1.3", "A"), ("mistral-7b-v0.2", "B"), ("llama-3.1-8b", "C")])
def test_heads_in_their_published_layout(
    name: str, layout: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, name, base=str(base), heads=str(published(tmp_path, base, layout)))
    with LLM(name, **OPTIONS) as llm:
        assert (llm.model_name, llm.heads_name) == (name, "medusa")
        [answer] = llm.generate("the cat", SamplingParams(max_tokens=12, ignore_eos=True))
        assert llm.codec.has_chat_template == (PRESETS[name].chat is not None)
    with LLM(str(base), heads="none", tree="off", **OPTIONS) as plain:
        assert plain.generate("the cat", SamplingParams(max_tokens=12, ignore_eos=True))[0].text == answer.text


def test_a_jointly_trained_model_brings_its_heads(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = joint(base, tmp_path)
    put(monkeypatch, "zephyr-7b", base=str(whole), heads=str(whole))
    for name in ("zephyr-7b", str(whole)):  # as a preset, and as a folder of one's own
        with LLM(name, **OPTIONS) as llm:
            assert llm.heads_name == "medusa"
            assert llm.generate("the cat", SamplingParams(max_tokens=4, ignore_eos=True))[0].completion_tokens == 4


def test_jointly_trained_heads_refuse_the_stock_base(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="is a complete model with heads.*not attached to another one"):
        LLM(str(base), heads=str(joint(base, tmp_path)), **OPTIONS)


def test_heads_for_another_base_are_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save_tiny_folder(tmp_path / "other", hidden=64)
    heads = published(tmp_path, base, "B")
    with pytest.raises(LoadError, match="hidden size"):
        LLM(str(other), heads=str(heads), **OPTIONS)
    # as large, but by their own word another model's: both are names of the hub
    from medusa_serve.model.drafting.files import load_heads

    sizes: Any = {"hidden_size": HIDDEN, "vocab_size": vocab_of(base), "dtype": torch.float32}
    with pytest.raises(LoadError, match=r"are for lmsys/vicuna-7b-v1\.3, and the model is mistralai/Mistral-7B"):
        load_heads(heads, base_name="mistralai/Mistral-7B", **sizes)
    assert "name lmsys/vicuna-7b-v1.3 as their base" in load_heads(heads, base_name=str(base), **sizes)[1].warnings[-1]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(LoadError, match=r"^There is no model 'vicuna-7b-1\.3'\. Did you mean vicuna-7b-v1\.3 or"):
        LLM("vicuna-7b-1.3", **OPTIONS)
    assert presets.nearest("gpt2") == ""  # a name of the hub


def test_what_the_hub_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def no_network(*_: Any) -> list[str]:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", no_network)
    with pytest.raises(
        LoadError, match=r"^FasterDecoding/\S+ could not be downloaded from the model hub \(no route to host\)\.$"
    ):
        hub.heads_of(PRESETS["vicuna-7b-v1.3"])


def test_only_heads_and_no_code_are_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}
    files = ["config.json", "medusa_lm_head.safetensors", "medusa_lm_head.pt"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **o: asked.update(o, repo=repo) or tmp_path)
    assert hub.heads_of(PRESETS["llama-3.1-8b"]) == tmp_path
    assert asked["repo"] == "philschmid/llama-3-1-8b-instruct-medusa"
    assert "*.pt" in asked["ignore_patterns"]
    assert "medusa_lm_head.safetensors" in asked["allow_patterns"]


def test_heads_by_a_name_of_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repos = {"some/heads": published(tmp_path, base, "B")}
    with fake_hub(monkeypatch, tmp_path / "hub", repos):
        with LLM(str(base), heads="some/heads", **OPTIONS) as llm:
            assert llm.describe()["heads"] == "medusa"
            assert "medusa heads from some/heads" in llm.notes
        with pytest.raises(LoadError, match="has no some/haeds.* Did you mean some/heads"):
            LLM(str(base), heads="some/haeds", **OPTIONS)
    for nowhere in ("./heads", "heads-of-nobody", "/no/heads/here"):
        with pytest.raises(LoadError, match=f"There is no file or folder {nowhere}; heads are auto, none,"):
            LLM(str(base), heads=nowhere, **OPTIONS)


def test_the_data_is_whole() -> None:
    for name, preset in PRESETS.items():
        assert preset.base.count("/") == 1, name
        assert (preset.heads is None) == (preset.num_heads == 0), name
        assert preset.joint == (preset.heads == preset.base), name
        assert preset.tied == (preset.layout == "C"), name
        assert preset.tree == "auto"
    assert sum(preset.heads is None for preset in PRESETS.values()) >= 8
    assert isinstance(PRESETS["vicuna-7b-v1.3"], Preset)


def test_vicunas_template_is_fastchats() -> None:
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer(VICUNA)
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "A"},
    ]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.endswith("answers to the user's questions. USER: Hi ASSISTANT: Yes?</s> USER: A ASSISTANT:")
    told = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *chat[:1]], tokenize=False)
    assert told == "Be brief. USER: Hi"


@pytest.mark.network
@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.heads and not preset.joint])
def test_published_heads_are_as_the_preset_says(name: str) -> None:
    from medusa_serve.model.drafting.files import inspect_heads

    preset = PRESETS[name]
    info = inspect_heads(hub.heads_of(preset))
    assert (info.num_heads, info.num_layers, info.tied) == (preset.num_heads, preset.num_layers, preset.tied)
    assert preset.layout in ("", info.layout)
