"""A layer that runs as one call gives the bits that its graph gives, operation by operation."""

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.model.build import build_runner
from medusa_serve.model.cpu.int_products import NativeInt4Linear
from medusa_serve.model.cpu.layers import NativeLayers
from medusa_serve.model.cpu.threads import Threads
from medusa_serve.model.forward.hidden_tap import decoder_layers
from medusa_serve.model.forward.tree_forward import TreeForward
from medusa_serve.model.selftest import make_exact
from medusa_serve.model.weights.int4 import Int4Linear, use_few_bits
from tests.model.cpu.test_layers import passes
from tests.model.test_exact import COLUMNS, SLOTS, on_steps
from tests.tiny import tiny_model


@pytest.fixture
def forward_of():
    opened = []

    def make(family, kind=NativeInt4Linear, layers=2, hidden_inputs=(-1,)):
        model = on_steps(tiny_model(family, torch.float32, layers=layers))
        use_few_bits(model, kind)
        forward = TreeForward(model, SLOTS, COLUMNS, None, hidden_inputs)
        forward.use(NativeLayers(forward, decoder_layers(model)).over(forward.active))
        opened.append(forward)
        return forward

    with torch.inference_mode():
        yield make
        for forward in opened:
            forward.close()


@pytest.mark.parametrize(
    ("family", "layers", "hidden_inputs", "calls"),
    [("llama", 2, (-1,), 1), ("mistral", 1, (-1,), 1), ("llama", 5, (-1, 2, 3), 3), ("llama", 5, (0, 4, -1), 2)],
)
def test_a_tape_is_its_graph(family, layers, hidden_inputs, calls, forward_of):
    """calls: one goes through all layers up to the next whose input the heads read"""
    forward = forward_of(family, layers=layers, hidden_inputs=hidden_inputs)
    assert make_exact(forward, None, SLOTS).startswith("exact:")
    (native,) = set(forward.active.layers._natives)
    tape, made = native.tape, []
    native.tape = lambda *given: made.append(0) or tape(*given)
    native.tape.tape = tape.tape
    got = passes(forward)
    assert len(made) == 5 * calls
    native.tape = None
    forward.active.layers._shared = ()
    for one, other in zip(got, passes(forward), strict=True):
        assert torch.equal(one, other)
    assert len(made) == 5 * calls


@pytest.mark.parametrize("threads", [1, 3])
def test_shares_of_any_number_of_threads_make_the_same(threads, forward_of, monkeypatch):
    """Rows, outputs and heads do not divide by three."""
    forward = forward_of("llama")
    assert make_exact(forward, None, SLOTS).startswith("exact:")
    monkeypatch.setattr(Threads, "count", lambda self: 2)
    wanted = passes(forward)
    monkeypatch.setattr(Threads, "count", lambda self: threads)
    for one, other in zip(passes(forward), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "kind"), [("qwen2", NativeInt4Linear), ("gpt2", NativeInt4Linear), ("llama", Int4Linear)]
)
def test_layers_with_other_operations_keep_their_graph(family, kind, forward_of):
    forward = forward_of(family, kind)
    assert all(native.tape is None for native in forward.active.layers._natives)


def test_a_pass_that_is_not_exact_keeps_the_graph(forward_of):
    forward = forward_of("llama")
    assert forward.active.layers._natives[0].tape is not None
    assert not forward.exact
    passes(forward)
    assert forward.active.layers._seen is None


def test_a_cpu_compiles_nothing_and_says_so():
    model = on_steps(tiny_model("llama", torch.float32, layers=2))
    use_few_bits(model, NativeInt4Linear)
    built = build_runner(model, EngineConfig(compile=True), eos_ids=[], max_positions=512)
    assert any(note.startswith("no compiled passes because only a GPU") for note in built.notes)
    assert any(note.startswith("exact:") for note in built.notes)
    assert built.runner.forward.active.layers._natives[0].tape is not None
    built.runner.close()
