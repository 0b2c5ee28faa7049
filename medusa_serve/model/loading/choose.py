"""The device of a model and the number format of its weights. Each choice comes with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...config import AS_ASKED, Choice, EngineConfig
from ...errors import LoadError
from ..weights.int4 import Int4Linear
from ..weights.nf4 import require_nf4
from ..weights.number_format import choose_format
from .default_model import cache_folder
from .gpu_facts import why_unusable
from .gpu_memory import CONTEXT, plan_memory, sizes_of


@dataclass(frozen=True)
class Numbers:
    """dtype    that the model computes in
    weights  format of its linear layers: "int8" or "nf4" (a changed model), "int4" (its own numbers, see
             weights/int4.py), or "" for the dtype
    notes    "(what) because (why)" for each automatic choice
    """

    dtype: torch.dtype
    weights: str = ""
    notes: tuple[str, ...] = ()


def choose_device(wanted: str) -> Choice[torch.device]:
    """wanted: EngineConfig's device. Raises LoadError where there is no such device, or it cannot be used."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    why = AS_ASKED
    if wanted == "auto":
        wanted, why = ("cuda", "one is there") if count else ("cpu", "no CUDA device is there")
    if wanted == "split" and count < 2:
        raise LoadError(f"device split needs two GPUs or more, and this machine has {count or 'none'}; use auto.")
    device = torch.device("cuda:0" if wanted == "split" else wanted)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if not count:
            raise LoadError("There is no CUDA device here, or PyTorch is built without CUDA; use device cpu or auto.")
        if (device.index or 0) >= count:
            raise LoadError(f"There is no device {device}; this machine has cuda:0 to cuda:{count - 1}.")
        if (unusable := why_unusable(device)) is not None:
            raise LoadError(unusable)
    return Choice(device, why)


def choose_numbers(
    config: EngineConfig,
    device: torch.device,
    hf_config: Any,
    few_bits: bool = False,
    own: type[Int4Linear] | None = None,
) -> Numbers:
    """few_bits: the model's weights are four-bit numbers already · own: this machine's own class of int4 layers.
    Raises LoadError."""
    if config.quantize in ("int8", "int4"):
        if device.type != "cpu":
            raise LoadError(f"{config.quantize} weights are for a CPU; on a GPU quantize is auto, none or nf4.")
        if config.quantize == "int4" and not few_bits:
            raise LoadError(
                "int4 weights are for models with weights that are four-bit numbers already, stored in float32; "
                "this one's would be rounded."
            )
        return Numbers(torch.bfloat16, config.quantize)
    if config.quantize == "nf4":
        require_nf4(device)
    if device.type == "cuda":
        dtype, notes = (getattr(torch, config.dtype), ()) if config.dtype != "auto" else _half(device)
        weights, more = quantized_to_fit(config, device, hf_config, dtype)
        return Numbers(dtype, weights, (*notes, *more))
    if config.dtype != "auto":
        return Numbers(getattr(torch, config.dtype))
    small = () if config.quantize == "none" else ("int4", "int8") if few_bits else ("int8",)
    best, why = choose_format(hf_config, ("float32", "bfloat16", *small), cache_folder(), own)
    if best in small:
        return Numbers(torch.bfloat16, best, (f"dtype bfloat16 with {best} weights because {why}",))
    return Numbers(getattr(torch, best), "", (f"dtype {best} because {why}",))


def _half(device: torch.device) -> tuple[torch.dtype, tuple[str, ...]]:
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # by default a T4 says yes, as it emulates it
    if native:
        return torch.bfloat16, ("dtype bfloat16 because the GPU computes in it",)
    return torch.float16, ("dtype float16 because the GPU has no bfloat16 of its own",)


def quantized_to_fit(
    config: EngineConfig, device: torch.device, hf_config: Any, dtype: torch.dtype
) -> tuple[str, tuple[str, ...]]:
    """→ ("nf4" or "", notes), as asked for or as the GPU's free memory needs. Raises LoadError where nothing fits."""
    if config.device == "split":
        return "", ()
    try:
        sizes = sizes_of(hf_config)
    except (LoadError, ValueError, AttributeError):  # a family that is built differently: no plan, no quantisation
        return "", ()
    free = torch.cuda.mem_get_info(device)[0] + CONTEXT  # this very call has created the context
    plan = plan_memory(sizes, free, dtype.itemsize, config)
    if not plan.slots:
        raise LoadError(f"{config.model}: {'; '.join(plan.verdict())} ({free / 2**30:.1f} GiB are free).")
    if plan.quantize != "nf4":
        return "", ()
    require_nf4(device)
    notes = (f"quantize nf4 because {plan.why}",) if config.quantize == "auto" else ()
    return "nf4", (*notes, "the text is that of the model in NF4, a changed model; quantize none keeps the model's own")
