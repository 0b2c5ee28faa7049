"""`medusa-serve heads`: inspect, convert and check, on a base model whose next tokens are all known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_serve import cli
from medusa_serve.commands import heads as heads_commands
from medusa_serve.commands.heads import Elsewhere, misfit
from medusa_serve.model.drafting.files import inspect_heads, save_heads
from medusa_serve.model.drafting.heads import HeadsInfo, HydraHeads, MedusaHeads, SequentialHeads
from tests.tiny import save_tiny_folder, tiny_model, tiny_tokenizer

HIDDEN, SHORT = 288, tuple(range(90, 94))  # SHORT: ids of a cycle of four
VOCAB = len(tiny_tokenizer())
LONG = tuple(token for token in range(3, VOCAB) if token not in SHORT)


def follow(seed: int = 0) -> torch.Tensor:
    """(V) the token after each one: a long cycle, a short one, and the special tokens, which are never said."""
    after = torch.arange(VOCAB)
    order = torch.tensor(LONG)[torch.randperm(len(LONG), generator=torch.Generator().manual_seed(seed))]
    after[order] = order.roll(-1)
    after[list(SHORT)] = torch.tensor(SHORT).roll(-1)
    return after


def chain_folder(path: Path, seed: int = 0) -> Path:
    """A Llama model whose every token decides the next, without a chat template: a prompt's last letter decides all."""
    model = tiny_model("llama", torch.float32, vocab=VOCAB, hidden=HIDDEN, layers=1, eos_token_id=2)
    rows = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(seed)))[0][:VOCAB]
    model.model.norm.weight.fill_(1.0)
    for layer in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
        layer.weight.zero_()
    model.model.embed_tokens.weight.copy_(rows)
    model.lm_head.weight[follow(seed)] = 2 * rows
    model.save_pretrained(path)
    tiny_tokenizer(chat_template=None).save_pretrained(path)
    return path


def chain_heads(folder: Path, depths: int = 4, seed: int = 0, *, right: Any = (*LONG, *SHORT)) -> MedusaHeads:
    """Heads with output layers of their own that draft the truth after the tokens `right`, and never after others."""
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    heads, after = MedusaHeads(HIDDEN, depths, vocab_size=VOCAB), follow(seed)
    sign = torch.full((VOCAB, 1), -1.0)
    sign[list(right)] = 1.0
    target = after
    with torch.no_grad():
        heads.output.weight.zero_()
        for depth in range(depths):
            target = after[target]
            heads.output.weight[depth, target] = 2 * sign * rows
    return heads


def saved(heads: Any, path: Path, layout: str = "native", **facts: Any) -> str:
    layers = len(heads.cell) if isinstance(heads, SequentialHeads) else heads.weight.shape[0]
    info = HeadsInfo(
        family=heads.family, num_heads=heads.max_depth, num_layers=layers + (heads.family == "hydra"),
        hidden_size=heads.hidden_size, vocab_size=VOCAB, tied=heads.output.tied, bias=True, **facts,
    )  # fmt: skip
    save_heads(heads, info, path, layout=layout, dtype=torch.float32)
    return str(path)


def tied(**options: Any) -> MedusaHeads:
    heads = MedusaHeads(HIDDEN, 3, **options)
    torch.nn.init.normal_(heads.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return heads


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_folder(tmp_path_factory.mktemp("base") / "chain")


def run(*arguments: str) -> int:
    try:
        return cli.main(["heads", *arguments])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def refused(capsys: pytest.CaptureFixture[str], says: str, *arguments: str, code: int = 1) -> None:
    assert run(*arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err


# ---- inspect -----------------------------------------------------------------------------------------------------


def test_inspect_says_all_and_its_json_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provenance = {"licence": "Apache-2.0", "base": "some/model", "date": "2026-01-02"}
    heads = tied(token_map=torch.arange(5, 45))
    path = saved(heads, tmp_path / "h", ranks=[[0.5, 0.25]], tau=[1.5], provenance=provenance)
    assert run("inspect", path) == 0
    text = capsys.readouterr().out
    words = [
        "medusa heads",
        "native",
        "288",
        "tied",
        "40 tokens",
        "ranks, tau",
        "Apache-2.0",
        "some/model",
        "2026-01-02",
    ]
    for word in (*words, f"{3 * HIDDEN * (HIDDEN + 1):,}"):
        assert word in text
    assert run("inspect", path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["num_heads"], facts["num_layers"], facts["hidden_size"]) == ("medusa", 3, 1, 288)
    assert (facts["tied"], facts["bias"], facts["token_map"], facts["vocab_size"]) == (True, True, 40, VOCAB)
    assert facts["calibration"] == ["ranks", "tau"]
    assert (facts["licence"], facts["base"], facts["date"]) == tuple(provenance.values())
    assert facts["warnings"] == []


def test_a_warning_names_both_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(MedusaHeads(HIDDEN, 2, vocab_size=VOCAB), tmp_path / "h", "A")
    config = json.loads((tmp_path / "h" / "config.json").read_text())
    config |= {"medusa_num_heads": 7, "base_model_name_or_path": "lmsys/x"}
    (tmp_path / "h" / "config.json").write_text(json.dumps(config))
    assert run("inspect", path) == 0
    text = capsys.readouterr().out
    assert "warning: The config says heads 7 (medusa_num_heads), the tensors say 2" in text
    assert "lmsys/x" in text
    assert "licence       not named" in text


def test_shipped_heads_go_by_their_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(SequentialHeads(HIDDEN, inner=8, readout=8), tmp_path / "h")
    monkeypatch.setattr(heads_commands, "shipped_heads", lambda model, name: tmp_path / "h")
    assert run("inspect", "sequential") == 0
    out = capsys.readouterr().out
    assert "depths (K)" in out
    assert "1 in the cell" in out


def test_what_cannot_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "no file or folder", "inspect", str(tmp_path / "none"))
    refused(capsys, "PATH", "inspect", code=2)
    refused(capsys, "--jsn", "inspect", str(tmp_path), "--jsn", code=2)
    refused(capsys, "WHAT", code=2)
    refused(capsys, "frob", "frob", code=2)


# ---- convert -----------------------------------------------------------------------------------------------------


def shape_of(path: Path) -> tuple[Any, ...]:
    info = inspect_heads(path)
    return info.family, info.num_heads, info.num_layers, info.hidden_size, info.token_map, info.tied


def test_tied_heads_go_through_every_layout_and_back(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tied(), tmp_path / "native", provenance={"base": "chain"})
    before = load_file(tmp_path / "native" / "heads.safetensors")
    for layout in ("A", "B", "C", "E"):
        out = tmp_path / layout
        assert run("convert", source, str(out), "--to", layout, "--base", str(base)) == 0
        assert f"{layout}: " in capsys.readouterr().out
        assert shape_of(out) == ("medusa", 3, 1, HIDDEN, 0, layout == "C")
        assert inspect_heads(out).layout == layout
        assert inspect_heads(out).provenance["base"] == "chain"
        assert not inspect_heads(out).warnings
        assert run("convert", str(out), str(tmp_path / f"{layout}-back"), "--to", "native") == 0
        after = load_file(tmp_path / f"{layout}-back" / "heads.safetensors")
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        if layout != "C":
            head = load_file(base / "model.safetensors")["lm_head.weight"]
            assert torch.equal(after["medusa.output.weight"].reshape(-1, VOCAB, HIDDEN)[0], head)
    config = json.loads((tmp_path / "E" / "config.json").read_text())
    assert (config["medusa_fc_bias"], config["num_heads"], config["vocab_size"]) == (True, 3, VOCAB)
    assert json.loads((tmp_path / "A" / "config.json").read_text())["base_model_name_or_path"] == "chain"


def test_a_draft_vocabulary_goes_through_vllms_layout(base: Path, tmp_path: Path) -> None:
    heads = tied(token_map=torch.arange(9, 49))
    source = saved(heads, tmp_path / "native")
    assert run("convert", source, str(tmp_path / "E"), "--to", "E", "--base", str(base)) == 0
    assert shape_of(tmp_path / "E")[4:] == (40, False)
    assert json.loads((tmp_path / "E" / "config.json").read_text())["truncated_vocab_size"] == 40


def test_the_stored_dtype_stays(tmp_path: Path) -> None:
    folder = tmp_path / "h"
    source = saved(MedusaHeads(HIDDEN, 2, vocab_size=50), folder)
    half = {name: tensor.half() for name, tensor in load_file(folder / "heads.safetensors").items()}
    save_file(half, folder / "heads.safetensors")
    assert run("convert", source, str(tmp_path / "B"), "--to", "B") == 0
    assert {x.dtype for x in load_file(tmp_path / "B" / "medusa_lm_head.safetensors").values()} == {torch.float16}


def test_what_a_layout_cannot_hold_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(heads: Any, layout: str, says: str, *more: str) -> None:
        source = saved(heads, tmp_path / "h")
        refused(capsys, says, "convert", source, str(tmp_path / "out"), "--to", layout, *more)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["h"]  # nothing half written
        shutil.rmtree(source)

    convert(SequentialHeads(HIDDEN, inner=8, readout=8), "B", "sequential heads are written as native")
    convert(HydraHeads(HIDDEN, 2, 1, vocab_size=VOCAB), "E", "hydra heads are written as native")
    convert(tied(), "A", "name it with --base")
    convert(tied(), "E", "name it with --base")
    convert(tied(token_map=torch.arange(40)), "B", "no place for a draft vocabulary", "--base", str(base))
    convert(MedusaHeads(HIDDEN, 2, vocab_size=50), "C", "tied heads")
    convert(MedusaHeads(HIDDEN, 2, num_layers=2), "C", "one layer, these have 2")
    convert(MedusaHeads(HIDDEN, 2, vocab_size=50, output_bias=True), "B", "bias of the output layer")
    convert(MedusaHeads(16, 2), "B", "hidden size 16, the base model 288", "--base", str(base))
    refused(capsys, "--to", "convert", "a", "b", code=2)
    refused(capsys, "'Z'", "convert", "a", "b", "--to", "Z", code=2)


def test_what_is_there_already_is_safe(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = saved(tied(), tmp_path / "h"), tmp_path / "out"
    assert run("convert", source, str(out), "--to", "native") == 0
    capsys.readouterr()
    refused(capsys, "exists", "convert", source, str(out), "--to", "C")
    assert run("convert", source, str(out), "--to", "C", "--overwrite") == 0  # native would be found before C
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "medusa_lm_head.safetensors"]
    assert "C: " in capsys.readouterr().out
    (out / "notes.txt").write_text("mine")
    refused(capsys, "notes.txt", "convert", source, str(out), "--to", "C", "--overwrite")
    refused(capsys, "more than heads", "convert", source, str(base), "--to", "E", "--overwrite", "--base", str(base))
    refused(capsys, "other heads", "convert", source, source, "--to", "C", "--overwrite")
    refused(capsys, "no folder for", "convert", source, str(tmp_path / "no" / "out"), "--to", "C")
    (tmp_path / "file").write_text("")
    refused(capsys, "no folder of other heads", "convert", source, str(tmp_path / "file"), "--to", "C", "--overwrite")


# ---- check -------------------------------------------------------------------------------------------------------


def check(base: Path, path: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()  # bars of transformers, where a model was made
    code = run("check", path, "--model", str(base), "--device", "cpu")
    out, err = capsys.readouterr()
    assert err == ""
    return code, out.splitlines()


def test_heads_that_are_right_fit(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = check(base, saved(chain_heads(base), tmp_path / "h", ranks=[[0.9, 0.1]] * 4), capsys)
    assert code == 0
    assert lines[-1] == "these heads fit this base"
    assert lines[0] == f"medusa heads from {tmp_path / 'h'} on chain, {8 * 47} positions that the base wrote"
    assert lines[1].split() == ["depth", "0", "1", "2", "3"]
    assert lines[2].split() == ["top-1", *["100.0%"] * 4]
    assert lines[3].split() == ["top-5", *["100.0%"] * 4]
    assert lines[4].startswith("static forecast of tokens per step by tree nodes: 4: ")


def test_weak_heads_fit(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = check(base, saved(chain_heads(base, right=LONG[::6]), tmp_path / "h"), capsys)
    assert lines[-1] == "these heads fit this base"
    assert float(lines[3].split()[1].rstrip("%")) < 40
    assert code == 0


def test_sequential_heads_that_learned_the_language_fit(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(base / "model.safetensors")
    rows, after = weights["model.embed_tokens.weight"], follow()
    torch.manual_seed(0)
    heads = SequentialHeads(HIDDEN, inner=64, readout=32, max_depth=2)
    heads.attach(weights["lm_head.weight"], rows)
    tokens = torch.stack([after, after[after]], dim=1)
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
    for _ in range(40):
        logits = heads.project(heads.unroll(rows * HIDDEN**0.5, tokens))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), after[tokens].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    code, lines = check(base, saved(heads, tmp_path / "h"), capsys)
    assert lines[-1] == "these heads fit this base"
    assert code == 0


@pytest.mark.parametrize(
    "kind", ["random", "fresh", "random sequential", "random hydra", "other base", "short vocabulary"]
)
def test_other_heads_do_not_fit(kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    heads: Any = tied()
    if kind == "fresh":
        heads = MedusaHeads(HIDDEN, 2)
    elif kind == "random sequential":
        heads = SequentialHeads(HIDDEN, inner=8, readout=8, max_depth=2)
    elif kind == "random hydra":
        heads = HydraHeads(HIDDEN, 2, 2, vocab_size=VOCAB)
    elif kind == "other base":
        heads = chain_heads(chain_folder(tmp_path / "other", 5), 2, 5)
    elif kind == "short vocabulary":
        heads = MedusaHeads(HIDDEN, 2, vocab_size=VOCAB - 20)
    code, lines = check(base, saved(heads, tmp_path / "h"), capsys)
    assert lines[-1].startswith("these heads do not fit this base: ")
    assert "no better than chance" in lines[-1]
    assert code == 1
    if kind == "short vocabulary":
        assert any("warning: The output layer has" in line for line in lines)


def test_heads_in_another_order_do_not_fit(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = chain_heads(base)
    with torch.no_grad():
        heads.output.weight.copy_(heads.output.weight.flip(0))
    code, lines = check(base, saved(heads, tmp_path / "h"), capsys)
    assert code == 1
    assert lines[-1].endswith("and the one 3 further on at 100.0%, as if in another order")


def test_heads_of_another_size_and_whole_models_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = saved(MedusaHeads(16, 2), tmp_path / "small")
    refused(capsys, "hidden size 16, the base model 288", "check", other, "--model", str(base), "--device", "cpu")
    whole = save_tiny_folder(tmp_path / "whole", hidden=HIDDEN)
    inside = {f"medusa_head.0.0.linear.{leaf}": torch.zeros(*[HIDDEN] * n) for leaf, n in (("weight", 2), ("bias", 1))}
    inside["medusa_head.0.1.weight"] = torch.zeros(VOCAB, HIDDEN)
    save_file(load_file(whole / "model.safetensors") | inside, whole / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()  # bars of transformers
    refused(capsys, "not attached to another one", "check", str(whole), "--model", str(base), "--device", "cpu")
    refused(capsys, "device must be", "check", other, "--device", "tpu", code=2)
    refused(capsys, "no medusa heads ship", "check", "medusa", "--model", str(base))


def test_a_small_advantage_is_chance_and_a_large_one_is_not() -> None:
    assert misfit(0.2, [Elsewhere(1, 0.1, 3.5), Elsewhere(2, 0.1, 3.0)]) is None
    reason = misfit(0.2, [Elsewhere(1, 0.1, 3.5), Elsewhere(2, 0.19, 0.4)])
    assert reason is not None
    assert reason.endswith("at 20.0% of the positions and the one 2 further on at 19.0%, no better than chance")
