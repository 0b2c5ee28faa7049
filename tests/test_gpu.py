"""The whole engine on a GPU, captured: `pytest -m gpu tests/test_gpu.py`.

Every attention backend, with and without compiled layers, while the number of nodes changes at every step. float32 is
exact; in half precision every first difference is a near-tie.
"""

import itertools

import pytest
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.engine.scheduler import Scheduler
from medusa_serve.model import build
from medusa_serve.model.drafting.drafters import SequentialDrafter
from medusa_serve.model.drafting.heads import SequentialHeads
from medusa_serve.model.forward import attention
from medusa_serve.model.torch_kernels import TorchKernels
from medusa_serve.types import SamplingParams
from tests.oracles import engine, run
from tests.tiny import greedy, tiny_model, tiny_prompts

pytestmark = pytest.mark.gpu
HIDDEN, TOKENS, COUNT = 64, 60, 12
NEAR = 3  # times the rounding of a logit: two tokens so close are a near-tie


def use(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """split-k: what this GPU takes by itself · sdpa: what a T4 takes · reference: matrix products"""
    if backend != "split-k":
        monkeypatch.setattr(build, "choose", lambda device: TorchKernels())
    if backend == "reference":
        monkeypatch.setattr(attention, "_by_batch", attention.reference_attention)


@pytest.fixture
def restless(monkeypatch):
    """Another number of nodes at every step."""
    turns = itertools.count()

    def nodes(self, *rows):
        choices = self._runner.node_choices
        return choices[next(turns) * 5 % len(choices)]

    monkeypatch.setattr(Scheduler, "_nodes", nodes)


def drafter_of(model) -> SequentialDrafter:
    torch.manual_seed(0)
    heads = SequentialHeads(HIDDEN, inner=48, readout=32, max_depth=4).to(model.device, model.dtype)
    heads.requires_grad_(False).attach(model.get_output_embeddings(), model.get_input_embeddings())
    return SequentialDrafter(heads)


def answers(model, prompts, *, compile: bool | None, temperature: float = 0.0, alone: bool = False, speculation=True):
    config = EngineConfig(slots=6, max_context=256, dtype=str(model.dtype).removeprefix("torch."), compile=compile)
    jobs = [
        (p, SamplingParams(max_tokens=TOKENS, temperature=temperature, top_p=0.9 if temperature else 1.0, seed=i,
                           speculation=speculation))
        for i, p in enumerate(prompts)
    ]  # fmt: skip
    with engine(model, config, drafter_of(model)) as manager:
        parts = [[job] for job in jobs] if alone else [jobs]
        return [list(done.token_ids) for part in parts for done in run(manager, part, join_every=0 if alone else 2)]


@pytest.mark.parametrize(
    ("family", "backend", "compile"),
    [
        ("llama", "split-k", True),
        ("llama", "split-k", None),
        ("llama", "split-k", False),
        ("llama", "sdpa", None),
        ("llama", "reference", None),
        ("qwen2", "split-k", None),
        ("gpt2", "sdpa", False),
    ],
)
@pytest.mark.usefixtures("restless")
def test_float32_is_exact(family, backend, compile, monkeypatch):
    use(backend, monkeypatch)
    model = tiny_model(family, torch.float32, hidden=HIDDEN).to("cuda")
    prompts = [p * 2 if i % 2 else p for i, p in enumerate(tiny_prompts(COUNT, 5))]
    want = [greedy(model, prompt, TOKENS) for prompt in prompts]
    assert answers(model, prompts, compile=compile) == want
    hot = answers(model, prompts, compile=compile, temperature=0.8)
    assert hot == answers(model, prompts, compile=compile, temperature=0.8, speculation=False)
    assert hot[:4] == answers(model, prompts, compile=compile, temperature=0.8, alone=True)[:4]
    assert hot != want


@pytest.mark.parametrize("backend", ["split-k", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("restless")
def test_half_precision_differs_at_near_ties_alone(dtype, backend, monkeypatch):
    use(backend, monkeypatch)
    model = tiny_model("llama", dtype, hidden=HIDDEN).to("cuda")
    prompts = tiny_prompts(COUNT, 5)
    found = answers(model, prompts, compile=None)
    exact = tiny_model("llama", torch.float32, hidden=HIDDEN).to("cuda")
    exact.load_state_dict(model.state_dict())
    wrong = count = 0
    for prompt, answer in zip(prompts, found, strict=True):
        ids, chosen = torch.tensor([[*prompt, *answer]], device="cuda"), torch.tensor(answer, device="cuda")
        with torch.no_grad():
            logits, rounded = (one(ids).logits[0, len(prompt) - 1 : -1].float() for one in (exact, model))
        rounding = float((rounded - logits).abs().max())
        best = logits.max(dim=-1)
        assert float((best.values - logits.gather(1, chosen[:, None])[:, 0]).max()) < NEAR * rounding
        wrong, count = wrong + int((best.indices != chosen).sum()), count + len(answer)
    assert wrong < 0.1 * count
    assert wrong or dtype is torch.float16, "bfloat16 rounds so much that some of 720 tokens must differ"
