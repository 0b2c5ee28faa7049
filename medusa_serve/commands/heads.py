"""`medusa-serve heads`: show what a file of heads holds (inspect), write it in another layout (convert), try whether
the heads fit a model (check)."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import DEFAULT_MODEL, EngineConfig
from ..errors import InvalidConfig, LoadError
from ..presets import FAMILIES, shipped_heads
from .options import add_model_options, refuse

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.drafting.heads import Heads, HeadsInfo
    from ..model.loading.load import LoadedModel
    from ..training.batches import Batch
    from ..training.calibrate import Ranks
    from ..training.shards import Answers

LAYOUTS = {
    "native": "this package's own",
    "A": "medusa_lm_head.pt of the reference implementation",
    "B": "A as safetensors",
    "C": "A without output layers, tied to the base's",
    "D": "inside a whole model, medusa_head.",
    "E": "vLLM's",
    "F": "ModelOpt's medusa_heads.",
    "G": "NxDI's",
    "H": "MLC's",
    "hydra": "hydra_lm_head of the reference implementation",
}
CALIBRATION = ("ranks", "tau", "noise_tau")
WRITABLE = ("native", "A", "B", "C", "E")
ALSO = {"vllm": "E", "tgi": "B"}  # the servers that read them
BRINGS_OUTPUT = ("A", "B", "E")  # these hold output layers, so tied heads need the base's
TOKENS = 48  # of each answer of the base model
SHIFTS = (1, 2, 3, 4)  # tokens after the right one: there, drafts are right by chance only
# Measured on the default model (376 positions): heads of either family, trained for seconds on 74 answers, hit at least
# 18 % at the right position and at most 9 % at others, a difference of at least 3.8 standard deviations. Random heads,
# trained heads with their inputs mixed up or in another order, and fresh heads, which repeat the base's next token: at
# most 1.6. A fixed share would not do: the five commonest tokens alone make up 25 % of these texts.
SIGMAS = 3.0


def heads_path(name: str, model: str = DEFAULT_MODEL) -> Path:
    """A file or folder; `medusa` and `sequential` are the heads that ship for the model, as in --heads."""
    path = shipped_heads(model, name) if name in FAMILIES else Path(name).expanduser()
    assert path is not None  # only `auto` may find nothing
    return path


# ---- inspect -----------------------------------------------------------------------------------------------------


def facts_of(info: HeadsInfo, config: dict[str, Any]) -> dict[str, Any]:
    """HeadsInfo as plain data, and which model the heads are for. config: of the folder that holds the tensors"""
    origin = info.provenance
    base = origin.get("base_model") or origin.get("base") or config.get("base_model_name_or_path")
    return asdict(info) | {
        "calibration": [name for name in CALIBRATION if getattr(info, name, None) is not None],
        "base": base,
        "licence": origin.get("licence") or config.get("license"),
        "date": origin.get("date"),
    }


def inspect(options: argparse.Namespace) -> int:
    from ..model.drafting.files import inspect_heads
    from ..model.drafting.tensors import read_tensors

    path = heads_path(options.path)
    info = inspect_heads(path)
    facts = facts_of(info, read_tensors(path, lambda name: False).config)
    print(json.dumps(facts, ensure_ascii=False) if options.json else lines_of(facts))
    return 0


def lines_of(facts: dict[str, Any]) -> str:
    """What `inspect` prints for a person."""
    sequential = facts["family"] == "sequential"
    rows = {
        "layout": f"{facts['layout']}: {LAYOUTS[facts['layout']]}",
        "depths (K)" if sequential else "heads (K)": facts["num_heads"],
        "layers (L)": f"{facts['num_layers']} {'in the cell' if sequential else 'a head'}",
        "hidden size": facts["hidden_size"],
        "vocabulary": facts["vocab_size"] or "not named",
        "output layer": "tied to the base's" if facts["tied"] else "of their own",
        "bias": "yes" if facts["bias"] else "no",
        "token_map": f"{facts['token_map']} tokens" if facts["token_map"] else "none",
        "parameters": f"{facts['num_parameters']:,}",
        "hidden inputs": " ".join(map(str, facts["hidden_inputs"])),
        "calibration": ", ".join(facts["calibration"]) or "none",
        **{name: facts[name] or "not named" for name in ("licence", "base", "date")},
    }
    lines = [f"{facts['family']} heads in {facts['path']}", *(f"  {name:14}{value}" for name, value in rows.items())]
    return "\n".join([*lines, *(f"warning: {text}" for text in facts["warnings"])])


# ---- convert -----------------------------------------------------------------------------------------------------


def convert(options: argparse.Namespace) -> int:
    from ..model.drafting.files import inspect_heads

    path, out = heads_path(options.path), Path(options.out).expanduser()
    info = inspect_heads(path)
    replaced = _check_out(path, out, options.overwrite)
    if info.tied and info.family == "medusa" and options.to in BRINGS_OUTPUT and options.base is None:
        raise LoadError(
            f"Layout {options.to} holds output layers and these heads are tied to their base's: name it with --base."
        )
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as part:
        _write(path, Path(part), options.to, info, options.base)
        for file in replaced:  # of another layout, they would be found before the new ones
            file.unlink()
        out.mkdir(exist_ok=True)
        for file in Path(part).iterdir():
            shutil.move(str(file), str(out / file.name))
    print(lines_of(facts_of(inspect_heads(out), {})))
    return 0


def _check_out(path: Path, out: Path, overwrite: bool) -> list[Path]:
    """The tensor files that go away. Raises LoadError unless `out` can be made, or holds heads alone and may be
    overwritten: a user's model there must not be lost."""
    from ..model.drafting.files import split_full_model
    from ..model.drafting.tensors import HEAD_FILES

    if not out.absolute().parent.is_dir():
        raise LoadError(f"There is no folder for {out}.")
    if not out.exists():
        return []
    if not overwrite:
        raise LoadError(f"{out} exists; choose another folder, or give --overwrite.")
    if not out.is_dir() or out.resolve() in (path.resolve(), path.resolve().parent):
        raise LoadError(f"{out} is no folder of other heads; choose another one.")
    files = []
    for file in sorted(out.iterdir()):
        if file.name in (*HEAD_FILES, "model.safetensors"):
            heads, base = split_full_model(file)
            files += [file] if heads and not base else []
        if file.name != "config.json" and file not in files:
            raise LoadError(f"{out} holds more than heads ({file.name}); choose another folder.")
    return files


def _write(path: Path, folder: Path, layout: str, info: HeadsInfo, base: str | None) -> None:
    """Save in the dtype that the heads are stored in (fp8 with its scales, and mixed ones, as fp32), and read again."""
    import torch

    from ..model.drafting.files import inspect_heads, load_heads, save_heads
    from ..model.drafting.layouts import is_head
    from ..model.drafting.tensors import read_tensors
    from ..model.loading.load import load_model

    found = read_tensors(path, is_head)
    stored = {tensor.dtype for tensor in found.tensors.values() if tensor.is_floating_point()}
    dtype = stored.pop() if len(stored) == 1 else torch.float32
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    hidden, vocab, model = info.hidden_size, info.vocab_size or 2**31, None  # not named: nothing to compare with
    if base is not None:
        model = load_model(EngineConfig(model=base, device="cpu", dtype=str(dtype).removeprefix("torch."))).model
        hidden, vocab = model.config.get_text_config().hidden_size, model.get_input_embeddings().num_embeddings
    heads, read = load_heads(path, hidden_size=hidden, vocab_size=vocab, dtype=dtype, base_model=model)
    name = facts_of(read, found.config)["base"]
    if name and "base_model" not in read.provenance:  # under this key every layout keeps it
        read = replace(read, provenance={**read.provenance, "base_model": name})
    save_heads(heads, replace(read, vocab_size=vocab if base else info.vocab_size), folder, layout=layout, dtype=dtype)
    now = inspect_heads(folder)
    for name in ("family", "num_heads", "num_layers", "hidden_size", "token_map"):
        if getattr(now, name) != getattr(info, name):
            change = f"{name} {getattr(info, name)} would become {getattr(now, name)}"
            raise LoadError(f"Layout {layout} does not hold these heads: {change}.")


# ---- check -------------------------------------------------------------------------------------------------------


class Elsewhere(NamedTuple):
    """How often the five best drafts of depth 0 hold the token that comes `by` tokens after the right one.

    share: of positions where they do · sigmas: by how many standard deviations the right token is hit more often
    """

    by: int
    share: float
    sigmas: float


@dataclass(frozen=True)
class Agreement:
    """What the heads would have drafted, compared with what the base model wrote."""

    ranks: Ranks
    elsewhere: list[Elsewhere]


def check(options: argparse.Namespace) -> int:
    from ..model.drafting.choose import heads_on
    from ..model.loading.load import load_model
    from ..training.calibrate import forecast, top_shares

    try:
        engine = EngineConfig(model=options.model, device=options.device, dtype=options.dtype, quantize="none")
    except InvalidConfig as error:
        refuse(options, error)
    path = heads_path(options.path, options.model)
    loaded = load_model(engine)
    heads, info = heads_on(path, loaded, options.model)
    found = agreement(heads, info.hidden_inputs, loaded, base_answers(loaded))
    top1, top5 = top_shares(found.ranks, 1), top_shares(found.ranks, 5)
    steps = forecast(found.ranks, info.ranks)
    lines = [f"{info.family} heads from {path} on {loaded.name}, {len(found.ranks.rank)} positions that the base wrote"]
    lines += [f"warning: {text}" for text in info.warnings]
    lines += ["depth        " + "".join(f"{depth:8}" for depth in range(heads.max_depth))]
    lines += [
        f"{name:13}" + "".join(f"{x:8.1%}" for x in shares) for name, shares in (("top-1", top1), ("top-5", top5))
    ]
    row = "  ".join(f"{nodes}: {x:.2f}" for nodes, x in steps.items())
    lines += [f"static forecast of tokens per step by tree nodes: {row}"]
    reason = misfit(top5[0], found.elsewhere)
    lines += ["these heads fit this base" if reason is None else f"these heads do not fit this base: {reason}"]
    print("\n".join(lines))
    return 0 if reason is None else 1


def misfit(own: float, elsewhere: Sequence[Elsewhere]) -> str | None:
    """Why these heads are not for this base; None if they are. own: the top-5 share of depth 0 at the right position.

    Chance is what the same drafts hit at wrong positions, where a common word is right now and then. Heads that read
    this base's hidden states hit the right position more often than any other, by at least SIGMAS standard deviations.
    """
    worst = min(elsewhere, key=lambda one: one.sigmas)
    if worst.sigmas >= SIGMAS:
        return None
    right = f"the five best drafts of depth 0 hold the right token at {own:.1%} of the positions"
    shuffled = worst.sigmas <= -SIGMAS and worst.share >= 0.1
    why = "as if in another order" if shuffled else "no better than chance"
    return f"{right} and the one {worst.by} further on at {worst.share:.1%}, {why}"


def base_answers(loaded: LoadedModel) -> Answers:
    """The base model's greedy answers to the built-in questions, made by the engine without heads."""
    import numpy as np

    from ..bench.questions import read_prompts
    from ..training.distill import DistillConfig, jobs
    from ..training.pipeline import answering
    from ..training.prompts import Prompt
    from ..training.shards import Answers

    prompts = [Prompt(text) for text in read_prompts().questions]
    config = DistillConfig(temperatures=(0.0,), max_tokens=TOKENS, cut_loops=False)
    with answering(loaded, config, len(prompts)) as generate:
        rows = [(job, ids) for job, ids in generate(jobs(loaded.codec, prompts, config, ())) if len(ids) > 1]
    if not rows:
        raise LoadError("The base says nothing to the built-in questions, so there is nothing to compare with.")
    rows.sort(key=lambda row: row[0].prompt)
    return Answers(
        index=np.array([job.prompt for job, _ in rows]),
        seed=np.array([job.seed for job, _ in rows]),
        temperature=np.zeros(len(rows), np.float32),
        prompt_len=np.array([len(job.prompt_ids) for job, _ in rows]),
        answer_len=np.array([len(ids) for _, ids in rows]),
        tokens=np.array([token for job, ids in rows for token in (*job.prompt_ids, *ids)], np.uint32),
        vocab_size=loaded.model.get_input_embeddings().num_embeddings,
        model=loaded.name,
    )


def agreement(heads: Heads, hidden_inputs: Sequence[int], loaded: LoadedModel, answers: Answers) -> Agreement:
    """As training.finish.measure, but for every family, and for heads with output layers of their own."""
    import numpy as np
    import torch

    from ..training.batches import make_batch
    from ..training.calibrate import Ranks
    from ..training.teacher import Teacher

    with torch.no_grad():
        teacher = Teacher(loaded.model, hidden_inputs)
        batch = make_batch(answers, np.arange(len(answers))).to(teacher.device)
        hidden = teacher.hidden(batch.ids)[0][batch.at]
        features = features_of(heads, hidden, batch.tokens(heads.max_depth))
        columns = [rank_column(heads, x, depth, depth, batch, answers.vocab_size) for depth, x in enumerate(features)]
        others = [elsewhere(heads, features[0], by, columns[0], batch, answers.vocab_size) for by in SHIFTS]
    return Agreement(Ranks(torch.stack(columns, dim=1).cpu().numpy(), answers.answer_len - 1), others)


def elsewhere(heads: Any, features: Tensor, by: int, own: Tensor, batch: Batch, vocab: int) -> Elsewhere:
    """A sign test: how often either token is among the five best drafts, and ranks before the other one."""
    from ..training.calibrate import PAST_END

    other = rank_column(heads, features, 0, by, batch, vocab)
    true = batch.tokens(by + 1, first=2)
    counted = (other != PAST_END) & (true[:, 0] != true[:, by])
    here, there = own[counted], other[counted]
    better, worse = int(((here < 5) & (here < there)).sum()), int(((there < 5) & (there < here)).sum())
    share = int((there < 5).sum()) / max(1, len(there))
    return Elsewhere(by, share, (better - worse) / max(1, better + worse) ** 0.5)


def features_of(heads: Any, hidden: Tensor, tokens: Tensor) -> Sequence[Tensor]:
    """Inputs of the output layer by depth, (R, H) each. tokens (R, D): the pending one and the true ones after it."""
    if heads.family == "medusa":
        return heads.features(hidden).unbind(dim=1)
    state = heads.start(hidden, tokens[:, 0])
    out = [heads.features(state)]
    for depth in range(1, heads.max_depth):
        state = heads.advance(state, tokens[:, depth])
        out.append(heads.features(state))
    return out


def rank_column(heads: Any, features: Tensor, depth: int, target: int, batch: Batch, vocab: int) -> Tensor:
    """(R): the rank, among the candidates of depth `depth`, of the token that depth `target` should draft."""
    import torch

    from ..training.calibrate import true_ranks
    from ..training.loss import Output

    layer = heads.output
    weight, bias = layer.weight, layer.bias
    if weight.dim() == 3:
        weight, bias = weight[depth], None if bias is None else bias[depth]
    ids = layer.token_map
    if ids is None and len(weight) < vocab:  # the last tokens are never drafted
        ids = torch.arange(len(weight), device=weight.device)
    true = batch.tokens(1, first=2 + target)
    return true_ranks(features[:, None], true, batch.left - target, Output(weight, bias), ids, vocab)[:, 0]


# ---- the command line --------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "look into files of heads, convert them, try them on a model"
    kinds = parser.add_subparsers(required=True, metavar="WHAT", title="what")

    def add(name: str, about: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        kind: argparse.ArgumentParser = kinds.add_parser(name, help=about, description=about)
        kind.add_argument("path", metavar="PATH", help="a file or folder of heads, or medusa or sequential (shipped)")
        kind.set_defaults(run=run, parser=kind)
        return kind

    add("inspect", "what a file of heads holds", inspect).add_argument(
        "--json", action="store_true", help="print one JSON object"
    )
    to = add("convert", "write heads in another layout", convert)
    to.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    about = "the layout; vllm is E, tgi is B"
    to.add_argument("--to", required=True, type=lambda name: ALSO.get(name, name), choices=WRITABLE, help=about)
    to.add_argument("--base", metavar="MODEL", help="of tied heads: layouts A, B, E hold its output layer")
    to.add_argument("--overwrite", action="store_true", help="replace other heads in OUT")
    add_model_options(add("check", "whether heads fit a model", check), heads=False)
