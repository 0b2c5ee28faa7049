"""The plan of a GPU's memory from a config alone, and what happens where it was too small all the same."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from medusa_serve import cli, presets
from medusa_serve.commands.plan import parse_memory, plan_of
from medusa_serve.config import Choice, EngineConfig
from medusa_serve.errors import InvalidConfig, LoadError
from medusa_serve.llm import LLM
from medusa_serve.model import build
from medusa_serve.model.loading import choose
from medusa_serve.model.loading import gpu_memory as memory
from medusa_serve.model.loading.gpu_memory import HeadSizes, MemoryPlan, plan_memory, sizes_of
from medusa_serve.model.loading.room import Room
from medusa_serve.model.loading.slots import LEAST_REST, plan_slots
from medusa_serve.model.loading.source import hf_config_of
from medusa_serve.model.weights import nf4
from tests.campaigns.shapes import quantize_nf4
from tests.tiny import save_tiny_folder, tiny_model

GiB = 2**30
VICUNA = {  # lmsys/vicuna-7b-v1.3's config.json, the numbers that matter here
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


@pytest.fixture
def vicuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The preset, with a folder that holds the config alone in the hub's place."""
    (tmp_path / "config.json").write_text(json.dumps(VICUNA))
    preset = presets.PRESETS["vicuna-7b-v1.3"]
    replaced = presets.Preset(base=str(tmp_path), heads=preset.heads, layout="A", num_heads=preset.num_heads)
    monkeypatch.setitem(presets.PRESETS, "vicuna-7b-v1.3", replaced)
    monkeypatch.setattr(memory, "sizes_of", lambda config: vicuna_sizes())  # a third of a second each
    return "vicuna-7b-v1.3"


@cache
def vicuna_sizes() -> memory.Sizes:
    return sizes_of(LlamaConfig(**VICUNA))


def plan(name: str, size: str = "15GiB", **options: Any) -> MemoryPlan:
    return plan_of(EngineConfig(model=name, **options), size)


def test_the_numbers_of_a_7b_model(vicuna: str) -> None:
    """6,738,415,616 weights, as published; 5 heads of 4096² + 4096 + 32000 · 4096 numbers."""
    sizes = sizes_of(hf_config_of(vicuna))
    assert sizes.linear + sizes.other == 6_738_415_616
    assert sizes.column == 2 * 32 * 4096
    assert plan(vicuna).heads == 2 * 5 * (4096**2 + 4096 + 32000 * 4096)


def test_vicuna_7b_with_5_heads_fits_a_t4_only_quantised(vicuna: str) -> None:
    whole, auto = plan(vicuna, quantize="none"), plan(vicuna)
    assert whole.slots == 0
    assert "--quantize nf4" in whole.advice
    assert (auto.quantize, auto.context) == ("nf4", 2048)
    assert auto.slots >= memory.WANTED_SLOTS
    assert auto.why == "in half precision no slot of 2048 tokens would fit"
    assert auto.left >= 0


@pytest.mark.parametrize("size", ["8GiB", "15GiB", "24GiB", "80GiB"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_plan_and_the_code_agree(vicuna: str, size: str, quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once weights and heads are loaded, as many slots are made of what is free as the plan said."""
    planned = plan(vicuna, size, quantize=quantize)
    free = parse_memory(size) - memory.CONTEXT - planned.weights - planned.heads
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (max(0, free), parse_memory(size)))
    per_column = 2 * 32 * 4096 * 2
    config, device = EngineConfig(quantize=quantize), torch.device("cuda")
    if not planned.slots:
        with pytest.raises(LoadError, match="not one slot"):
            plan_slots(config, per_column, planned.context + memory.SLACK, device)
        return
    assert plan_slots(config, per_column, planned.context + memory.SLACK, device)[0] == planned.slots


def test_each_remedy_makes_it_fit(vicuna: str) -> None:
    for given in ({"quantize": "none"}, {"quantize": "nf4", "slots": 16}, {"quantize": "none", "slots": 2}):
        refused = plan(vicuna, **given)
        assert not refused.slots
        assert refused.advice
        for way in refused.advice:
            words = way.split()
            if words[0].startswith("--"):
                options = {
                    k.removeprefix("--").replace("-", "_"): v for k, v in zip(words[::2], words[1::2], strict=True)
                }
                numbers = {name: int(value) for name, value in options.items() if value.isdigit()}
                assert plan(vicuna, **(given | options | numbers)).slots, way
    shorter = plan(vicuna, "7GiB", quantize="nf4")
    assert "--max-context 1024" in shorter.advice


def test_half_precision_where_there_is_room_and_nothing_where_there_is_none(vicuna: str) -> None:
    assert (plan(vicuna, "80GiB").quantize, plan(vicuna, "80GiB").slots) == ("none", 50)
    hopeless = plan(vicuna, "3GiB")
    assert hopeless.slots == 0
    assert hopeless.lines()[-1] == "no option helps: choose a smaller model"


def test_tied_heads_are_small(vicuna: str) -> None:
    sizes = sizes_of(hf_config_of(vicuna))
    tied, own = HeadSizes(3, tied=True).numbers(sizes), HeadSizes(3).numbers(sizes)
    assert (tied, own - tied) == (3 * (4096**2 + 4096), 3 * 32000 * 4096)


def test_the_command_prints_the_plan(vicuna: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", vicuna, "--memory", "15GiB"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines() == plan(vicuna).lines()
    assert "weights                     3.88 GiB  quantize nf4: in half precision no slot" in printed
    assert cli.main(["plan", "--model", vicuna, "--memory", "15GiB", "--quantize", "none", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["fits"], told["quantize"]) == (False, "none")
    parts = told["context_bytes"] + told["weights"] + told["heads"] + told["slots"] * told["slot"] + told["rest"]
    assert parts + told["left"] == 15 * GiB


@pytest.mark.parametrize("text", ["", "15XB", "many", "-1GiB", "1e99GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(LoadError, match="no size of memory"):
        parse_memory(text)


def test_sizes_are_read() -> None:
    assert [parse_memory(text) for text in ("15GiB", "16GB", "15", "512 MiB")] == [
        15 * GiB,
        16 * 10**9,
        15 * GiB,
        GiB // 2,
    ]


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(vicuna: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (13 * GiB, 15 * GiB))
    config = EngineConfig(model=vicuna, quantize="none")
    chosen = (config, torch.device("cuda"), hf_config_of(vicuna), torch.float16)
    with pytest.raises(LoadError, match=r"does not fit: not one slot of 2048 tokens; it would with --quantize nf4 "):
        choose.quantized_to_fit(*chosen)
    monkeypatch.setattr(choose, "require_nf4", lambda device: None)
    weights, notes = choose.quantized_to_fit(EngineConfig(model=vicuna), *chosen[1:])
    assert weights == "nf4"
    assert notes[0] == "quantize nf4 because in half precision no slot of 2048 tokens would fit"


# ---- out of memory at start ------------------------------------------------------------------------------------------


class Full:
    """Stands for TreeForward on a device with room for so many slots and columns."""

    def __init__(self, room: int, real: Any) -> None:
        self.room, self.real = room, real

    def __call__(self, model: Any, slots: int, columns: int, *rest: Any) -> Any:
        if slots * columns > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return self.real(model, slots, columns, *rest)


def starting(columns: int, monkeypatch: pytest.MonkeyPatch) -> build.Built:
    """Start with 8 slots of 2048 tokens where there is room for so many columns."""

    def build_runner(model: Any, config: EngineConfig, *, max_positions: int | None, room: Room) -> build.Built:
        slots, context = room.slots.value, room.context.value
        if slots * context > columns:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return build.Built(SimpleNamespace(slots=slots, context=context), ["more"])  # type: ignore[arg-type]

    monkeypatch.setattr(build, "build_runner", build_runner)
    monkeypatch.setattr(build, "plan_room", lambda *_: Room(Choice(8, "the default"), Choice(2048, "the default")))
    monkeypatch.setattr(build.gc, "collect", lambda: 0)  # slow in a process as large as a test's
    return build.build_that_fits(None, EngineConfig(), max_positions=None)


def test_slots_then_context_shrink_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = starting(2 * 2048, monkeypatch)
    assert vars(roomy.runner) == {"slots": 2, "context": 2048}
    told = ["4 slots because the memory was full with 8", "2 slots because the memory was full with 4"]
    assert roomy.notes == [*told, "more"]
    narrow = starting(600, monkeypatch)
    assert vars(narrow.runner) == {"slots": 1, "context": 512}
    assert narrow.notes[-2] == "a context of 512 tokens because the memory was full with 1024"
    with pytest.raises(LoadError, match="Not one sequence of 512 tokens fits beside the model"):
        starting(100, monkeypatch)


def test_a_served_model_starts_with_fewer_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "TreeForward", Full(300, build.TreeForward))
    folder = save_tiny_folder(tmp_path)
    with LLM(str(folder), slots=4, max_context=128, device="cpu", dtype="float32", compile=False) as llm:
        assert llm.describe()["slots"] == 1
        assert "1 slots because the memory was full with 2" in llm.notes
        assert llm.generate("the cat")[0].completion_tokens > 0


# ---- nf4 -------------------------------------------------------------------------------------------------------------


def test_nf4_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="nf4 weights are for a GPU"):
        nf4.require_nf4(torch.device("cpu"))
    versions = {"bitsandbytes": "0.49.2", "accelerate": "1.15.0"}
    monkeypatch.setattr(nf4.metadata, "version", lambda name: versions[name])
    with pytest.raises(LoadError, match=r"need bitsandbytes 0\.50 or newer, and 0\.49\.2 is installed"):
        nf4.require_nf4(torch.device("cuda"))
    versions["bitsandbytes"] = "0.50.2"
    nf4.require_nf4(torch.device("cuda"))

    def missing(name: str) -> str:
        raise nf4.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(nf4.metadata, "version", missing)
    with pytest.raises(LoadError, match="pip install 'bitsandbytes>=0.50' accelerate"):
        nf4.require_nf4(torch.device("cuda"))
    with pytest.raises(InvalidConfig, match="nf4 computes in half precision"):
        EngineConfig(quantize="nf4", dtype="float32")


def test_int8_on_a_gpu_is_refused_in_one_sentence() -> None:
    config = EngineConfig(quantize="int8")
    with pytest.raises(LoadError, match=r"^int8 weights are for a CPU; on a GPU quantize is auto, none or nf4\.$"):
        choose.choose_numbers(config, torch.device("cuda"), None)


def test_only_the_decoder_layers_become_nf4() -> None:
    """bitsandbytes computes on a CPU too, slowly: the same replacement as on a GPU."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs the extra `quant`")
    model = tiny_model("llama", torch.bfloat16, hidden=64)
    ids = torch.arange(10)[None]
    before = model(ids).logits
    numbers = sum(weight.numel() for weight in model.parameters())
    quantize_nf4(model)
    kinds = {type(module) for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {bnb.nn.Linear4bit}
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert float((model(ids).logits - before).norm() / before.norm()) < 0.6  # wild weights; a wrong order gives 1.4
    sizes = sizes_of(model.config)
    assert sizes.linear + sizes.other == numbers
    stored = sum(p.nbytes + sum(s.nbytes for s in nf4.scales_of(p)[:1]) for p in model.parameters())
    assert stored == sizes.weight_bytes("nf4", 2)
    built = build.build_runner(model, EngineConfig(slots=2, max_context=64), eos_ids=[], max_positions=None)
    assert built.tree_error is not None
    built.runner.close()


def test_a_plan_from_options_alone() -> None:
    sizes = memory.Sizes(
        linear=10**9, largest=10**7, other=10**8, column=10**5, hidden=64, vocab=100, max_positions=1000
    )
    made = plan_memory(sizes, 8 * GiB, 2, EngineConfig(heads="none"))
    assert (made.quantize, made.context, made.heads) == ("none", 1000, 0)


def test_a_pass_over_four_bit_weights_needs_room_for_one_in_half_precision() -> None:
    sizes = memory.Sizes(
        linear=10**9, largest=10**7, other=10**8, column=10**5, hidden=64, vocab=100, max_positions=1000
    )
    plain, small = (
        plan_memory(sizes, 8 * GiB, 2, EngineConfig(heads="none", quantize=kind)) for kind in ("none", "nf4")
    )
    assert (plain.spread, small.spread) == (0, 2 * 10**7)
    for made in (plain, small):
        parts = made.weights + made.heads + made.slots * made.slot + LEAST_REST
        assert made.expected == parts + made.spread
