"""The pass of one row over a small tree as one C++ function, and the draft of such a tree as another: torch.export
traces the same code that runs eagerly, AOTInductor compiles it. On a CPU the Python and the small operations between
the products are half of both.

Built in a process of its own before serving (build_compiled.py), a minute for each size of tree, and kept in the cache
folder; weights stay the model's, in memory once. Packages that are not there, do not load or give other numbers are not
used, and a note says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import EngineConfig
from .drafting.tree import HeadNodes, Tree
from .forward.tree_forward import PlugInError, TreeForward
from .forward.view import View, chain_view, tree_view
from .sampling.filters import Sampling
from .selftest import TREE
from .shapes import Shape, heads_fill
from .weights.int4 import GROUP
from .weights.machine_cache import cpu_name

MOST_NODES = 8  # of a tree whose pass is compiled: past it, products are most of the time
BUILD_S = 900  # for all sizes together
# whose code is in packages
SOURCES = (
    "forward/attention", "drafting/drafters", "forward/slab", "compiled", "drafting/draft", "forward/tree_forward",
    "drafting/heads", "weights/int4", "weights/int8", "drafting/output_layer",
)  # fmt: skip
HISTORY = 40  # tokens before the trees of the check
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the logits' norm
SAME_DRAFTS = 0.8  # of the check's drafted nodes: rounding may swap near-ties


class CompiledPasses:
    """Packages by number of nodes, over the forward's model and cache. Raises RuntimeError for a package that is of
    another model."""

    def __init__(self, forward: TreeForward, packages: dict[int, Path]) -> None:
        self._cache = forward.cache
        self._group = _group(forward)
        self._rows: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        state = _state(_Pass(forward))
        self._passes = {nodes: _loaded(path, state) for nodes, path in packages.items()}
        self.sizes = tuple(sorted(self._passes))

    def covers(self, view: View) -> bool:
        return not view.causal and len(view.host_slots) == 1 and view.num_new in self._passes

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


class CompiledDrafts:
    """Packages by number of nodes that the heads draft, over their weights. Of greedy rows: the noise of the others
    costs more than it."""

    def __init__(self, drafter: Any, packages: dict[int, Path]) -> None:
        state = _state(_Draft(drafter, 1))
        self._drafts = {nodes: _loaded(path, state) for nodes, path in packages.items()}

    def covers(self, pending: Tensor, sampling: Sampling, nodes: int) -> bool:
        return len(pending) == 1 and not sampling.sampled and nodes in self._drafts

    def run(self, hidden: Tensor, pending: Tensor, length: Tensor, nodes: int) -> HeadNodes:
        return HeadNodes(*self._drafts[nodes](hidden, pending, length))


def _loaded(path: Path, state: dict[str, Tensor]) -> Any:
    package = torch._inductor.aoti_load_package(str(path))
    constants = {}
    for name in package.get_constant_fqns():
        if name not in state and not name.removeprefix("constant").isdigit():
            raise RuntimeError(f"{path.name} has a constant of its own, {name}")
        # of Inductor's own making are the group sizes of int4 products
        constants[name] = state[name] if name in state else torch.tensor(GROUP)
    package.load_constants(constants, check_full_update=True, user_managed=True)
    return package


def compile_passes(
    forward: TreeForward, drafter: Any, shapes: dict[int, Shape], config: EngineConfig, cache: Path
) -> str:
    """Give the forward and the drafter what is compiled for each shape that is small enough, built where the cache has
    none; → a note.

    drafter: None, or one with a place for CompiledDrafts · config: names the model's dtype and quantize, not "auto"
    """
    if forward.cache.keys.device.type != "cpu":
        return "no compiled passes because a GPU replays its own captured ones"
    drafter = drafter if hasattr(drafter, "compiled") else None
    small = [shape for nodes, shape in sorted(shapes.items()) if nodes <= MOST_NODES]
    home = cache / "compiled" / _key(forward, drafter, config)
    passes = {shape.num_nodes: home / f"pass-{shape.num_nodes}.pt2" for shape in small}
    sizes = {heads_fill(shape, drafter.max_nodes) for shape in small} - {0} if drafter else set()
    drafts = {nodes: home / f"draft-{nodes}.pt2" for nodes in sizes}
    missing = not all(path.is_file() for path in (*passes.values(), *drafts.values()))
    if missing:
        failed = _build(config, forward.cache.keys.shape[2], passes, drafts)
        if failed:
            return f"no compiled passes because {failed}"
    try:
        compiled = CompiledPasses(forward, passes), CompiledDrafts(drafter, drafts) if drafts else None
    except RuntimeError as error:
        return f"no compiled passes because they cannot be loaded ({_first_line(str(error))})"
    worst, same = _compare(forward, compiled[0], drafter, compiled[1], max(drafts, default=0))
    if not worst <= TOLERANCE.get(forward.model.dtype, 0.05):
        return f"no compiled passes because their logits differ from the model's by {worst:.1%}"
    if same < SAME_DRAFTS:
        return f"no compiled passes because only {same:.0%} of their drafts are the heads'"
    forward.compiled = compiled[0]
    if drafter:
        drafter.compiled = compiled[1]
    told = ", ".join(map(str, passes))
    return f"passes of {told} nodes are compiled ({'now' if missing else 'at an earlier start'}; {worst:.1e} apart)"


def _compare(
    forward: TreeForward, passes: CompiledPasses, drafter: Any, drafts: CompiledDrafts | None, nodes: int
) -> tuple[float, float]:
    """Compiled against eager: the logits' worst relative error over a branching tree of each size behind the same
    history, and the share of drafted nodes that are the same. Slot 0 must be free."""
    ids = torch.arange(HISTORY + MOST_NODES) * 7919 % forward.model.get_input_embeddings().num_embeddings
    _, hidden = forward.run(ids[None, :HISTORY], chain_view([0], [0], [HISTORY], ids.device))
    worst = 0.0
    for size in passes.sizes:
        tokens = ids[None, HISTORY : HISTORY + size]
        draft = Tree(TREE.paths[: size - 1], max(0, size - TREE.num_nodes)).draft(tokens)
        view = tree_view(torch.tensor([0]), torch.tensor([HISTORY]), [0], [HISTORY], draft)
        wanted, got = forward.run(tokens, view)[0], passes.run(tokens, view)[0]
        worst = max(worst, float((got.float() - wanted.float()).norm() / wanted.float().norm()))
    forward.zero(0)
    if drafts is None or hidden is None:
        return worst, 1.0
    same = []
    for place in range(HISTORY - 1):
        given = hidden[:, place], ids[place + 1 : place + 2], torch.tensor([place + 1])
        eager, mine = drafter.draft(given[1], *given, _greedy(), nodes), drafts.run(*given, nodes)
        same.append(torch.stack([*eager]) == torch.stack([*mine]))
    return worst, float(torch.stack(same).float().mean())


# ---- building ----------------------------------------------------------------------------------------------------


def _build(config: EngineConfig, columns: int, passes: dict[int, Path], drafts: dict[int, Path]) -> str | None:
    """Build what is missing in a process of its own; → why not."""
    if compiler() is None:
        return "there is no C++ compiler (g++ or clang++, or the one that CXX names)"
    orders = {
        what: {nodes: str(path) for nodes, path in paths.items() if not path.is_file()}
        for what, paths in (("passes", passes), ("drafts", drafts))
    }
    count, folder = sum(map(len, orders.values())), passes[1].parent
    print(f"Compiling {count} functions, up to a minute each; they are kept.", file=sys.stderr, flush=True)
    home = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "medusa_serve.build_compiled"],
            input=json.dumps({"config": asdict(config), "columns": columns, **orders}),
            capture_output=True, text=True, timeout=BUILD_S, env=environment,
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


def _key(forward: TreeForward, drafter: Any, config: EngineConfig) -> str:
    """Of what packages hold: all but the weights' values."""
    import transformers

    state = _state(_Pass(forward)) | (_state(_Draft(drafter, 1)) if drafter else {})
    facts = [forward.model.config.to_dict(), config.dtype, config.quantize, forward.hidden_inputs]
    facts += [list(forward.cache.keys.shape[2:]), forward.max_positions, str(forward.cache.keys.dtype)]
    facts += [torch.__version__, transformers.__version__, cpu_name()]
    facts += [repr(drafter.heads), drafter.heads.max_depth] if drafter else []
    facts += [[name, list(value.shape), str(value.dtype)] for name, value in sorted(state.items())]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name in SOURCES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:24]


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names in a package."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _group(forward: TreeForward) -> int:
    return forward.model.config.get_text_config().num_attention_heads // forward.cache.keys.shape[3]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]


def _greedy() -> Sampling:
    zero, none = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    return Sampling(zero, none, zero, zero, none, sampled=False, filtered=False)


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
        self._forward = (forward,)  # a tuple hides it: it is no module

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


class _Draft(torch.nn.Module):
    """What is traced of a drafter: hidden (1, M·H), pending (1), length (1) → HeadNodes' fields, (1, nodes) each."""

    def __init__(self, drafter: Any, nodes: int) -> None:
        super().__init__()
        self.heads, self._drafter, self._nodes = drafter.heads, (drafter,), nodes
        self.register_buffer("tau", drafter.tau)
        self.embedding: Any = getattr(drafter.heads, "_embedding", (None,))[0]

    def forward(self, hidden: Tensor, pending: Tensor, length: Tensor) -> tuple[Tensor, ...]:
        drafter = self._drafter[0]
        before, drafter.tau = drafter.tau, self.tau  # what is traced as this module's is not copied into the package
        try:
            return tuple(drafter.draft(pending, hidden, pending, length, _greedy(), self._nodes))
        finally:
            drafter.tau = before


@torch.no_grad()
def build_pass(forward: TreeForward, nodes: int, path: Path) -> None:
    """Trace and compile the pass of one row of N nodes, for any length; needs a C++ compiler."""
    cache = forward.cache
    columns, width = cache.keys.shape[2], 2 * nodes + 16
    rows = list(cache.keys[:, 0].unbind()), list(cache.values[:, 0].unbind())
    places = torch.arange(width - nodes, width)
    bias = torch.zeros(1, 1, _group(forward) * nodes, width, dtype=cache.keys.dtype)
    example = (torch.arange(nodes)[None], places[None].clone(), places, bias, *rows)
    still = [None] * len(rows[0])
    length = torch.export.Dim("T", min=nodes + 1, max=columns)
    _compile(_Pass(forward), example, (None, None, None, {3: length}, still, still), path)


@torch.no_grad()
def build_draft(drafter: Any, nodes: int, hidden_size: int, dtype: torch.dtype, path: Path) -> None:
    """Trace and compile the draft of so many nodes of one greedy row. hidden_size: M·H"""
    example = (torch.randn(1, hidden_size).to(dtype), torch.tensor([1]), torch.tensor([20]))
    _compile(_Draft(drafter, nodes), example, None, path)


def _compile(module: torch.nn.Module, example: tuple[Any, ...], dynamic: Any, path: Path) -> None:
    exported = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
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
