"""The composition root over a tiny folder: LLM, and the app over a real LLM."""

import gc
import json
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from medusa_serve import LLM, EngineConfig, SamplingParams, ServerConfig
from medusa_serve.errors import ContextTooLong, GenerationFailed, InvalidConfig, InvalidRequest, LoadError
from medusa_serve.model.drafting.draft import MedusaDrafter
from medusa_serve.model.drafting.drafters import ParallelDrafter
from medusa_serve.model.drafting.files import save_heads
from medusa_serve.model.drafting.heads import HeadsInfo, MedusaHeads, SequentialHeads
from medusa_serve.model.loading import load as loader
from medusa_serve.server.app import create_app
from tests.tiny import greedy, save_tiny_folder

httpx = pytest.importorskip("httpx", reason="the server's tests need httpx: pip install -e '.[test]'")

CHAT = [{"role": "user", "content": "the other one"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_folder(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, slots=3, max_context=128, max_queue=2) as made:
        yield made


def test_completions_come_in_input_order_with_the_fields_of_generate(llm):
    prompts = ["the one", CHAT, "a", "then", "in the other", "on and on"]  # more than slots and queue together
    done = llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    assert [c.prompt_tokens for c in done] == [len(llm.encode(prompt)) for prompt in prompts]
    assert all(c.completion_tokens == 12 and c.finish_reason == "length" for c in done)
    keys = ["id", "model", "text", "finish_reason", "seed", "token_ids", "usage", "medusa", "timings"]
    assert list(done[0].to_dict(token_ids=True)) == keys
    again = llm.generate("the one", SamplingParams(max_tokens=12, ignore_eos=True))
    assert again[0].token_ids == done[0].token_ids


def test_text_is_what_generate_gives(llm, folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt in ("the one", CHAT):
        ids = llm.encode(prompt)
        (done,) = llm.generate([prompt], SamplingParams(max_tokens=40))
        want = greedy(model, ids, 40)
        assert list(done.token_ids) == want
        assert done.text == llm.codec.decode(want[:-1] if done.finish_reason == "stop" else want)


def test_stream_adds_up_to_the_completion(llm):
    deltas = list(llm.stream(CHAT, SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8, seed=5)))
    last = deltas[-1].completion
    assert "".join(delta.text for delta in deltas) == last.text
    assert sum(sum(delta.tokens) for delta in deltas) == last.completion_tokens == 20
    assert sum(sum(delta.accepted) for delta in deltas) == last.accepted
    assert sum(len(delta.tokens) for delta in deltas) == last.steps + 1


def test_leaving_a_stream_early_frees_its_slot(llm):
    for delta in llm.stream("the one", SamplingParams(max_tokens=100, ignore_eos=True)):
        assert not delta.is_last
        break
    llm.generate("a", SamplingParams(max_tokens=2))
    status = llm.manager.status()
    assert (status.running, status.waiting) == (0, 0)
    assert llm.manager.metrics.snapshot()["outcomes"]["cancelled"] >= 1


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ("", None, InvalidRequest),
        ("a" * 500, None, ContextTooLong),
        ("a", SamplingParams(max_tokens=500), ContextTooLong),
        (7, None, (InvalidRequest, TypeError)),
        ([{"role": "user"}], None, InvalidRequest),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(llm, prompt, params, error):
    with pytest.raises(error):
        llm.generate([prompt], params)


@pytest.mark.parametrize("prompt", [7, None, {"role": "user", "content": "x"}, [7]])
def test_what_is_no_prompt_is_refused(llm, prompt):
    with pytest.raises(InvalidRequest, match="A prompt is a string or a list of messages"):
        llm.generate(prompt)


def test_params_of_another_kind_are_refused(llm):
    with pytest.raises(InvalidRequest, match="params must be SamplingParams, not dict"):
        llm.generate("a", {"max_tokens": 2})
    with pytest.raises(InvalidRequest, match="params"):
        next(llm.stream("a", 4))


def test_loading_leaves_no_workers_in_the_callers_thread(folder, monkeypatch):
    """What loads computes too; its thread must be gone when the engine's begins."""
    seen, load = [], loader.load_model

    def spy(config):
        seen.append(threading.current_thread())
        return load(config)

    monkeypatch.setattr(loader, "load_model", spy)
    with LLM(folder, slots=2, max_context=64) as made:
        assert made.generate("a b", SamplingParams(max_tokens=2))
        (thread,) = seen
        assert thread is not threading.current_thread()
        assert not thread.is_alive()
    with pytest.raises(LoadError, match="There is no folder"):
        LLM("/nowhere/at/all")


def test_every_prompt_may_have_params_of_its_own(llm):
    each = [SamplingParams(max_tokens=count, temperature=0.8, seed=count, ignore_eos=True) for count in (3, 5)]
    together = llm.generate(["a b", "a b"], each)
    assert [done.completion_tokens for done in together] == [3, 5]
    assert [done.token_ids for done in together] == [llm.generate("a b", one)[0].token_ids for one in each]
    with pytest.raises(InvalidRequest, match="There are 2 prompts and 1 params"):
        llm.generate(["a", "b"], each[:1])


def test_no_more_are_open_than_are_asked_for_at_once():
    class Manager:
        """Ends all that are open once three are, or the last one came; with errors where it is `broken`."""

        def __init__(self, broken=False):
            self.open = []
            self.most, self.asked, self.cancelled, self.broken = 0, 0, [], broken

        def submit(self, ids, params, sink):
            self.asked += 1
            self.open.append((f"s{self.asked}", sink))
            self.most = max(self.most, len(self.open))
            if len(self.open) == 3 or self.asked == 8:
                while self.open:
                    name, tell = self.open.pop(0)
                    error = GenerationFailed("no") if self.broken else None
                    done = None if error else SimpleNamespace(completion_tokens=len(ids))
                    tell([(name, SimpleNamespace(error=error, completion=done))])
            return f"s{self.asked}"

        def cancel(self, name):
            self.cancelled.append(name)

    whole, broken = Manager(), Manager(broken=True)
    done = LLM.generate_ids(SimpleNamespace(manager=whole), [[1, 2]] * 8, SamplingParams(), at_once=3)
    assert sum(completion.completion_tokens for completion in done) == 16
    assert (whole.most, whole.asked, whole.cancelled) == (3, 8, [])
    with pytest.raises(GenerationFailed):
        LLM.generate_ids(SimpleNamespace(manager=broken), [[1, 2]] * 8, SamplingParams(), at_once=3)
    assert sorted(broken.cancelled) == ["s1", "s2", "s3"]


def test_unknown_options_are_errors(folder):
    with pytest.raises(InvalidConfig, match="slotz"):
        LLM(folder, slotz=3)
    with pytest.raises(InvalidConfig, match="slots"):
        LLM(folder, slots=0)


def _info(num_heads: int, hidden: int, vocab: int, tied: bool) -> HeadsInfo:
    return HeadsInfo(
        family="medusa", num_heads=num_heads, num_layers=1, hidden_size=hidden, vocab_size=vocab, tied=tied, bias=True
    )


CHOICES = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("tied", "tree", "drafter"),
    [(True, "16", ParallelDrafter), (False, "16", ParallelDrafter), (True, "file", MedusaDrafter)],
)
def test_heads_from_a_folder_draft_and_change_nothing(folder, tmp_path, tied, tree, drafter):
    """Random heads: the tree, of each step or a user's own, is verified at every step, and the text stays."""
    params = [SamplingParams(max_tokens=24, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 0.8)]
    with LLM(folder, slots=2, max_context=128, heads="none", tree="off") as plain:
        vocab = plain.manager._runner.vocab_size
        want = [plain.generate([CHAT, "the one"], one) for one in params]
    torch.manual_seed(0)
    heads = MedusaHeads(32, 3, 1, vocab_size=None if tied else vocab)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    info = _info(3, 32, vocab, tied)
    path = save_heads(heads, info, tmp_path / "heads", layout="C" if tied else "B", dtype=torch.float32)
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(CHOICES))
    tree = str(file) if tree == "file" else tree
    with LLM(folder, slots=2, max_context=128, heads=str(path), tree=tree) as llm:
        assert llm.describe()["heads"] == "medusa"
        assert isinstance(llm.manager._runner.drafter, drafter)
        for one, plain_texts in zip(params, want, strict=True):
            done = llm.generate([CHAT, "the one"], one)
            assert [c.token_ids for c in done] == [c.token_ids for c in plain_texts]
            assert all(c.drafted > 0 for c in done)


def test_a_tree_file_is_for_parallel_heads(folder, tmp_path):
    heads = SequentialHeads(32, inner=16, readout=16, max_depth=3)
    path = save_heads(heads, replace(_info(3, 32, 0, True), family="sequential"), tmp_path / "heads")
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(CHOICES))
    with pytest.raises(LoadError, match="parallel heads"):
        LLM(folder, heads=str(path), tree=str(file))


def test_sequential_heads_draft_a_tree_of_each_step_and_change_nothing(folder, tmp_path):
    with LLM(folder, slots=2, max_context=128, heads="none", tree="off") as plain:
        vocab = plain.manager._runner.vocab_size
        params = [SamplingParams(max_tokens=24, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 0.8)]
        want = [plain.generate([CHAT, "the one"], one) for one in params]
    torch.manual_seed(0)
    heads = SequentialHeads(32, inner=16, readout=16, max_depth=3, token_map=torch.arange(0, vocab, 2))
    info = replace(_info(3, 32, vocab, True), family="sequential", token_map=len(range(0, vocab, 2)))
    path = save_heads(heads, info, tmp_path / "heads", dtype=torch.float32)
    with LLM(folder, slots=2, max_context=128, heads=str(path), tree="16") as llm:
        assert llm.describe()["heads"] == "sequential"
        for one, plain_texts in zip(params, want, strict=True):
            done = llm.generate([CHAT, "the one"], one)
            assert [c.token_ids for c in done] == [c.token_ids for c in plain_texts]
            assert all(c.drafted > 0 for c in done)


def test_a_draft_that_fails_leaves_every_sequence_as_it_was(folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    path = save_heads(SequentialHeads(32, inner=16, readout=16, vocab_size=300), replace(
        _info(3, 32, 300, False), family="sequential"), tmp_path / "heads", dtype=torch.float32)  # fmt: skip
    greedy = SamplingParams(max_tokens=24, ignore_eos=True)
    with LLM(folder, slots=2, max_context=128, heads=str(path), tree="4") as llm:
        want = [done.token_ids for done in llm.generate([CHAT, "the one"], greedy)]
        drafter, calls = llm.manager._runner.drafter, []
        draft = drafter.draft

        def failing(*given):
            calls.append(0)
            if len(calls) % 5 == 4:
                raise RuntimeError("no memory for it")
            return draft(*given)

        monkeypatch.setattr(drafter, "draft", failing)
        got = [done.token_ids for done in llm.generate([CHAT, "the one"], greedy)]
    assert len(calls) > 10
    assert got == want


def test_another_model_that_is_loaded_meanwhile_changes_nothing(folder, tmp_path):
    """While transformers loads one, the process's default dtype is that model's."""
    heads = SequentialHeads(32, inner=16, readout=16, max_depth=3)
    info = replace(_info(3, 32, 0, True), family="sequential")
    path = save_heads(heads, info, tmp_path / "heads", dtype=torch.float32)
    with LLM(folder, heads=str(path), tree="8", slots=2, max_context=128) as llm:
        rest = {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.2, "presence_penalty": 0.5}
        biased = SamplingParams(max_tokens=24, logit_bias=((5, 1.5),), logprobs=2, **rest)
        asked = [SamplingParams(max_tokens=24), biased]
        wanted = llm.generate(["the cat", "the other"], asked)
        torch.set_default_dtype(torch.bfloat16)
        try:
            got = llm.generate(["the cat", "the other"], asked)
        finally:
            torch.set_default_dtype(torch.float32)
    for a, b in zip(got, wanted, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == b.logprobs


@pytest.mark.parametrize("family", ["medusa", "sequential"])
def test_asking_for_heads_that_do_not_ship_is_an_error(folder, family):
    with pytest.raises(LoadError, match=f"no {family} heads ship"):
        LLM(folder, heads=family)


def test_heads_of_another_model_are_refused(folder, tmp_path):
    info = _info(2, 48, 97, True)
    path = save_heads(MedusaHeads(48, 2, 1), info, tmp_path / "heads", layout="C")
    with pytest.raises(LoadError, match="48"):
        LLM(folder, heads=str(path))


@pytest.fixture
def client(llm):
    transport = httpx.ASGITransport(app=create_app(llm, ServerConfig()))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


async def ask(client, **body):
    async with client:
        return await client.post("/generate", json=body), await client.get("/health")


def test_generate_and_health_over_the_real_engine(llm, client):
    import asyncio

    answer, health = asyncio.run(ask(client, messages=CHAT, max_tokens=16, return_token_ids=True))
    (direct,) = llm.generate([CHAT], SamplingParams(max_tokens=16))
    body = answer.json()
    assert answer.status_code == 200
    assert (body["text"], body["token_ids"]) == (direct.text, list(direct.token_ids))
    assert body["usage"] == {"prompt_tokens": direct.prompt_tokens, "completion_tokens": direct.completion_tokens}
    assert health.status_code == 200
    assert health.json()["status"] == "ok"


def test_closing_frees_the_model(folder):
    """Context managers free everything: no engine thread, no registered attention, no slab."""
    import gc
    import threading
    import weakref

    from transformers import AttentionInterface

    before = set(AttentionInterface._global_mapping)
    with LLM(EngineConfig(model=folder, slots=2, max_context=64)) as llm:
        assert set(AttentionInterface._global_mapping) != before
        keys = weakref.ref(llm.manager._runner.forward.cache.keys)
        model = weakref.ref(llm.manager._runner.forward.model)
        llm.generate("a", SamplingParams(max_tokens=3))
        names = [thread.name for thread in threading.enumerate()]
        assert "medusa-engine" in names
        mine = llm.manager._thread
    assert not mine.is_alive()
    assert set(AttentionInterface._global_mapping) == before
    del llm
    gc.collect()
    assert keys() is None
    assert model() is None


def test_one_that_is_forgotten_closes(folder):
    manager = LLM(folder, slots=1, max_context=64).manager
    gc.collect()
    assert manager.status().state == "closed"


def test_a_process_may_end_in_the_middle_of_a_stream(folder):
    script = f"""
from medusa_serve import LLM, SamplingParams
llm = LLM({folder!r}, slots=1, max_context=512)
for text in llm.stream("the one", SamplingParams(max_tokens=400, ignore_eos=True)):
    break
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
