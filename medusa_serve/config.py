"""Options as frozen dataclasses. A wrong value raises InvalidConfig, which names the field. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from .errors import InvalidConfig

DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
QUANTIZE = ("auto", "none", "int8", "int4", "nf4")
DEFAULT_MODEL = "smollm2-135m"
MAX_NODES = 64
AS_ASKED = "as asked"  # the reason of a choice that the user made
Value = TypeVar("Value")


class Choice(NamedTuple, Generic[Value]):
    """A value chosen from the options and the machine, and the reason. The options themselves never change."""

    value: Value
    why: str


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the model is loaded and how requests share it.

    model        "smollm2-135m" (from the package index), a hub id, or a local folder
    heads        auto (what ships for the model, else none), none, medusa, sequential, a file, a folder or a hub id
    device       auto, cpu, cuda, cuda:N, or split: the layers over all visible GPUs, if one is too small
    dtype        auto: on a CPU as quantize decides; on a GPU bfloat16, or float16 where the GPU has no bfloat16
    quantize     on a CPU: int8 weights (a changed model), int4 (if the weights are four-bit numbers already), none, or
                 auto: none for a small model, or if a dtype is asked for; else float32, bfloat16, int4 or int8: the
                 one that this CPU multiplies fastest by measurement. On a GPU: nf4 (a changed model), none, or auto:
                 nf4 if half precision leaves no memory for four sequences
    slots        sequences that decode together; None: 8 on a CPU, up to 64 on a GPU as memory allows
    max_context  tokens of prompt and completion of one sequence; None: min(model's, 2048 on a CPU, 4096 on a GPU)
    tree         auto, off (plain decoding), a number of nodes 2 … 64 with the root, or a JSON file of medusa_choices
    lookup       also draft from n-gram matches in the sequence's own tokens
    draft_vocab  tied heads draft from this many tokens, the first of their list; 0: from the full vocabulary; None: on
                 a CPU from 16384 at most
    compile      a GPU compiles the decoder layers while it idles, and a CPU traces them and gives them Numba kernels;
                 false: on both the layers run as they are
    exact        on a CPU in bfloat16, int8 or int4: the same text, bit for bit, for any tree, any batch and any chunks
                 of the prompt; None: where a test at load shows that this holds
    prefill_chunk  most prompt tokens in one pass; fewer while others decode
    max_queue    sequences that may wait for a slot; one more is refused (429)
    """

    model: str = DEFAULT_MODEL
    heads: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "auto"
    slots: int | None = None
    max_context: int | None = None
    tree: str = "auto"
    lookup: bool = True
    draft_vocab: int | None = None
    compile: bool | None = None
    exact: bool | None = None
    prefill_chunk: int = 512
    max_queue: int = 64

    def __post_init__(self) -> None:
        for name in ("model", "heads", "device", "tree"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InvalidConfig(f"{name} must be a non-empty string.", param=name)
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda", "split") or (index and (kind != "cuda" or not index.isdigit())):
            message = f"device must be auto, cpu, cuda, cuda:N or split, not {self.device!r}."
            raise InvalidConfig(message, param="device")
        if self.dtype not in DTYPES:
            raise InvalidConfig(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.", param="dtype")
        if self.quantize not in QUANTIZE:
            raise InvalidConfig(
                f"quantize must be one of {', '.join(QUANTIZE)}, not {self.quantize!r}.", param="quantize"
            )
        if self.quantize in ("int8", "int4") and self.dtype not in ("auto", "bfloat16"):
            raise InvalidConfig(
                f"quantize {self.quantize} computes in bfloat16, not in {self.dtype}.", param="quantize"
            )
        if self.quantize == "nf4" and self.dtype in ("float32", "float64"):
            raise InvalidConfig(f"quantize nf4 computes in half precision, not in {self.dtype}.", param="quantize")
        if not isinstance(self.compile, bool | None):
            raise InvalidConfig(f"compile must be true or false, not {self.compile!r}.", param="compile")
        if not isinstance(self.exact, bool | None):
            raise InvalidConfig(f"exact must be true or false, not {self.exact!r}.", param="exact")
        if self.exact and self.compile:
            raise InvalidConfig("exact passes cannot be compiled: choose exact or compile.", param="exact")
        check_int(self, "slots", 1, 1024, optional=True)
        check_int(self, "max_context", 8, 2**22, optional=True)
        check_int(self, "draft_vocab", 0, 2**31, optional=True)
        check_int(self, "prefill_chunk", 1, 65536)
        check_int(self, "max_queue", 0, 100_000)
        if self.tree.lstrip("-").isdigit() and not 2 <= int(self.tree) <= MAX_NODES:
            raise InvalidConfig(f"tree must have 2 to {MAX_NODES} nodes (the root counts), or be 'off'.", param="tree")


def check_int(config: Any, name: str, low: int, high: int, *, optional: bool = False) -> None:
    """Raise InvalidConfig unless the field is an int in [low, high]."""
    value = getattr(config, name)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidConfig(f"{name} must be an integer from {low} to {high}, not {value!r}.", param=name)
