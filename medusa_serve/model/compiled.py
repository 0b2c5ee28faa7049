"""The pass of one row over a small tree as one C++ function: torch.export traces the same forward that runs eagerly,
AOTInductor compiles it. On a CPU the Python and the small operations between the products are half of such a pass.

Built in a process of its own before serving, a minute for each size of tree, and kept in the cache folder; weights stay
the model's, in memory once. A package that is not there, does not load or gives other numbers is not used, and a note
says why. Run as a module, it builds what standard input asks for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import EngineConfig
from .attention import View, chain_view, tree_view
from .forward import PlugInError, TreeForward
from .int4 import GROUP
from .measured import cpu_name
from .selftest import TREE
from .tree import Tree

MOST_NODES = 8  # of a tree whose pass is compiled: past it, products are most of the time
BUILD_S = 900  # for all sizes together
SOURCES = ("attention", "cache", "compiled", "forward", "int4", "int8")  # whose code is in a package
HISTORY = 40  # tokens before the trees of the check
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the logits' norm


class CompiledPasses:
    """Packages by number of nodes, over the forward's model and cache. Raises RuntimeError for a package that is of
    another model."""

    def __init__(self, forward: TreeForward, packages: dict[int, Path]) -> None:
        self._cache = forward.cache
        self._group = _group(forward)
        self._rows: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._state = _state(forward.model)
        self._passes = {nodes: self._loaded(path) for nodes, path in packages.items()}
        self.sizes = tuple(sorted(self._passes))

    def _loaded(self, path: Path) -> Any:
        package = torch._inductor.aoti_load_package(str(path))
        constants = {}
        for name in package.get_constant_fqns():
            # the only constants that Inductor makes of its own here are the group sizes of int4 products
            constants[name] = self._state[name] if name in self._state else torch.tensor(GROUP)
        package.load_constants(constants, check_full_update=True, user_managed=True)
        return package

    def covers(self, view: View) -> bool:
        return view.tree is not None and len(view.host_slots) == 1 and view.num_new in self._passes

    def run(self, tokens: Tensor, view: View) -> tuple[Tensor, Tensor | None]:
        """As TreeForward.run: tokens (1, N) → logits (1, N, V), hidden (1, N, M·H)."""
        slot, width = view.host_slots[0], view.host_length[0] + view.num_new
        if slot not in self._rows:
            self._rows[slot] = list(self._cache.keys[:, slot].unbind()), list(self._cache.values[:, slot].unbind())
        bias = view.bias(None, 0, self._group, self._cache.keys.dtype)
        if bias is None:
            bias = self._cache.keys.new_zeros(1, 1, self._group, width)
        logits, *hidden = self._passes[view.num_new](tokens, view.positions, view.columns[0], bias, *self._rows[slot])
        return logits, hidden[0] if hidden else None


def compile_passes(forward: TreeForward, config: EngineConfig, sizes: Sequence[int], cache: Path) -> str:
    """Give the forward a compiled pass for each size that is small enough, built where the cache has none; → a note.

    config: names the model's dtype and quantize, not "auto"
    """
    if forward.cache.keys.device.type != "cpu":
        return "no compiled passes because a GPU replays its own captured ones"
    sizes = [nodes for nodes in sizes if nodes <= MOST_NODES]
    packages = {nodes: cache / "compiled" / f"{_key(forward, config)}-{nodes}.pt2" for nodes in sizes}
    missing = {nodes: str(path) for nodes, path in packages.items() if not path.is_file()}
    if missing:
        failed = _build(forward, config, missing)
        if failed:
            return f"no compiled passes because {failed}"
    try:
        passes = CompiledPasses(forward, packages)
    except RuntimeError as error:
        return f"no compiled passes because they cannot be loaded ({_first_line(str(error))})"
    worst = _worst_error(forward, passes)
    if not worst <= TOLERANCE.get(forward.model.dtype, 0.05):
        return f"no compiled passes because their logits differ from the model's by {worst:.1%}"
    forward.compiled = passes
    told = ", ".join(map(str, sizes))
    return f"passes of {told} nodes are compiled ({'now' if missing else 'at an earlier start'}; {worst:.1e} apart)"


def _worst_error(forward: TreeForward, passes: CompiledPasses) -> float:
    """Of the logits of a branching tree of each size, behind the same history: compiled against eager, relative. Slot 0
    must be free."""
    ids = torch.arange(HISTORY + MOST_NODES) * 7919 % forward.model.get_input_embeddings().num_embeddings
    forward.run(ids[None, :HISTORY], chain_view([0], [0], [HISTORY], ids.device))
    worst = 0.0
    for nodes in passes.sizes:
        tokens = ids[None, HISTORY : HISTORY + nodes]
        draft = Tree(TREE.paths[: nodes - 1], max(0, nodes - TREE.num_nodes)).draft(tokens)
        view = tree_view(torch.tensor([0]), torch.tensor([HISTORY]), [0], [HISTORY], draft)
        wanted, got = forward.run(tokens, view)[0], passes.run(tokens, view)[0]
        worst = max(worst, float((got.float() - wanted.float()).norm() / wanted.float().norm()))
    forward.zero(0)
    return worst


# ---- building ----------------------------------------------------------------------------------------------------


def _build(forward: TreeForward, config: EngineConfig, missing: dict[int, str]) -> str | None:
    """Build in a process of its own; → why not."""
    if compiler() is None:
        return "there is no C++ compiler (g++ or clang++, or the one that CXX names)"
    told = " and ".join(map(str, missing))
    print(f"Compiling the pass of {told} nodes, a minute each; it is kept.", file=sys.stderr, flush=True)
    folder = Path(next(iter(missing.values()))).parent
    order = {"config": asdict(config), "packages": missing, "hidden_inputs": forward.hidden_inputs}
    order |= {"columns": forward.cache.keys.shape[2]}
    home = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "medusa_serve.model.compiled"],
            input=json.dumps(order), capture_output=True, text=True, timeout=BUILD_S, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the compiler took longer than {BUILD_S} s"
    except OSError as error:
        return f"they cannot be kept in {folder} ({error.strerror or error})"
    if done.returncode:
        return f"compiling failed ({_first_line(done.stderr.strip().rpartition(chr(10))[2]) or done.returncode})"
    return None


def compiler() -> str | None:
    """The C++ compiler that Inductor would take."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


def _key(forward: TreeForward, config: EngineConfig) -> str:
    """Of what a package holds: all but the weights' values."""
    import transformers

    digest = hashlib.sha256()
    facts = [forward.model.config.to_dict(), config.dtype, config.quantize, forward.hidden_inputs]
    facts += [list(forward.cache.keys.shape[2:]), forward.max_positions, str(forward.cache.keys.dtype)]
    facts += [torch.__version__, transformers.__version__, cpu_name()]
    facts += [[name, list(value.shape), str(value.dtype)] for name, value in sorted(_state(forward.model).items())]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name in SOURCES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:24]


def _state(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by their names in a package."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {f"model.{name}": value for name, value in every}


def _group(forward: TreeForward) -> int:
    return forward.model.config.get_text_config().num_attention_heads // forward.cache.keys.shape[3]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]


class _RowSlab:
    """What SlotCache.write is to a pass, over the layers' parts of one slot: (C, kv_heads, dim) each."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys, self.values = keys, values

    def write(self, layer: int, slots: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer][columns[0]] = keys[0].transpose(0, 1)
        self.values[layer][columns[0]] = values[0].transpose(0, 1)
        return self.keys[layer][None], self.values[layer][None]


class _RowView(View):
    """A view whose mask is given."""

    given: Tensor

    def bias(self, window: int | None, row: int | None, group: int, dtype: torch.dtype) -> Tensor | None:
        if window is not None:
            raise PlugInError("its layers see a window of the text")
        return self.given

    def visible(self, window: int | None) -> Tensor:
        raise PlugInError("its attention has a soft cap or sinks")


class _Pass(torch.nn.Module):
    """What is traced. keys, values: L tensors (C, kv_heads, dim), written in place · bias (1, 1, group × N, T)"""

    def __init__(self, forward: TreeForward) -> None:
        super().__init__()
        self.model = forward.model
        self._forward = (forward,)

    def forward(
        self, tokens: Tensor, positions: Tensor, columns: Tensor, bias: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, ...]:
        nodes, width = tokens.shape[1], bias.shape[-1]
        view = _RowView(tokens[:, 0], positions[:, 0], [0], [width - nodes], positions, columns[None], None, width)
        view.given = bias
        with _slab(self._forward[0], _RowSlab(keys, values)):
            logits, hidden = self._forward[0].run(tokens, view)
        return (logits,) if hidden is None else (logits, hidden)


@contextlib.contextmanager
def _slab(forward: TreeForward, slab: Any) -> Iterator[None]:
    cache = forward._slab_cache
    before, cache.slab = cache.slab, slab
    try:
        yield
    finally:
        cache.slab = before


@torch.no_grad()
def build_package(forward: TreeForward, nodes: int, path: Path) -> None:
    """Trace and compile the pass of one row of N nodes, for any length; needs a C++ compiler."""
    cache = forward.cache
    columns, width = cache.keys.shape[2], 2 * nodes + 16
    rows = list(cache.keys[:, 0].unbind()), list(cache.values[:, 0].unbind())
    places = torch.arange(width - nodes, width)
    bias = torch.zeros(1, 1, _group(forward) * nodes, width, dtype=cache.keys.dtype)
    example = (torch.arange(nodes)[None], places[None].clone(), places, bias, *rows)
    still = [None] * len(rows[0])
    length = torch.export.Dim("T", min=nodes + 1, max=columns)
    exported = torch.export.export(
        _Pass(forward), example, dynamic_shapes=(None, None, None, {3: length}, still, still), strict=False
    )
    options = {
        "cpp.threads": 1,  # its loops are short; a second pool of threads would fight with the products'
        "aot_inductor.package_constants_in_so": False,
    }
    part = path.with_name(f"{path.stem}.{os.getpid()}.pt2")
    try:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(part), inductor_configs=options)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main() -> None:
    from .loader import load_model

    order = json.load(sys.stdin)
    loaded = load_model(EngineConfig(**order["config"]), progress=False)
    hidden_inputs = tuple(order["hidden_inputs"])
    forward = TreeForward(loaded.model, 1, order["columns"], loaded.max_positions, hidden_inputs)
    try:
        for nodes, path in order["packages"].items():
            build_package(forward, int(nodes), Path(path))
    except PlugInError as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
