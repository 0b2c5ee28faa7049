"""One run on one GPU that makes the heads the package ships, in stages that can be called alone and again.

    python -m tests.campaigns make_heads --model FOLDER --prompts FILE --work DIR --out DIR --stage all
    stages: distill (training and evaluation answers), train (the families), eval (forecasts by category), all

Everything large stays in --work; --out gets heads and JSON files. A stage that fails prints its traceback and the
next one starts all the same; training goes on from its last checkpoint when a stage is called again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medusa_serve.config import EngineConfig
from medusa_serve.errors import LoadError
from medusa_serve.model.drafting.files import load_heads
from medusa_serve.model.loading.load import LoadedModel, load_model
from medusa_serve.training.batches import usable
from medusa_serve.training.calibrate import SAMPLED, SIZES, Ranks, conditional_ranks, forecast, top_shares
from medusa_serve.training.distill import DistillConfig
from medusa_serve.training.finish import Subject, measure
from medusa_serve.training.pipeline import make_answers
from medusa_serve.training.prompts import Prompt, read_prompts, split
from medusa_serve.training.shards import read_answers
from medusa_serve.training.teacher import Teacher
from medusa_serve.training.train_config import TrainConfig
from medusa_serve.training.train_heads import train

LICENCE = "Apache-2.0, as the base model; trained only on text that the base model wrote"
STAGES, FAMILIES = ("distill", "train", "eval"), ("sequential", "medusa")


def run(options: argparse.Namespace) -> int:
    """Run the stages asked for; 1 when any of them failed."""
    started = time.monotonic()
    stages = STAGES if options.stage == "all" else tuple(options.stage.split(","))
    families = FAMILIES if options.family == "both" else (options.family,)
    for folder in (options.work, options.out):
        Path(folder).mkdir(parents=True, exist_ok=True)
    say(f"torch {torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}")
    loaded = load_model(EngineConfig(model=options.model, device=options.device, dtype=options.dtype, quantize="none"))
    training, evaluation = split(read_prompts(options.prompts), options.eval_per_category)
    training = shuffled(training)
    say(f"{loaded.name} on {loaded.device} in {loaded.dtype}; {len(training)} prompts, {len(evaluation)} held out")
    good = True
    if "distill" in stages:
        good &= guarded("eval answers", lambda: distill_evaluation(loaded, evaluation, options))
        good &= guarded("distill", lambda: distill_training(loaded, training, options))
    for family in families if "train" in stages else ():
        good &= guarded(f"train {family}", lambda family=family: train_family(loaded, family, options))  # type: ignore[misc]
    if "eval" in stages:
        tables = []
        for family in families:
            good &= guarded(
                f"eval {family}",
                lambda family=family: tables.append(evaluate(loaded, family, evaluation, options)),  # type: ignore[misc]
            )
        for table in tables:
            print(table, flush=True)
    say(f"{'done' if good else 'done, with failures,'} after {time.monotonic() - started:.0f} s")
    return 0 if good else 1


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--work", required=True, help="answers and training states; must outlive the stages")
    parser.add_argument("--out", required=True, help="heads and JSON")
    parser.add_argument("--stage", default="all", help="all, or some of distill,train,eval")
    parser.add_argument("--family", default="both", choices=("both", *FAMILIES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--distill-seconds", type=float, default=360.0)
    parser.add_argument("--temperatures", type=_temperatures, default=DistillConfig().temperatures, metavar="T,…")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--max-prompt", type=int, default=512)
    parser.add_argument("--slots", type=int, default=None, help="sequences that are answered at once")
    parser.add_argument("--eval-per-category", type=int, default=25)
    parser.add_argument("--minutes-sequential", type=float, default=8.0)
    parser.add_argument("--minutes-medusa", type=float, default=4.0)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.8)
    parser.add_argument("--batch-rows", type=int, default=None, help="answer positions of a training step")
    parser.add_argument("--draft-vocab", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=1, help="blocks of a head, or of the sequential cell")
    parser.add_argument("--width", type=int, default=None, help="of the sequential cell's state, as the next two")
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--readout", type=int, default=512)
    parser.add_argument(
        "--hidden-inputs",
        type=_indexes,
        default=(-1,),
        metavar="I,…",
        help="what sequential heads read: --hidden-inputs=-1,20",
    )
    parser.add_argument("--tag", default="", help="added to the families' names: one run beside another")
    parser.add_argument("--held-out", type=int, default=512)


def _indexes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _temperatures(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def guarded(name: str, work: Callable[[], Any]) -> bool:
    """Run one part; a failure is printed and does not end the others."""
    say(name)
    started = time.monotonic()
    try:
        work()
    except LoadError as error:
        say(f"{name} FAILED: {error.message}")
        traceback.print_exc(limit=-3)
        return False
    except Exception:
        say(f"{name} FAILED")
        traceback.print_exc(file=sys.stdout)
        return False
    finally:
        if torch.cuda.is_available():
            say(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()
    say(f"{name}: {time.monotonic() - started:.0f} s")
    return True


def shuffled(prompts: list[Prompt]) -> list[Prompt]:
    """In a fixed random order, so that a time limit cuts no source off."""
    return [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]


# ---- stages ----------------------------------------------------------------------------------------------------------


def distill_training(loaded: LoadedModel, prompts: list[Prompt], options: argparse.Namespace) -> None:
    config = DistillConfig(
        temperatures=options.temperatures, max_tokens=options.max_tokens, max_prompt=options.max_prompt,
        seconds=options.distill_seconds,
    )  # fmt: skip
    slots = options.slots
    answer(loaded, prompts, Path(options.work) / "answers", config, slots)
    answers = read_answers(Path(options.work) / "answers")
    say(
        f"{len(answers)} answers, {answers.num_answer_tokens:,} tokens, mean {answers.answer_len.mean():.0f}, "
        f"temperatures {dict(zip(*np.unique(answers.temperature.round(2), return_counts=True), strict=True))}"
    )
    if options.draft_vocab:
        counts = np.sort(answers.answer_counts())[::-1] / answers.num_answer_tokens
        say(f"the {options.draft_vocab} most frequent tokens cover {counts[: options.draft_vocab].sum():.3%}")


def distill_evaluation(loaded: LoadedModel, prompts: list[Prompt], options: argparse.Namespace) -> None:
    """Greedy and T = 0.7 answers of at most 128 tokens to the evaluation set, loops uncut (the issue's rule)."""
    for name, temperature in (("eval-greedy", 0.0), ("eval-sampled", SAMPLED)):
        config = DistillConfig(temperatures=(temperature,), max_tokens=128, max_prompt=1024, cut_loops=False)
        answer(loaded, prompts, Path(options.work) / name, config, min(256, len(prompts)))


def answer(loaded: LoadedModel, prompts: list[Prompt], folder: Path, config: DistillConfig, slots: int | None) -> None:
    make_answers(loaded, prompts, folder, config, slots=slots, note=say)


def train_family(loaded: LoadedModel, family: Any, options: argparse.Namespace) -> None:
    """Heads are trained in --work and copied to --out, so that a killed stage leaves nothing half in --out."""
    minutes = options.minutes_sequential if family == "sequential" else options.minutes_medusa
    name = family + options.tag
    config = TrainConfig(
        family=family, out=str(Path(options.work) / "heads" / name), minutes=minutes, num_heads=options.depth,
        lr=options.lr, decay=options.decay, batch_rows=options.batch_rows, draft_vocab=options.draft_vocab,
        num_layers=options.layers, width=options.width, inner=options.inner, readout=options.readout,
        hidden_inputs=options.hidden_inputs if family == "sequential" else (-1,),
        held_out=options.held_out, licence=LICENCE,
        report_seconds=20.0 if loaded.device.type == "cuda" else 60.0,
    )  # fmt: skip
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    interim = Path(config.out + ".training") / "heads"
    try:
        answers = read_answers(Path(options.work) / "answers")
        measured = train(
            loaded.model, answers, config, model_name=loaded.name, eos_ids=loaded.eos_ids,
            max_positions=loaded.max_positions, progress=lambda report: say(report.line), note=say,
        )  # fmt: skip
    except BaseException:  # Ctrl-C too: the last checkpoint's heads are better than none
        if interim.is_dir():
            shutil.copytree(interim, Path(options.out) / f"{name}-interim", dirs_exist_ok=True)
        raise
    shutil.copytree(config.out, Path(options.out) / name, dirs_exist_ok=True)
    for line in measured.lines:
        say(f"{family}: {line}")
    say(f"{family}: provenance {json.dumps(measured.provenance)}")


def evaluate(loaded: LoadedModel, family: str, prompts: list[Prompt], options: argparse.Namespace) -> str:
    """Forecasts on the evaluation set by category, all answers and those without loops; a table, and JSON in --out."""
    name = family + options.tag
    folder = next(path for path in (Path(options.out) / name, Path(options.work) / "heads" / name) if path.is_dir())
    teacher = Teacher(loaded.model)
    heads, info = load_heads(
        folder, hidden_size=teacher.hidden_size, vocab_size=teacher.vocab_size, dtype=loaded.dtype,
        device=loaded.device, base_model=loaded.model,
    )  # fmt: skip
    teacher = Teacher(loaded.model, info.hidden_inputs)
    result: dict[str, Any] = {"family": family, "heads": str(folder), "parameters": info.num_parameters}
    lines = [f"{name}: tokens per step with the best static tree, forecast on the evaluation set"]
    lines.append(f"{'':28}" + "".join(f"{size:>8}" for size in SIZES) + "   answers")
    for label, sampled in (("eval-greedy", False), ("eval-sampled", True)):
        try:
            answers = read_answers(Path(options.work) / label)
        except LoadError as error:
            lines.append(f"{label}: {error.message}")
            continue
        numbers = usable(answers, 4096)
        ranks = measure(Subject(heads, teacher, answers, size=16384), numbers, sampled=sampled)
        table = info.ranks if not sampled and info.ranks else conditional_ranks(ranks)
        categories = np.array([prompts[int(answers.index[number])].category for number in numbers])
        result[label] = _by_category(ranks, categories, table)
        for category, kinds in result[label].items():
            for kind, row in kinds.items():
                cells = "".join(f"{row[str(size)]:8.2f}" for size in SIZES)
                lines.append(f"{label[5:]:8} {category:10} {kind:8}{cells}   {row['answers']}")
        result[label + "-top1"], result[label + "-top5"] = top_shares(ranks, 1), top_shares(ranks, 5)
        lines.append(f"{label[5:]:8} top-1 " + " ".join(f"{x:.1%}" for x in result[label + "-top1"]))
        lines.append(f"{label[5:]:8} top-5 " + " ".join(f"{x:.1%}" for x in result[label + "-top5"]))
    (Path(options.out) / f"forecast-{name}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return "\n".join(lines)


def _by_category(ranks: Ranks, categories: np.ndarray, table: list[list[float]]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for category in (*sorted(set(categories.tolist())), "all"):
        here = np.ones(len(categories), bool) if category == "all" else categories == category
        out[category] = {}
        for kind, mask in (("all", here), ("no loops", here & ~ranks.looped)):
            if mask.any():
                row = {str(size): round(x, 4) for size, x in forecast(ranks.chosen(mask), table).items()}
                out[category][kind] = {**row, "answers": int(mask.sum())}
    return out
