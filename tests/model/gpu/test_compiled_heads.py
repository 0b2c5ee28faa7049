"""Compiled heads give the features of their own code, or are left alone: pytest tests/model/test_fused_heads.py"""

import pytest
import torch

from medusa_serve.model.drafting.heads import HydraHeads, MedusaHeads, SequentialHeads
from medusa_serve.model.gpu import compiled_heads as fused_heads
from medusa_serve.model.gpu.compiled_heads import STEPS, fuse_heads
from tests.tiny import at_once

HIDDEN, VOCAB = 32, 50


def heads_of(kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    if kind == "medusa":
        heads = MedusaHeads(HIDDEN, num_heads=3, num_layers=1)
    elif kind == "hydra":
        heads = HydraHeads(HIDDEN, 3, 2, vocab_size=VOCAB)
    else:
        heads = SequentialHeads(HIDDEN, inner=24, readout=16, hidden_inputs=2, max_depth=3)
    heads = heads.to(device, dtype).requires_grad_(False)
    weight = torch.randn(VOCAB, HIDDEN, device=device, dtype=dtype)
    heads.attach(weight, *(() if kind == "medusa" else (weight,)))
    return heads


def fuse(heads, hidden_width: int, changed=lambda: None) -> str:
    return at_once(fuse_heads(heads, hidden_width, changed))


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a compiler: what Dynamo traces is run as it is."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend="eager", **how))


@pytest.mark.usefixtures("traced")
def test_any_number_of_rows(monkeypatch):
    heads = heads_of("sequential")
    assert fuse(heads, 2 * HIDDEN) == "heads are compiled"
    assert fuse(heads, 2 * HIDDEN) == "heads are compiled"
    for rows in (1, 2, 7):
        state = heads.start(torch.randn(rows, 2 * HIDDEN), torch.arange(rows))
        plain = heads_of("sequential")
        assert torch.equal(heads.features(heads.advance(state, torch.arange(rows))),
                           plain.features(plain.advance(state, torch.arange(rows))))  # fmt: skip


@pytest.mark.usefixtures("traced")
def test_other_numbers_are_refused(monkeypatch):
    heads = heads_of("sequential")
    monkeypatch.setattr(fused_heads.Compiled, "__call__", lambda self, *tensors: 1.5 * self.plain(*tensors))
    assert fuse(heads, 2 * HIDDEN).startswith("heads are not compiled (their features differ by ")
    assert not any(name in vars(heads) for name in STEPS)


def test_a_compiler_that_fails_is_told(monkeypatch):
    def broken(self, *tensors):
        raise RuntimeError("no gcc here\nand more")

    monkeypatch.setattr(fused_heads.Compiled, "__call__", broken)
    heads = heads_of("sequential")
    assert fuse(heads, 2 * HIDDEN) == "heads are not compiled (no gcc here)"
    assert not any(name in vars(heads) for name in STEPS)


@pytest.mark.usefixtures("traced")
def test_between_the_parts_they_run_as_they_are():
    heads, voided, seen = heads_of("sequential"), [], []
    for _ in fuse_heads(heads, 2 * HIDDEN, lambda: voided.append(len(seen))):
        seen.append(any(name in vars(heads) for name in STEPS))
    assert (seen, voided) == ([False, False], [2])
    assert STEPS[0] in vars(heads)


@pytest.mark.usefixtures("traced")
def test_what_is_no_number_is_refused(monkeypatch):
    monkeypatch.setattr(fused_heads.Compiled, "__call__", lambda self, *tensors: torch.nan * self.plain(*tensors))
    assert fuse(heads_of("sequential"), 2 * HIDDEN) == "heads are not compiled (their features differ by nan%)"


def test_parallel_heads_have_no_steps():
    assert "all depths at once" in fuse(heads_of("medusa"), HIDDEN)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sequential", "hydra"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(kind, dtype):
    heads = heads_of(kind, "cuda", dtype)
    assert fuse(heads, 2 * HIDDEN if kind == "sequential" else HIDDEN) == "heads are compiled"
