"""Benchmarks as a notebook shows them: a table, a picture, and a result file beside the notebook."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.command import write
from ..config import EngineConfig
from . import env
from .background import stop_running

CONTESTANTS = ("speculative", "plain", "generate", "generate-lookup")


@dataclass(frozen=True)
class Shown:
    """A result, its table, and the file that it was written to."""

    result: dict[str, Any]
    table: str
    file: Path

    def __str__(self) -> str:
        return f"{self.table}\nkept in {self.file}"

    def picture(self) -> Any:
        """For the end of a cell. Raises LoadError without matplotlib."""
        from IPython.display import Image

        from ..bench.plot import PlotConfig, plot

        drawn = self.file.with_suffix(".png")
        plot(PlotConfig(files=(str(self.file),), out=str(drawn)))
        return Image(filename=str(drawn), width=720)


def decode(model: str, heads: str, *, tokens: int, rounds: int, most: int) -> Shown:
    """Tokens per second with speculation on and off, of 1, 2, 4 … `most` sequences at once."""
    from ..bench.decode import DecodeConfig, bench_decode
    from ..bench.plot import decode_table

    stop_running()
    at_once = tuple(2**power for power in range(most.bit_length()))
    config = DecodeConfig(concurrency=at_once, nodes=(8,), tokens=tokens, rounds=rounds, one_at_a_time=False)
    result = bench_decode(EngineConfig(model=model, heads=heads), config)
    return _kept(result, decode_table(result), "decode.json")


def peers(model: str, heads: str, *, tokens: int, rounds: int, prompts: int) -> Shown:
    """Tokens per second beside transformers, one prompt at a time. prompts: of each round"""
    from ..bench.peers import PeersConfig, bench_peers, table

    stop_running()
    config = PeersConfig(contestants=CONTESTANTS, prompts=prompts, tokens=tokens, rounds=rounds)
    result = bench_peers(EngineConfig(model=model, heads=heads), config)
    return _kept(result, table(result), "peers.json")


def _kept(result: dict[str, Any], table: str, name: str) -> Shown:
    result["command"] = "notebooks/03_benchmark.ipynb"
    folder = env.keep_in() / "medusa_bench"
    folder.mkdir(parents=True, exist_ok=True)
    write(str(folder / name), result)
    return Shown(result, table, folder / name)
