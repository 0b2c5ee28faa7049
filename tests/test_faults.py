"""Seeded bugs must be seen, and numbers that go bad must stay with their own sequence."""

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.errors import EngineRestarting, GenerationFailed
from medusa_serve.model import selftest as selftest_module
from medusa_serve.model.build import build_runner
from medusa_serve.model.cpu import kernels as cpu_kernels
from medusa_serve.model.cpu.kernels import CpuKernels
from medusa_serve.model.drafting import tree as tree_module
from medusa_serve.model.forward import tree_forward as forward_module
from medusa_serve.model.forward.slab import SlotCache
from medusa_serve.model.forward.tree_forward import PlugInError
from medusa_serve.model.sampling.filters import pick as real_pick
from medusa_serve.model.selftest import check, references
from medusa_serve.types import SamplingParams
from tests.fakes import Collector
from tests.oracles import Oracle, engine, run
from tests.tiny import VOCAB, greedy, tiny_model, tiny_prompts

CONFIG = EngineConfig(slots=4, max_context=256, tree="16")


def wrong_mask_bit(monkeypatch):
    """The second node at depth 1 also sees its sibling, node 1."""
    real = tree_module.ancestors

    def ancestors(parents, max_depth):
        mask = real(parents, max_depth).clone()
        for row in range(len(parents)):
            siblings = [node for node in range(2, parents.shape[1]) if parents[row, node] == 0]
            if siblings:
                mask[row, siblings[0], 1] = True
        return mask

    monkeypatch.setattr(tree_module, "ancestors", ancestors)

    def see_it(opened):
        for row, parents in enumerate(opened.parents.tolist()):
            siblings = [node for node in range(2, len(parents)) if parents[node] == 0]
            if siblings:
                opened.bits[row, siblings[0]] |= 1 << 1

    in_the_kernel(monkeypatch, see_it)


def in_the_kernel(monkeypatch, spoil):
    """The same bug where the trees of greedy rows are made."""
    real = CpuKernels.open_step

    def open_step(_, *args):
        opened = real(*args)
        spoil(opened)
        return opened

    monkeypatch.setattr(CpuKernels, "open_step", open_step)


def position_off_by_one(monkeypatch):
    real = selftest_module.tree_view

    def tree_view(*args, **how):
        view = real(*args, **how)
        view.positions += view.positions > view.length[:, None]
        return view

    monkeypatch.setattr(selftest_module, "tree_view", tree_view)

    def move(opened):
        opened.positions.add_((opened.positions > opened.length[:, None]).long())

    in_the_kernel(monkeypatch, move)


def skipped_commit(monkeypatch):
    monkeypatch.setattr(SlotCache, "commit", lambda self, slots, length, nodes: None)


def reused_noise(monkeypatch):
    """All depths of a step draw with the noise of its first position."""
    walk = cpu_kernels.walk_by_depth
    base: list = []

    def pick(logits, sampling, position):
        if (
            not base
            or len(base[0]) != len(position)
            or bool((position < base[0]).any() | (position > base[0] + 4).any())
        ):
            base[:] = [position]
        return real_pick(logits, sampling, base[0])

    monkeypatch.setattr(cpu_kernels, "walk_by_depth", lambda *given, **how: walk(*given, pick=pick, **how))


@pytest.fixture(scope="module")
def setting():
    model = tiny_model("llama")
    prompts = tiny_prompts(4, 6)
    return prompts, {tuple(prompt): greedy(model, prompt, 48) for prompt in prompts}


def texts(heads: str, prompts, truth, params: SamplingParams, config=CONFIG):
    with engine(tiny_model("llama"), config, Oracle(heads, VOCAB, truth)) as manager:
        return [list(c.token_ids) for c in run(manager, [(p, params) for p in prompts])]


@pytest.mark.parametrize("bug", [wrong_mask_bit, position_off_by_one, skipped_commit])
def test_seeded_bugs_change_the_text(setting, bug, monkeypatch):
    """Without the load-time self-test, which would refuse to start (next test), the exactness tests see each of
    them."""
    prompts, truth = setting
    monkeypatch.setattr("medusa_serve.model.build.check", lambda *args: 0.0)
    assert texts("right", prompts, truth, SamplingParams(max_tokens=48)) == list(truth.values())
    bug(monkeypatch)
    if bug is wrong_mask_bit:  # the second candidate must be walked: make it the right one
        monkeypatch.setattr(Oracle, "_row", second_is_right(Oracle._row))
    assert texts("right", prompts, truth, SamplingParams(max_tokens=48)) != list(truth.values())


def second_is_right(real):
    return lambda self, slot, length: real(self, slot, length).roll(1, dims=1)


@pytest.mark.parametrize("bug", [wrong_mask_bit, position_off_by_one, skipped_commit])
def test_seeded_bugs_are_seen_in_the_logits_by_the_self_test(bug, monkeypatch):
    model = tiny_model("llama")
    device = model.device

    def self_test() -> float:
        prompts, wanted = references(model, device)
        forward = forward_module.TreeForward(model, 2, 64, 512)
        try:
            return check(forward, prompts, wanted, 2)
        finally:
            forward.close()

    assert self_test() < 1e-12
    bug(monkeypatch)
    with pytest.raises(PlugInError, match="differ from a plain forward"):
        self_test()


def test_a_model_that_fails_its_self_test_decodes_plainly_and_says_so(setting, monkeypatch):
    prompts, truth = setting
    position_off_by_one(monkeypatch)
    model = tiny_model("llama")
    built = build_runner(model, CONFIG, eos_ids=[], max_positions=512)
    assert built.tree_error is None
    assert "decodes plainly" in built.notes[-1]
    assert "differ from a plain forward" in built.notes[-1]
    assert greedy(model, prompts[0], 48) == truth[tuple(prompts[0])]  # its own attention is back in place
    built.runner.close()


def test_reused_noise_is_seen(setting, monkeypatch):
    prompts, truth = setting
    params = SamplingParams(max_tokens=48, temperature=1.0, seed=3)
    plain = texts("wrong", prompts, truth, params, EngineConfig(slots=1, max_context=256, tree="off"))
    known = {tuple(p): ids for p, ids in zip(prompts, plain, strict=True)}
    assert texts("right", prompts, known, params) == plain
    reused_noise(monkeypatch)
    assert texts("right", prompts, known, params) != plain


def test_a_leaked_slot_is_seen(setting):
    prompts, truth = setting
    with engine(tiny_model("llama"), CONFIG) as manager:
        run(manager, [(prompts[0], SamplingParams(max_tokens=5))])
        manager._scheduler._free.discard(2)
        with pytest.raises(RuntimeError, match="leaked"):
            manager.step()
        manager._scheduler._free.add(2)


def poison(manager, slot: int, column: int) -> None:
    cache = manager.runner.forward.cache
    cache.values[:, slot, column] = torch.nan


def test_a_sequence_with_bad_numbers_ends_alone_and_its_slot_is_as_new(setting):
    prompts, truth = setting
    with engine(tiny_model("llama"), CONFIG, Oracle("right", VOCAB, truth)) as manager:
        sink = Collector()
        ids = [manager.submit(prompt, SamplingParams(max_tokens=48), sink) for prompt in prompts]
        while len(sink.deltas.get(ids[3], [])) < 2:
            manager.step()
        slot = next(slot for slot, seq in manager._scheduler.running.items() if seq.id == ids[1])
        poison(manager, slot, 2)
        while not all(sink.last(id) for id in ids):
            manager.step()
        assert isinstance(sink.last(ids[1]).error, GenerationFailed)
        for i in (0, 2, 3):
            assert sink.token_ids(ids[i]) == truth[tuple(prompts[i])]
        cache = manager.runner.forward.cache
        assert bool(torch.isfinite(cache.values).all())
        done = run(manager, [(prompt, SamplingParams(max_tokens=48)) for prompt in prompts])
        assert [list(c.token_ids) for c in done] == list(truth.values())


def test_a_sequence_that_makes_the_model_raise_ends_alone(setting):
    """The whole pass fails; it is repeated row by row, and only the row that fails alone ends."""
    prompts, truth = setting
    with engine(tiny_model("llama"), CONFIG, Oracle("right", VOCAB, truth)) as manager:
        sink = Collector()
        ids = [manager.submit(prompt, SamplingParams(max_tokens=48), sink) for prompt in prompts]
        while len(sink.deltas.get(ids[3], [])) < 2:
            manager.step()
        bad = next(slot for slot, seq in manager._scheduler.running.items() if seq.id == ids[2])
        real = manager.runner.forward.run

        def fails(tokens, view, last_only=False):
            if bad in view.host_slots and not last_only:
                raise RuntimeError("index out of range in self")
            return real(tokens, view, last_only)

        manager.runner.forward.run = fails
        while not all(sink.last(id) for id in ids):
            manager.step()
        assert isinstance(sink.last(ids[2]).error, GenerationFailed)
        for i in (0, 1, 3):
            assert sink.token_ids(ids[i]) == truth[tuple(prompts[i])]


@pytest.mark.parametrize("when", ["between two passes", "within a pass", "with newcomers"])
def test_an_engine_that_starts_again_has_slots_as_new(setting, when):
    """Whatever the slots and the tables held, and whoever had been admitted but not prefilled."""
    prompts, truth = setting
    jobs = [(prompt, SamplingParams(max_tokens=48)) for prompt in prompts]
    with engine(tiny_model("llama"), CONFIG, Oracle("right", VOCAB, truth)) as manager:
        sink, forward = Collector(), manager.runner.forward
        ids = [manager.submit(*job, sink) for job in jobs]
        while when != "with newcomers" and len(sink.deltas.get(ids[3], [])) < 2:
            manager.step()
        forward.cache.values[:, :, 3] = torch.nan  # a slot that rests must not keep them
        place, name = (manager._scheduler, "plan") if when == "with newcomers" else (forward, "run")
        real = getattr(place, name)

        def fails(*args, **how):
            if when == "within a pass":
                real(*args, **how)
            raise SystemExit

        setattr(place, name, fails)
        with pytest.raises(SystemExit) as caught:
            manager.step()
        setattr(place, name, real)
        assert bool(manager.runner._admitted) == (when == "with newcomers")
        assert manager.recover(caught.value)
        assert {type(sink.last(id).error) for id in ids} == {EngineRestarting}
        assert manager.runner._admitted == []
        assert bool(torch.isfinite(forward.cache.values).all())
        sampled = SamplingParams(max_tokens=48, temperature=1.0, seed=3, repetition_penalty=1.3)
        done = run(manager, [*jobs[::-1], (prompts[0], sampled)])
        assert [list(c.token_ids) for c in done[:4]][::-1] == list(truth.values())
        assert manager.metrics.snapshot()["restarts"] == 1
    with engine(tiny_model("llama"), CONFIG) as fresh:
        assert run(fresh, [(prompts[0], sampled)])[0].token_ids == done[4].token_ids
