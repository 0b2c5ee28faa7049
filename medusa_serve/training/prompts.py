"""Prompts from a file or a `datasets` id, and the fixed split into training and evaluation."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import LoadError

HELD_OUT_OF = 100  # one prompt of 100, chosen by its hash, never trains
PER_CATEGORY = 25
SHINGLE = 8  # words; two texts do not share 8 words in a row by chance
COMMON = 20  # a run of words in more training prompts than this belongs to a template


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    source: str = ""
    category: str = ""


def read_prompts(source: str | Path) -> list[Prompt]:
    """All prompts of a file or a `datasets` id, in order; empty ones are left out. Raises LoadError naming the source.

    A file holds one prompt a line. A .jsonl or .json file holds objects with `prompt` and perhaps `source` and
    `category`. .gz and .xz are unpacked. If there is no such file, the source is an id for the library `datasets`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise LoadError(f"{source} is a folder; prompts are a text file, a .jsonl file or a datasets id.")
    if path.is_file():
        prompts = _read_file(path)
    elif path.suffix in (".txt", ".jsonl", ".json", ".gz", ".xz") or path.is_absolute():
        raise LoadError(f"There is no file {source}.")
    else:
        prompts = _read_dataset(str(source))
    prompts = [prompt for prompt in prompts if prompt.text.strip()]
    if not prompts:
        raise LoadError(f"{source} holds no prompts.")
    return prompts


def _read_file(path: Path) -> list[Prompt]:
    packed = path.suffix in (".gz", ".xz")
    kind = Path(path.stem).suffix if packed else path.suffix
    try:
        with _open(path) as lines:
            if kind in (".jsonl", ".json"):
                return [_parse(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
            return [Prompt(line.rstrip("\r\n")) for line in lines]
    except UnicodeDecodeError as error:
        raise LoadError(f"{path} is not UTF-8 text (byte {error.start} of a block: {error.reason}).") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise LoadError(f"{path} cannot be read: {error}.") from error


def _open(path: Path) -> IO[str]:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    # utf-8-sig: some editors write a byte order mark, which is not part of the first prompt
    lines: IO[str] = openers.get(path.suffix, open)(path, "rt", encoding="utf-8-sig")
    return lines


def _parse(line: str, path: Path, number: int) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise LoadError(f"{path}, line {number}: not JSON ({error.msg}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise LoadError(f'{path}, line {number}: not an object with a text "prompt".')
    return Prompt(record["prompt"], str(record.get("source", "")), str(record.get("category", "")))


def _read_dataset(name: str) -> list[Prompt]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LoadError(
            f"There is no file {name}, and reading it as a data set's id needs `pip install datasets`."
        ) from error
    try:
        rows: Iterable[Any] = load_dataset(name, split="train")
    except Exception as error:  # the library and the hub's client raise errors of many types
        raise LoadError(f"The data set {name} cannot be read: {type(error).__name__}: {error}") from error
    return list(_dataset_prompts(rows, name))


def _dataset_prompts(rows: Iterable[Any], name: str) -> Iterator[Prompt]:
    for row in rows:
        text = next((row[key] for key in ("prompt", "instruction", "question") if isinstance(row.get(key), str)), None)
        if text is None:
            raise LoadError(f"The data set {name} has no text column prompt, instruction or question.")
        yield Prompt(text, name, str(row.get("category", "")))


def is_held_out(text: str) -> bool:
    """Whether this prompt belongs to the evaluation: sha256 of its UTF-8 bytes mod 100 is 0."""
    return int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), 16) % HELD_OUT_OF == 0


def split(prompts: Sequence[Prompt], per_category: int = PER_CATEGORY) -> tuple[list[Prompt], list[Prompt]]:
    """(training, evaluation). It depends on the prompts' texts, never on their order.

    Near-duplicates of a training prompt are in neither, nor are held-out prompts after `per_category` (by hash).
    """
    training = [prompt for prompt in prompts if not is_held_out(prompt.text)]
    held = list({prompt.text: prompt for prompt in prompts if is_held_out(prompt.text)}.values())
    held.sort(
        key=lambda prompt: (prompt.category, hashlib.sha256(prompt.text.encode("utf-8", "surrogatepass")).digest())
    )
    doubles = near_duplicates([prompt.text for prompt in held], (prompt.text for prompt in training))
    count: dict[str, int] = {}
    evaluation = []
    for index, prompt in enumerate(held):
        if index not in doubles and count.get(prompt.category, 0) < per_category:
            count[prompt.category] = count.get(prompt.category, 0) + 1
            evaluation.append(prompt)
    return training, evaluation


def near_duplicates(texts: Sequence[str], others: Iterable[str]) -> set[int]:
    """Indexes of the texts that one of `others` nearly repeats: it has the same set of words, or more than half of a
    text's runs of 8 words are in `others`. Runs in more than 20 of them are a template's text (a task's instructions)
    and do not count, unless a text has no other runs."""
    own = [shingles(words(text)) for text in texts]
    bags: dict[frozenset[str], list[int]] = {}
    for index, text in enumerate(texts):
        bags.setdefault(frozenset(words(text)), []).append(index)
    seen = dict.fromkeys((shingle for one in own for shingle in one), 0)
    found: set[int] = set()
    for other in others:
        other_words = words(other)
        found.update(bags.get(frozenset(other_words), ()))
        for shingle in shingles(other_words):
            if shingle in seen:
                seen[shingle] += 1
    for index, one in enumerate(own):
        rare = [shingle for shingle in one if seen[shingle] <= COMMON]
        shared = sum(seen[shingle] > 0 for shingle in rare)
        if one and 2 * shared > len(rare) or (one and not rare):
            found.add(index)
    return found


def words(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation and spacing do not count."""
    return re.findall(r"\w+", text.lower())


def shingles(of: Sequence[str]) -> set[tuple[str, ...]]:
    """All runs of 8 words; none for a shorter text."""
    return {tuple(of[start : start + SHINGLE]) for start in range(len(of) - SHINGLE + 1)}
