"""Packed prefill: python -m pytest tests/model/test_packed.py"""

from types import SimpleNamespace

import pytest
import torch

from medusa_serve.model.forward.prefill_blocks import BLOCK, FEW, Run, block_view, pack, rows_for
from medusa_serve.model.forward.tree_forward import TreeForward
from medusa_serve.model.forward.view import chain_view
from medusa_serve.model.step import Step
from tests.tiny import tiny_model

SLOTS, COLUMNS, ROWS = 5, 128, 4


def test_blocks_of_the_drawn_example():
    packed = pack([Run(3, 5, range(100, 116), False), Run(1, 0, range(200, 220), True)], ROWS, SLOTS)
    assert packed.slots.tolist()[:3] == [3, 1, 1]
    assert packed.starts.tolist() == [5, 0, 16, -1, -1, -1, -1, -1]
    assert packed.tokens[0].tolist() == [*range(100, 116)]
    assert packed.tokens[2].tolist() == [*range(216, 220), *[0] * 12]
    assert packed.last.tolist()[:2] == [15, 2 * BLOCK + 3]
    assert packed.lengths.tolist() == [21, 19, -1, -1]  # a complete prompt's last token becomes the root
    assert packed.whole.tolist() == [0, 1, 0, 0]
    assert len(set(packed.rows.tolist())) == ROWS
    assert packed.rows.tolist()[:2] == [3, 1]


def test_as_many_rows_as_slots_and_more_blocks_than_the_least():
    packed = pack([Run(slot, 0, range(40), True) for slot in range(SLOTS)], SLOTS, SLOTS)
    assert (len(packed.slots), sorted(packed.rows.tolist())) == (16, [*range(SLOTS)])


def test_a_pass_is_for_few_prompts_or_for_as_many_as_there_may_be():
    assert [rows_for(prompts, 64) for prompts in (1, FEW, FEW + 1, 64)] == [FEW, FEW, 64, 64]
    assert [rows_for(prompts, 4) for prompts in (1, 4)] == [4, 4]


@pytest.mark.parametrize(
    ("packs", "choices", "drafted"),
    [(True, (1, 4, 64), [64, 4]), (False, (1, 4, 64), [64, 64]), (True, (1, 16), [16, 16]), (True, (1,), [1, 1])],
)
def test_a_pass_of_many_prompts_drafts_little(packs, choices, drafted):
    step = SimpleNamespace(in_blocks=packs, shapes=dict.fromkeys(choices))
    assert [Step.first_nodes(step, prompts) for prompts in (FEW, FEW + 1)] == drafted


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_packed_equals_one_prompt_after_the_other(family):
    """Logits, hidden states and what stands in the cache; prompts in two chunks, the second beside a fresh prompt."""
    model = tiny_model(family).double()
    generator = torch.Generator().manual_seed(3)
    prompts = {
        slot: torch.randint(model.config.vocab_size, (n,), generator=generator) for slot, n in ((0, 45), (3, 20))
    }
    passes = [{0: (0, 17)}, {3: (0, 20), 0: (17, 45)}]
    plain = TreeForward(model, SLOTS, COLUMNS, model.config.max_position_embeddings)
    want = []
    with torch.inference_mode():
        for chunks in passes:
            for slot, (start, end) in chunks.items():
                view = chain_view([slot], [start], [end - start], torch.device("cpu"))
                want.append(plain.run(prompts[slot][None, start:end], view, last_only=True))
        keys, values = plain.cache.keys.clone(), plain.cache.values.clone()
        plain.close()
        packing = TreeForward(model, SLOTS, COLUMNS, model.config.max_position_embeddings)
        got = []
        for chunks in passes:
            runs = [Run(slot, a, prompts[slot][a:b].tolist(), b == 45) for slot, (a, b) in chunks.items()]
            packed = pack(runs, ROWS, SLOTS)
            host = packed.slots.tolist(), packed.starts.clamp(min=0).tolist()
            view = block_view(packed, COLUMNS, *host, width=COLUMNS)
            logits, hidden = packing.run_packed(packed.tokens, view, packed.last)
            got += [(logits[row : row + 1], hidden[row : row + 1]) for row in range(len(runs))]
    for (logits, hidden), (want_logits, want_hidden) in zip(got, want, strict=True):
        torch.testing.assert_close(logits, want_logits)
        torch.testing.assert_close(hidden, want_hidden)
    for slot, ids in prompts.items():
        torch.testing.assert_close(packing.cache.keys[:, slot, : len(ids)], keys[:, slot, : len(ids)])
        torch.testing.assert_close(packing.cache.values[:, slot, : len(ids)], values[:, slot, : len(ids)])
    assert not packing.cache.keys[:, [1, 2, 4]].any()  # empty blocks write behind slot 0's context
    packing.close()
