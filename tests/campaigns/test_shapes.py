"""Models of random weights, and `python -m tests.campaigns step`, which measures them."""

from __future__ import annotations

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.errors import InvalidConfig
from tests.campaigns import __main__ as campaigns
from tests.campaigns.shapes import SHAPES, random_drafter, random_model
from tests.campaigns.step import RandomStepConfig


def test_random_models_are_the_same_each_time_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two = (random_model("tiny", EngineConfig(device="cpu", dtype="bfloat16")) for _ in range(2))
    heads = [random_drafter(loaded.model).heads for loaded in (one, two)]
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert torch.equal(heads[0].start_proj.weight, heads[1].start_proj.weight)
    assert {p.dtype for p in (*one.model.parameters(), *heads[0].parameters())} == {torch.bfloat16}
    assert heads[0].output.weight.data_ptr() == one.model.lm_head.weight.data_ptr()
    assert one.model.config.num_hidden_layers == SHAPES["tiny"]["num_hidden_layers"]


def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidConfig, match="random must be"):
        RandomStepConfig(random="llama-8b")
    with pytest.raises(InvalidConfig, match="rows must be"):
        RandomStepConfig(rows=(0,))
    with pytest.raises(SystemExit) as leaving:
        campaigns.main(["step", "--random", "tiny", "--model", "another"])
    assert leaving.value.code == 2
    assert "--random makes its own" in capsys.readouterr().err
