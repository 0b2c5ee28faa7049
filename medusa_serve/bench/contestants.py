"""What a user would take instead, as one call: this engine with and without speculation, transformers' several ways to
generate, llama-cpp-python. All are greedy, go on past an end of text, and keep nothing of a prompt they answered."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import queue
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..config import DEFAULT_MODEL, EngineConfig
from ..types import Completion, Delta, SamplingParams

if TYPE_CHECKING:
    from ..model.loading.load import LoadedModel

Prompts = Sequence[Sequence[int]]
LOOKUP_TOKENS = 10  # that prompt lookup proposes at once, as where it was first published
TRIAL_TOKENS = 32  # of the short runs that choose transformers' dtype
COMPILERS = ("g++", "clang++", "c++")


class LeftOut(Exception):
    """A contestant cannot run here; says why, in a few words for its line of the table."""


class Contestant(Protocol):
    """facts: what was compared (dtype, options, own figures), read when all rounds are over."""

    facts: dict[str, Any]

    def answer(self, prompts: Prompts) -> list[list[int]]:
        """The ids of each answer, in order. Prompts that come together are answered together."""

    def close(self) -> None: ...


class Match:
    """What the contestants of one run share. tokens: of each answer · together: prompts of a call · longest: the
    longest prompt, with which shapes are sized"""

    def __init__(self, engine: EngineConfig, tokens: int, together: int, longest: Sequence[int]) -> None:
        self.engine, self.tokens, self.together, self.longest = engine, tokens, together, longest

    @property
    def on_gpu(self) -> bool:
        import torch

        return self.engine.device.startswith("cuda") or (self.engine.device == "auto" and torch.cuda.is_available())

    @functools.cached_property
    def fastest(self) -> tuple[LoadedModel, dict[str, float]]:
        """The model in the dtype in which `generate` is fastest here, and tokens/s in each dtype tried."""
        tokens = min(self.tokens, TRIAL_TOKENS)
        models, speeds = dict[str, Any](), dict[str, float]()
        for dtype in ("bfloat16", "float16") if self.on_gpu else ("float32", "bfloat16"):
            models[dtype] = loaded = without_end(self.engine, dtype)
            took = [_seconds(functools.partial(generate, loaded.model, self.longest, tokens)) for _ in range(3)]
            speeds[dtype] = round(tokens / min(took[1:]), 2)  # the first warms up
        return models[max(speeds, key=lambda dtype: speeds[dtype])], speeds

    def only_one(self) -> None:
        if self.together > 1:
            raise LeftOut("it answers one request at a time")


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# ---- this engine -----------------------------------------------------------------------------------------------------


class Ours:
    """The engine with a slot for each prompt of a call, or as many as were asked for."""

    def __init__(self, match: Match, config: EngineConfig) -> None:
        from ..llm import LLM
        from .facts import rested

        self._llm = rested(LLM(replace(config, slots=config.slots or match.together)))
        about = self._llm.describe()
        self.facts: dict[str, Any] = {name: about[name] for name in ("dtype", "drafts", "nodes", "slots")}
        self._params = SamplingParams(max_tokens=match.tokens, ignore_eos=True)
        self._keys = itertools.count()
        self._drafted, self._steps = 0, 0

    def answer(self, prompts: Prompts) -> list[list[int]]:
        inbox: queue.SimpleQueue[list[tuple[str, Delta]]] = queue.SimpleQueue()
        submit = self._llm.manager.submit
        # a key for each prompt: what another one left in the KV cache is not reused
        order = [submit(ids, self._params, inbox.put, key=str(next(self._keys))) for ids in prompts]
        done = dict[str, Completion]()
        while len(done) < len(order):
            for name, delta in inbox.get():
                if delta.error is not None:
                    raise delta.error
                if delta.completion is not None:
                    done[name] = delta.completion
        self._drafted += sum(c.completion_tokens - 1 for c in done.values())
        self._steps += sum(c.steps for c in done.values())
        self.facts["tokens_per_step"] = round(self._drafted / max(1, self._steps), 3)
        return [list(done[name].token_ids) for name in order]

    def close(self) -> None:
        self._llm.close()


def plain(match: Match) -> Ours:
    return Ours(match, replace(match.engine, heads="none", tree="off", lookup=False))


# ---- transformers ----------------------------------------------------------------------------------------------------


def without_end(engine: EngineConfig, dtype: str) -> LoadedModel:
    """A second model, since the engine changes the modules of its own; it knows no end of text."""
    from ..model.loading.load import load_model

    loaded = load_model(replace(engine, dtype=dtype, quantize="none"), progress=False)
    loaded.model.generation_config.eos_token_id = None
    return loaded


def generate(model: Any, ids: Sequence[int], tokens: int, **options: Any) -> list[int]:
    import torch

    prompt = torch.tensor([list(ids)], device=model.device)
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=tokens, **options)
    return out[0, len(ids) :].tolist()


class Generate:
    """transformers' `generate` in its fastest dtype."""

    def __init__(self, match: Match, **options: Any) -> None:
        match.only_one()
        loaded, speeds = match.fastest
        self.facts: dict[str, Any] = {"dtype": str(loaded.dtype).removeprefix("torch."), "tried": speeds}
        self._model, self._tokens, self._options = loaded.model, match.tokens, options

    def answer(self, prompts: Prompts) -> list[list[int]]:
        return [generate(self._model, ids, self._tokens, **self._options) for ids in prompts]

    def close(self) -> None:
        del self._model


def generate_lookup(match: Match) -> Generate:
    return Generate(match, prompt_lookup_num_tokens=LOOKUP_TOKENS)


def generate_static(match: Match) -> Generate:
    match.only_one()
    options: dict[str, Any] = {"cache_implementation": "static"}
    if not match.on_gpu:
        if compiler() is None:
            raise LeftOut("compiling needs a C++ compiler, and none is here")
        from transformers import CompileConfig

        options["compile_config"] = config = CompileConfig()
        setattr(config, "_compile_all_devices", True)  # otherwise a CPU runs it uncompiled  # noqa: B010
    made = Generate(match, **options)
    made.answer([match.longest])  # the cache is made for the longest prompt, and compiled for once
    return made


def compiler() -> str | None:
    """The C++ compiler that torch would call."""
    named = os.environ.get("CXX")
    found = (shutil.which(name) for name in ((named,) if named else COMPILERS))
    return next((path for path in found if path), None)


class GenerateBatch:
    """transformers' continuous batching."""

    def __init__(self, match: Match) -> None:
        if not match.on_gpu:
            raise LeftOut("generate_batch needs a GPU")
        from transformers import ContinuousBatchingConfig, GenerationConfig

        dtype = str(match.fastest[0].dtype).removeprefix("torch.")
        self.facts: dict[str, Any] = {"dtype": dtype}
        self._model = without_end(match.engine, dtype).model  # it plugs other attention into its model
        greedy = GenerationConfig(do_sample=False, max_new_tokens=match.tokens, eos_token_id=-1, pad_token_id=0)
        # half of the free memory, as others need some; and no prefix of an earlier prompt
        batching = ContinuousBatchingConfig(max_memory_percent=0.5, allow_block_sharing=False)
        self._options = {"generation_config": greedy, "continuous_batching_config": batching}
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # it gives advice at every call
        self.answer([match.longest] * match.together)

    def answer(self, prompts: Prompts) -> list[list[int]]:
        inputs = [list(ids) for ids in prompts]
        out = self._model.generate_batch(inputs, **self._options, persistent_manager=True)
        return [list(one.generated_tokens) for one in out.values()]

    def close(self) -> None:
        self._model.destroy_cached_continuous_batching_manager()
        del self._model


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


class LlamaCpp:
    """llama-cpp-python on the GGUF file that the model was made from, with as many threads as torch."""

    def __init__(self, match: Match) -> None:
        match.only_one()
        import torch

        try:
            llama_cpp = import_module("llama_cpp")  # no requirement of this package
        except (ImportError, OSError, RuntimeError) as error:
            missing = isinstance(error, ModuleNotFoundError)
            raise LeftOut("llama-cpp-python is not installed" if missing else reason(error)) from error
        if match.on_gpu and not llama_cpp.llama_supports_gpu_offload():
            raise LeftOut("this llama-cpp-python is built without support for a GPU")
        threads, file = torch.get_num_threads(), gguf_of(match.engine.model)
        self.facts: dict[str, Any] = {"dtype": file.stem.rsplit(".", 1)[-1], "threads": threads}
        self._tokens = match.tokens
        self._llama = llama_cpp.Llama(
            str(file),
            n_ctx=len(match.longest) + match.tokens + 8,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=-1 if match.on_gpu else 0,
            verbose=False,
        )

    def answer(self, prompts: Prompts) -> list[list[int]]:
        answers = []
        for ids in prompts:
            self._llama.reset()  # no token is kept, so the evaluation that follows clears the KV cache
            said = self._llama.generate(list(ids), temp=0.0, top_k=1, repeat_penalty=1.0)
            answers.append(list(itertools.islice(said, self._tokens)))
        return answers

    def close(self) -> None:
        self._llama.close()


def gguf_of(model: str) -> Path:
    """The GGUF file that a model in the cache was made from. Raises LeftOut."""
    from ..model.loading.default_model import SMOLLM2, cache_folder

    if model != DEFAULT_MODEL:
        raise LeftOut("only the default model was made from a GGUF file")
    file = cache_folder(None) / SMOLLM2.gguf
    if not file.is_file():
        raise LeftOut(f"there is no {file}")
    return file


def reason(error: Exception) -> str:
    """The first line of an error, short enough for a table."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160].rstrip(": ")


# name → (what the table calls it, how it is made)
CONTESTANTS: dict[str, tuple[str, Callable[[Match], Contestant]]] = {
    "speculative": ("medusa_serve", lambda match: Ours(match, match.engine)),
    "plain": ("medusa_serve, no speculation", plain),
    "generate": ("transformers generate", Generate),
    "generate-lookup": ("generate, prompt lookup", generate_lookup),
    "generate-static": ("generate, static cache, compiled", generate_static),
    "generate-batch": ("transformers generate_batch", GenerateBatch),
    "llama-cpp": ("llama-cpp-python", LlamaCpp),
}
