"""Compiled passes give what the eager ones give, are built once, and where they cannot be had a note says why."""

import subprocess
from pathlib import Path

import pytest
import torch

from medusa_serve import LLM, SamplingParams
from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidConfig
from medusa_serve.model import compiled
from medusa_serve.model.attention import chain_view, tree_view
from medusa_serve.model.build import SLACK
from medusa_serve.model.compiled import compile_passes, compiler
from medusa_serve.model.forward import PlugInError, TreeForward
from medusa_serve.model.loader import load_model
from medusa_serve.model.tree import Tree
from tests.tiny import save_tiny_folder

SIZES = (1, 4)
COLUMNS = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_folder(tmp_path_factory.mktemp("compiled") / "tiny")


def config(folder: Path) -> EngineConfig:
    return EngineConfig(model=str(folder), device="cpu", dtype="float32", quantize="none", compile=True)


def forward_of(folder: Path, hidden_inputs=(-1,)) -> TreeForward:
    loaded = load_model(config(folder), progress=False)
    return TreeForward(loaded.model, 3, COLUMNS, loaded.max_positions, hidden_inputs)


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    """A cache folder with packages of the tiny model."""
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    home = tmp_path_factory.mktemp("cache")
    note = compile_passes(forward_of(folder), config(folder), (*SIZES, 16), home)
    assert note.startswith("passes of 1, 4 nodes are compiled (now; "), note
    return home


def no_build(*arguments, **options):
    raise AssertionError("nothing has to be built")


@torch.inference_mode()
def test_any_tree_in_any_slot_at_any_length(folder, cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_build)
    forward, eager = forward_of(folder), forward_of(folder)
    note = compile_passes(forward, config(folder), SIZES, cache)
    assert "compiled (at an earlier start" in note
    assert forward.compiled.sizes == SIZES
    torch.manual_seed(0)
    for slot, length, paths in ((0, 1, ((0,), (0, 0), (0, 0, 0))), (2, 7, ((0,), (1,), (0, 0))), (1, COLUMNS - 4, ())):
        history, tokens = torch.randint(3, 200, (1, length)), torch.randint(3, 200, (1, 1 + len(paths)))
        view = tree_view(torch.tensor([slot]), torch.tensor([length]), [slot], [length], Tree(paths).draft(tokens))
        assert forward.compiled.covers(view)
        found = []
        for one in (forward, eager):
            one.run(history, chain_view([slot], [0], [length], torch.device("cpu")))
            found.append(one.run(tokens, view))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(forward.cache.keys, eager.cache.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(forward.cache.values, eager.cache.values, rtol=1e-3, atol=1e-4)


def test_other_passes_stay_eager(folder, cache):
    forward = forward_of(folder)
    compile_passes(forward, config(folder), SIZES, cache)
    draft = Tree(((0,), (1,), (0, 0))).draft(torch.ones(2, 4, dtype=torch.int64))
    both = tree_view(torch.tensor([0, 1]), torch.tensor([3, 4]), [0, 1], [3, 4], draft)
    assert not forward.compiled.covers(both)
    assert not forward.compiled.covers(chain_view([0], [0], [4], torch.device("cpu")))
    five = Tree(((0,), (1,), (0, 0), (0, 1))).draft(torch.ones(1, 5, dtype=torch.int64))
    assert not forward.compiled.covers(tree_view(torch.tensor([0]), torch.tensor([3]), [0], [3], five))


def test_the_text_is_the_same(folder, cache, monkeypatch):
    monkeypatch.setenv("MEDUSA_SERVE_CACHE", str(cache))
    monkeypatch.setattr(subprocess, "run", no_build)
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    fixed = {"model": str(folder), "dtype": "float32", "tree": "4", "max_context": COLUMNS - SLACK}
    texts = []
    for wanted in (False, True):
        with LLM(**fixed, compile=wanted) as llm:
            assert any("nodes are compiled" in note for note in llm.notes) == wanted
            texts.append([llm.generate_ids([prompt], [params])[0].token_ids for prompt in prompts])
    assert texts[0] == texts[1]


def test_packages_are_of_one_model_and_code(folder, cache, monkeypatch):
    forward = forward_of(folder)
    key = compiled._key(forward, config(folder))
    assert (cache / "compiled" / f"{key}-4.pt2").is_file()
    assert compiled._key(forward_of(folder, (-1, 1)), config(folder)) != key
    monkeypatch.setattr(compiled.torch, "__version__", "9.9")
    assert compiled._key(forward, config(folder)) != key


def test_what_is_damaged_or_wrong_is_not_used(folder, cache, tmp_path, monkeypatch):
    forward = forward_of(folder)
    monkeypatch.setattr(compiled, "TOLERANCE", {torch.float32: 0.0})
    assert "their logits differ from the model's by" in compile_passes(forward, config(folder), SIZES, cache)
    assert forward.compiled is None
    (tmp_path / "compiled").mkdir()
    for path in (cache / "compiled").iterdir():
        (tmp_path / "compiled" / path.name).write_bytes(path.read_bytes()[:1000])
    assert "they cannot be loaded (" in compile_passes(forward, config(folder), SIZES, tmp_path)
    assert forward.compiled is None


def test_why_nothing_is_compiled(folder, tmp_path, monkeypatch):
    forward = forward_of(folder)

    def build(**done) -> str:
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], **done))
        return compile_passes(forward, config(folder), SIZES, tmp_path)

    monkeypatch.setattr(compiled.shutil, "which", lambda name: "/usr/bin/g++")
    assert build(returncode=1, stderr="a\nb: no space left\n").endswith("because compiling failed (b: no space left)")
    assert build(returncode=-9, stderr="").endswith("because compiling failed (-9)")
    (tmp_path / "file").write_text("in the way")
    assert "they cannot be kept in" in compile_passes(forward, config(folder), SIZES, tmp_path / "file")

    def late(*arguments, **options):
        raise subprocess.TimeoutExpired("g++", 1)

    monkeypatch.setattr(subprocess, "run", late)
    assert "the compiler took longer than" in compile_passes(forward, config(folder), SIZES, tmp_path)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert "there is no C++ compiler" in compile_passes(forward, config(folder), SIZES, tmp_path)
    assert forward.compiled is None


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_attention_that_is_not_one_mask_for_all_layers_is_refused(family, tmp_path):
    """Where it is traced, in the process that builds."""
    forward = forward_of(save_tiny_folder(tmp_path / family, family))
    with pytest.raises(PlugInError, match="window of the text|soft cap"):
        compiled.build_package(forward, 4, tmp_path / "never.pt2")
    assert not (tmp_path / "never.pt2").exists()


def test_compile_is_yes_or_no():
    with pytest.raises(InvalidConfig, match="compile must be true or false"):
        EngineConfig(compile="yes")
