"""Options, as frozen dataclasses that refuse nonsense by field name (InvalidConfig). No torch."""

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
    """What was chosen by the options and the machine, and why; the options stay what the user said."""

    value: Value
    why: str


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the model is loaded and how requests share it.

    model        "smollm2-135m" (from the package index), a hub id, or a local folder
    heads        auto (what ships for the model, else none), none, medusa, sequential, a file, a folder or a hub id
    device       auto, cpu, cuda, cuda:N, or split: the layers over all visible GPUs, for what is too large for one
    dtype        auto: what quantize says on a CPU; on a GPU bfloat16, or float16 where that is not native
    quantize     a CPU's: int8 weights (a changed model), int4 (where they are four-bit numbers already), none, or auto:
                 none for a small model, and where a dtype is asked for; else float32, bfloat16, int4 or int8,
                 whichever this CPU was measured to multiply fastest. A GPU's: nf4 (a changed model), none, or auto: nf4
                 where half precision leaves no room for four sequences
    slots        sequences that decode together; None: from memory (8 on a CPU, up to 64 on a GPU)
    max_context  tokens of prompt and completion of one sequence; None: min(model's, 2048 on a CPU, 4096 on a GPU)
    tree         auto, off (plain decoding), a number of nodes 2 … 64 with the root, or a JSON file of medusa_choices
    lookup       also draft from n-gram matches in the sequence's own tokens
    draft_vocab  tokens that tied heads draft from, the first of their list; 0: the whole vocabulary; None: of a longer
                 list 16384 on a CPU
    compile      a GPU's: the decoder layers, while it idles, unless it is false; false on either: layers run as they
                 are, where a CPU else traces them and gives them kernels of Numba's
    exact        on a CPU in bfloat16, int8 or int4: the same text whatever the tree, the company and the chunks of a
                 prompt, bit for bit; None: where a test at load shows that it holds
    prefill_chunk  prompt tokens of one pass at most; smaller while others decode
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
            raise InvalidConfig("exact passes are not the compiled ones: choose one of the two.", param="exact")
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
