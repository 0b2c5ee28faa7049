"""Answers on disk: a folder of shards, each complete or absent, and a meta.json that says how they were made."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LoadError

META = "meta.json"
FIELDS = ("index", "seed", "temperature", "prompt_len", "answer_len", "tokens")


@dataclass(frozen=True)
class Answers:
    """n prompts with their answers, one after another in one array.

    index (n): which prompt · seed, temperature (n) · prompt_len, answer_len (n) · start (n): where a sequence begins
    in tokens (Σ prompt_len + answer_len) · vocab_size, model: of the model that made them
    """

    index: np.ndarray
    seed: np.ndarray
    temperature: np.ndarray
    prompt_len: np.ndarray
    answer_len: np.ndarray
    tokens: np.ndarray
    vocab_size: int = 0
    model: str = ""

    @cached_property
    def length(self) -> np.ndarray:
        return self.prompt_len + self.answer_len

    @cached_property
    def start(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.length)[:-1]]) if len(self) else np.zeros(0, np.int64)

    @property
    def num_answer_tokens(self) -> int:
        return int(self.answer_len.sum())

    def __len__(self) -> int:
        return len(self.index)

    def sequence(self, number: int) -> np.ndarray:
        """Prompt and answer of the number-th sequence, (T)."""
        start = int(self.start[number])
        return self.tokens[start : start + int(self.length[number])]

    def answer_counts(self) -> np.ndarray:
        """How often each token is in an answer, (V)."""
        offset = np.arange(len(self.tokens)) - np.repeat(self.start, self.length)
        inside = offset >= np.repeat(self.prompt_len, self.length)
        return np.bincount(self.tokens[inside], minlength=self.vocab_size)


def read_meta(folder: str | Path) -> dict[str, Any] | None:
    """How the folder's shards were made; None if it holds none."""
    path = Path(folder) / META
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise LoadError(f"{path} does not describe answers.")
    return meta


def open_folder(folder: str | Path, meta: dict[str, Any]) -> None:
    """Make the folder, or go on in it. Raises LoadError if it holds something else, or answers of other options."""
    folder, old = Path(folder), read_meta(folder)
    if old is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise LoadError(f"{folder} exists and holds no answers; choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / META, json.dumps(meta, indent=2, sort_keys=True).encode())
        return
    for name in sorted(meta.keys() | old.keys()):
        if meta.get(name) != old.get(name):
            raise LoadError(
                f"{folder} holds answers made with {name} {old.get(name)!r}, asked is {meta.get(name)!r}; "
                "choose another folder, or go on with the same options."
            )


def shard_files(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("answers-*.npz"))


def write_shard(folder: str | Path, rows: Sequence[tuple[int, int, float, Sequence[int], Sequence[int]]]) -> Path:
    """Append a shard of (prompt index, seed, temperature, prompt ids, answer ids); it is complete or absent."""
    files = shard_files(folder)
    number = int(files[-1].stem.split("-")[1]) + 1 if files else 0
    tokens = np.fromiter((token for row in rows for ids in row[3:] for token in ids), np.int64)
    arrays: dict[str, Any] = {
        "index": np.array([row[0] for row in rows], np.int64),
        "seed": np.array([row[1] for row in rows], np.int64),
        "temperature": np.array([row[2] for row in rows], np.float32),
        "prompt_len": np.array([len(row[3]) for row in rows], np.int32),
        "answer_len": np.array([len(row[4]) for row in rows], np.int32),
        "tokens": tokens.astype(np.uint16 if tokens.max(initial=0) < 2**16 else np.uint32),
    }
    path = Path(folder) / f"answers-{number:05d}.npz"
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


def read_shard(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in FIELDS}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise LoadError(f"{path} is damaged: {error}. Delete it; its answers will be made again.") from error
    if len(arrays["tokens"]) != int(arrays["prompt_len"].sum()) + int(arrays["answer_len"].sum()):
        raise LoadError(f"{path} is damaged: the number of its tokens is not the sum of its lengths.")
    return arrays


def read_answers(folder: str | Path) -> Answers:
    """All shards of a folder. Raises LoadError that names the wrong file."""
    meta, files = read_meta(folder), shard_files(folder)
    if meta is None or not files:
        raise LoadError(f"{folder} holds no answers.")
    shards = [read_shard(path) for path in files]
    joined = {name: np.concatenate([shard[name].astype(_wide(name)) for shard in shards]) for name in FIELDS}
    vocab = int(meta.get("vocab_size", 0))
    top = int(joined["tokens"].max(initial=0))
    if top >= vocab:
        raise LoadError(f"{folder} holds token {top}, but its vocabulary ends at {vocab - 1}.")
    return Answers(**joined, vocab_size=vocab, model=str(meta.get("model", "")))


def done_indexes(folder: str | Path) -> set[int]:
    """Indexes of the prompts that have an answer."""
    return {int(index) for path in shard_files(folder) for index in read_shard(path)["index"]}


def _wide(name: str) -> type:
    return np.float32 if name == "temperature" else np.uint32 if name == "tokens" else np.int64


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
