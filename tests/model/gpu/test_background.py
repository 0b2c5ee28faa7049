"""What a GPU's engine leaves for when it idles, here done on a CPU with torch.compile's tracing alone: it changes no
answer before, between and after its parts. `-m gpu`: with the compiler, under CUDA graphs.

pytest tests/model/test_fuse.py
"""

import json
import subprocess
import sys

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.llm import _forecast
from medusa_serve.model import build
from medusa_serve.model.build import build_runner
from medusa_serve.model.drafting.drafters import SequentialDrafter
from medusa_serve.model.drafting.heads import SequentialHeads
from medusa_serve.model.forward import trace as layers
from medusa_serve.model.gpu import background as fuse
from medusa_serve.model.gpu.background import SOON
from medusa_serve.types import SamplingParams
from tests.oracles import IdsCodec, run
from tests.tiny import greedy, save_tiny_folder, tiny_model, tiny_prompts

TOKENS, HIDDEN = 24, 64


@pytest.fixture
def fuses(monkeypatch):
    """A CPU fuses as a GPU does, and compiles float32 too."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, options=None, **how: real(function, backend="eager", **how))
    monkeypatch.setattr(build, "fuses", lambda forward, config: True)
    for module in (fuse, layers):
        monkeypatch.setattr(module, "compiles", lambda forward, wanted: True)


def drafter_of(model) -> SequentialDrafter:
    torch.manual_seed(0)
    heads = SequentialHeads(HIDDEN, inner=48, readout=32, max_depth=4).to(model.device, model.dtype)
    heads.requires_grad_(False).attach(model.get_output_embeddings(), model.get_input_embeddings())
    return SequentialDrafter(heads)


def built_of(model, **options):
    config = EngineConfig(slots=2, max_context=320, dtype=str(model.dtype).removeprefix("torch."))
    return build_runner(model, config, eos_ids=[], max_positions=512, drafter=drafter_of(model), **options)


def ask(manager, prompt):
    (done,) = run(manager, [(prompt, SamplingParams(max_tokens=TOKENS))])
    return list(done.token_ids)


@pytest.mark.usefixtures("fuses")
def test_answers_are_the_same_before_between_and_after_the_parts(monkeypatch):
    """And what finished sequences left in their slots is still there for those that begin alike."""
    monkeypatch.setattr(layers, "imported", lambda *names: iter(()))  # as many parts as it takes long to import
    model = tiny_model("llama", torch.float32, hidden=HIDDEN)
    first, second = tiny_prompts(2, 24)
    want = {tuple(prompt): greedy(model, prompt, TOKENS) for prompt in (first, second)}
    built = built_of(model, later=True)
    runner, notes = built.runner, built.notes
    manager = BatchManager(runner, IdsCodec(), EngineConfig(), model_name="tiny")
    assert notes[-1] == SOON
    assert runner.forward.layers is None
    states = []
    more = True
    while more:
        more = runner.rest()
        assert runner.activity is None
        for prompt in (first, second):
            assert ask(manager, prompt) == want[tuple(prompt)]
        states.append(runner.forward.layers is not None)
    before = 5  # two functions are traced, the weights moved, and the two compiled
    assert states == [False] * before + [True] * (len(states) - before)
    assert states[-1]
    reused = manager.metrics.snapshot()["reused"]
    assert reused == (len(states) - 1) * (len(first) - 1 + len(second) - 1), "all but the last token of each prompt"
    assert SOON not in notes
    assert notes[-2].startswith("decoder layers are compiled, with merged products (")
    assert notes[-1] == "heads are compiled"
    manager.close()


@pytest.mark.usefixtures("fuses")
def test_without_later_all_is_done_at_once():
    built = built_of(tiny_model("llama", torch.float32, hidden=HIDDEN))
    assert built.runner.forward.layers.compiled
    assert built.runner._timing.faster is None
    assert not built.runner.rest()
    assert built.notes[-1] == "heads are compiled"
    built.runner.close()


@pytest.mark.usefixtures("fuses")
def test_a_self_test_that_fails_leaves_the_plain_path_and_says_so(monkeypatch):
    model = tiny_model("llama", torch.float32, hidden=HIDDEN)
    (prompt,) = tiny_prompts(1, 24)
    want = greedy(model, prompt, TOKENS)
    real = layers._Traced.run
    monkeypatch.setattr(layers._Traced, "run", lambda self, *given, **how: 1.5 * real(self, *given, **how))
    built = built_of(model, later=True)
    while built.runner.rest():
        pass
    assert built.runner.forward.layers is None
    assert built.notes[-1].startswith("decoder layers stay as they are (its logits differ from a plain forward")
    manager = BatchManager(built.runner, IdsCodec(), EngineConfig(), model_name="tiny")
    assert ask(manager, prompt) == want
    manager.close()


@pytest.mark.usefixtures("fuses")
def test_a_runner_that_is_closed_half_way_gives_the_model_back():
    model = tiny_model("llama", torch.float32, hidden=HIDDEN)
    before = model(torch.arange(9)[None]).logits
    for parts in (1, 4, 7):
        built = built_of(model, later=True)
        for _ in range(parts):
            built.runner.rest()
        built.runner.close()
        assert torch.equal(model(torch.arange(9)[None]).logits, before)


@pytest.mark.usefixtures("fuses")
def test_times_are_those_of_the_path_in_use(monkeypatch, tmp_path):
    """None while the plain path serves; a forecast from an earlier start all the same."""
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "worth_timing", lambda runner, weights: True)
    timed = []
    real = build.ModelRunner.time_step

    def time_step(self, rows, nodes, repeats=3):
        timed.append(self.forward.layers is not None)
        return real(self, rows, nodes, 1)

    monkeypatch.setattr(build.ModelRunner, "time_step", time_step)
    model = tiny_model("llama", torch.float32, hidden=HIDDEN)
    first = built_of(model, what="tiny", later=True)
    assert timed == [False], "whether the memory is enough"
    assert (first.runner.step_ms, _forecast(first.runner)) == ({}, None)
    first.runner.finish()
    assert first.notes[-1].startswith("steps timed")
    assert len(timed) > 4
    assert all(timed[1:])
    times = first.runner.step_ms
    first.runner.close()
    timed.clear()
    again = built_of(model, what="tiny", later=True)
    assert (timed, again.runner.step_ms) == ([], {})
    assert _forecast(again.runner) is not None
    again.runner.finish()
    assert (timed, again.notes[-1]) == ([], "steps were timed at an earlier start")
    assert again.runner.step_ms == pytest.approx(times, abs=1e-3)
    again.runner.close()


FIRST = """
import json, sys
from medusa_serve import LLM
from medusa_serve.model import build
from medusa_serve.model.forward import trace as layers
from medusa_serve.model.gpu import background as fuse
from medusa_serve.model.runner import ModelRunner
ModelRunner.grace_s = property(lambda self: 2.0, lambda self, seconds: None)
build.fuses = lambda forward, config: True
fuse.compiles = layers.compiles = lambda forward, wanted: True
named = ("torch._inductor.compile_fx", "torch.export._trace")
told = lambda: [name in sys.modules for name in named]
with LLM(sys.argv[1], slots=2, max_context=128, dtype="float32") as llm:
    told_of_load, (first,) = told(), llm.generate("the one")
    told_of_answer, notes = told(), llm.notes
    import torch
    real = torch.compile
    torch.compile = lambda function, options=None, **how: real(function, backend="eager", **how)
    assert llm.manager.wait_until_rested(120)
    (second,) = llm.generate("the one")
    json.dump([told_of_load, told_of_answer, told(), notes[-1], llm.notes[-1], first.text == second.text], sys.stdout)
"""


def test_the_first_answer_imports_no_compiler(tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", FIRST, str(folder)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    loaded, answered, rested, before, after, same = json.loads(done.stdout)
    assert loaded == answered == [False, False]
    assert rested == [True, True]
    assert before == SOON
    assert after.startswith("decoder layers are compiled, with merged products")
    assert same


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_between_requests(dtype):
    """Captures of the plain path are dropped, those of the compiled one take their place, and no prefix is lost."""
    model = tiny_model("llama", dtype, hidden=HIDDEN).to("cuda")
    prompts = tiny_prompts(2, 24)
    want = [greedy(model, prompt, TOKENS) for prompt in prompts]
    built = built_of(model, later=True)
    manager = BatchManager(built.runner, IdsCodec(), EngineConfig(), model_name="tiny")
    rounds, more = 0, True
    while more:
        manager.step()  # else a part that took long looks like a loop that does not turn
        found = [ask(manager, prompt) for prompt in prompts]
        if dtype is torch.float32:
            assert found == want
        rounds, more = rounds + 1, built.runner.rest()
    layers_note = next(note for note in built.notes if note.startswith("decoder layers"))
    assert ("are compiled" in layers_note) == (dtype is torch.bfloat16), built.notes
    assert manager.metrics.snapshot()["reused"] == (rounds - 1) * sum(len(prompt) - 1 for prompt in prompts)
    manager.close()
