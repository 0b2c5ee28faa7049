"""Compiled passes give what the eager ones give, are built once, and where they cannot be had a note says why."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_serve import LLM, SamplingParams
from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidConfig
from medusa_serve.model import compiled
from medusa_serve.model.build import SLACK
from medusa_serve.model.compiled import _greedy, compile_passes, compiler
from medusa_serve.model.drafting.choose import choose_drafter
from medusa_serve.model.drafting.heads import SequentialHeads
from medusa_serve.model.drafting.tree import Tree
from medusa_serve.model.forward.attention import chain_view, tree_view
from medusa_serve.model.forward.tree_forward import PlugInError, TreeForward
from medusa_serve.model.loading.load import load_model
from medusa_serve.model.shapes import Shape, heads_fill, plan_shapes
from tests.commands.test_heads import saved
from tests.tiny import HIDDEN, save_tiny_folder

SIZES = (1, 4)
COLUMNS = 96


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EngineConfig:
    """A tiny model with sequential heads."""
    home = tmp_path_factory.mktemp("compiled")
    torch.manual_seed(0)
    heads = saved(SequentialHeads(HIDDEN, inner=24, readout=16, max_depth=3), home / "heads", hidden_inputs=(-1,))
    model = str(save_tiny_folder(home / "tiny", layers=1))
    return EngineConfig(
        model=model, heads=heads, device="cpu", dtype="float32", quantize="none", tree="4", compile=True,
        max_context=COLUMNS - SLACK,
    )  # fmt: skip


def made(config: EngineConfig) -> tuple[TreeForward, Any, dict[int, Shape]]:
    loaded = load_model(config, progress=False)
    drafter, *_ = choose_drafter(config, loaded)
    shapes = plan_shapes(config, drafter, loaded.device)
    return TreeForward(loaded.model, 3, COLUMNS, loaded.max_positions), drafter, shapes


@pytest.fixture(scope="module")
def cache(config, tmp_path_factory):
    """A cache folder with packages of the tiny model and its heads."""
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    home = tmp_path_factory.mktemp("cache")
    note = compile_passes(*made(config), config, home)
    assert note.startswith("passes of 1, 4 nodes are compiled (now; "), note
    return home


def no_build(*arguments, **options):
    raise AssertionError("nothing has to be built")


@torch.inference_mode()
def test_any_tree_in_any_slot_at_any_length(config, cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_build)
    (forward, *rest), (eager, *_) = made(config), made(config)
    assert "compiled (at an earlier start" in compile_passes(forward, *rest, config, cache)
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


@torch.inference_mode()
def test_drafts_are_the_heads_own(config, cache):
    (forward, drafter, shapes), (_, eager, _) = made(config), made(config)
    compile_passes(forward, drafter, shapes, config, cache)
    nodes = heads_fill(shapes[4], drafter.max_nodes)
    torch.manual_seed(0)
    for position in range(3, 30):
        hidden, pending, length = torch.randn(1, HIDDEN), torch.randint(3, 200, (1,)), torch.tensor([position])
        assert drafter.compiled.covers(pending, _greedy(), nodes)
        got = drafter.draft(pending, hidden, pending, length, _greedy(), nodes)
        for one, other in zip(got, eager.draft(pending, hidden, pending, length, _greedy(), nodes), strict=True):
            assert torch.equal(one, other)


def test_other_passes_and_drafts_stay_eager(config, cache):
    forward, drafter, shapes = made(config)
    compile_passes(forward, drafter, shapes, config, cache)
    draft = Tree(((0,), (1,), (0, 0))).draft(torch.ones(2, 4, dtype=torch.int64))
    both = tree_view(torch.tensor([0, 1]), torch.tensor([3, 4]), [0, 1], [3, 4], draft)
    assert not forward.compiled.covers(both)
    assert not forward.compiled.covers(chain_view([0], [0], [4], torch.device("cpu")))
    five = Tree(((0,), (1,), (0, 0), (0, 1))).draft(torch.ones(1, 5, dtype=torch.int64))
    assert not forward.compiled.covers(tree_view(torch.tensor([0]), torch.tensor([3]), [0], [3], five))
    nodes = heads_fill(shapes[4], drafter.max_nodes)
    assert not drafter.compiled.covers(torch.ones(2), _greedy(), nodes)
    assert not drafter.compiled.covers(torch.ones(1), _greedy()._replace(sampled=True), nodes)
    assert not drafter.compiled.covers(torch.ones(1), _greedy(), nodes + 1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_the_same(config, cache, monkeypatch, temperature):
    monkeypatch.setenv("MEDUSA_SERVE_CACHE", str(cache))
    monkeypatch.setattr(subprocess, "run", no_build)
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=temperature, seed=3)
    texts = []
    for wanted in (False, True):
        with LLM(replace(config, compile=wanted)) as llm:
            assert any("nodes are compiled" in note for note in llm.notes) == wanted
            texts.append([llm.generate_ids([prompt], [params])[0].token_ids for prompt in prompts])
    assert texts[0] == texts[1]


def test_packages_are_of_one_model_its_heads_and_the_code(config, cache, monkeypatch):
    forward, drafter, _ = made(config)
    key = compiled._key(forward, drafter, config)
    assert {path.name for path in (cache / "compiled" / key).iterdir()} >= {"pass-1.pt2", "pass-4.pt2"}
    assert compiled._key(forward, None, config) != key
    assert compiled._key(forward, drafter, replace(config, dtype="bfloat16")) != key
    monkeypatch.setattr(compiled.torch, "__version__", "9.9")
    assert compiled._key(forward, drafter, config) != key


def test_what_is_damaged_or_wrong_is_not_used(config, cache, tmp_path, monkeypatch):
    forward, drafter, shapes = made(config)

    def told(home: Path) -> str:
        note = compile_passes(forward, drafter, shapes, config, home)
        assert forward.compiled is None
        assert drafter.compiled is None
        return note

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "TOLERANCE", {torch.float32: 0.0})
        assert "their logits differ from the model's by" in told(cache)
    with monkeypatch.context() as patch:
        run = compiled.CompiledDrafts.run
        patch.setattr(
            compiled.CompiledDrafts,
            "run",
            lambda *given: run(*given)._replace(tokens=torch.ones(1, 2, dtype=torch.int64)),
        )
        assert "of their drafts are the heads'" in told(cache)
    for path in (cache / "compiled").rglob("*.pt2"):
        copy = tmp_path / path.relative_to(cache)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[:1000])
    assert "they cannot be loaded (" in told(tmp_path)


def test_why_nothing_is_compiled(config, tmp_path, monkeypatch):
    forward, drafter, shapes = made(config)

    def told(home: Path) -> str:
        return compile_passes(forward, drafter, shapes, config, home)

    def build(**done) -> str:
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], **done))
        return told(tmp_path)

    monkeypatch.setattr(compiled.shutil, "which", lambda name: "/usr/bin/g++")
    assert build(returncode=1, stderr="a\nb: no space left\n").endswith("because compiling failed (b: no space left)")
    assert build(returncode=-9, stderr="").endswith("because compiling failed (-9)")
    (tmp_path / "file").write_text("in the way")
    assert "they cannot be kept in" in told(tmp_path / "file")

    def late(*arguments, **options):
        raise subprocess.TimeoutExpired("g++", 1)

    monkeypatch.setattr(subprocess, "run", late)
    assert "the compiler took longer than" in told(tmp_path)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert "there is no C++ compiler" in told(tmp_path)
    assert forward.compiled is None


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_attention_that_is_not_one_mask_for_all_layers_is_refused(family, tmp_path):
    """Where it is traced, in the process that builds."""
    plain = EngineConfig(model=str(save_tiny_folder(tmp_path / family, family)), device="cpu", dtype="float32")
    forward, *_ = made(plain)
    with pytest.raises(PlugInError, match="window of the text|soft cap"):
        compiled.build_pass(forward, 4, tmp_path / "never.pt2")
    assert not (tmp_path / "never.pt2").exists()


def test_compile_is_yes_or_no():
    with pytest.raises(InvalidConfig, match="compile must be true or false"):
        EngineConfig(compile="yes")
