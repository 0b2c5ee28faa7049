"""Prompt files in and out of shape, and the split.

pytest tests/training/test_prompts.py
"""

import gzip
import hashlib
import json
import lzma
import sys

import pytest

from medusa_serve.errors import LoadError
from medusa_serve.training.prompts import Prompt, is_held_out, near_duplicates, read_prompts, split


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\n  \nzwei ä\n".encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.txt")] == ["one", "zwei ä"]


@pytest.mark.parametrize(("name", "opener"), [("p.jsonl", open), ("p.jsonl.gz", gzip.open), ("p.jsonl.xz", lzma.open)])
def test_jsonl_packed_or_not(tmp_path, name, opener):
    rows = [{"prompt": "a\nb", "category": "qa", "source": "s"}, {"prompt": "c"}]
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_prompts(tmp_path / name) == [Prompt("a\nb", "s", "qa"), Prompt("c")]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.txt", b"", "holds no prompts"),
        ("blank.txt", b" \n\n", "holds no prompts"),
        ("latin.txt", "caf\xe9\n".encode("latin-1"), "not UTF-8"),
        ("latin.jsonl", b'{"prompt": "caf\xe9"}', "not UTF-8"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt":', "line 2: not JSON"),
        ("list.jsonl", b"[1]", "line 1: not an object"),
        ("field.jsonl", b'{"text": "a"}', "line 1: not an object"),
        ("cut.xz", lzma.compress(b"hello " * 99)[:40], "cannot be read"),
        ("no.gz", b"hello", "cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(LoadError, match=says) as caught:
        read_prompts(tmp_path / name)
    assert name in caught.value.message


def test_no_file_no_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LoadError, match="There is no file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(LoadError, match="pip install datasets"):
        read_prompts("someone/some-prompts")
    with pytest.raises(LoadError, match="is a folder"):
        read_prompts(tmp_path)


def prompts(count):
    return [Prompt(f"Tell me about the number {i * 7919 % 100003}.", category="ab"[i % 2]) for i in range(count)]


def test_the_split_is_the_hash_and_nothing_else():
    all_prompts = prompts(4000)
    training, evaluation = split(all_prompts, per_category=5)
    for prompt in training:
        assert int(hashlib.sha256(prompt.text.encode()).hexdigest(), 16) % 100
    assert all(is_held_out(prompt.text) for prompt in evaluation)
    assert [prompt.category for prompt in evaluation] == ["a"] * 5 + ["b"] * 5
    assert len(training) == sum(not is_held_out(prompt.text) for prompt in all_prompts)
    again = split(all_prompts[::-1], per_category=5)
    assert again[1] == evaluation
    assert set(again[0]) == set(training)


def test_near_duplicates():
    text = "the quick brown fox jumps over the lazy dog and runs far away into the deep dark forest"
    task = "In this task you are given a sentence and must say which of the two words fits it better: "
    texts = [text, text.upper() + "!", "something of its own that nobody else has ever asked in these very words",
             task + "the cat sat on one of the two mats in the hall today", "how big is the sun", "sun"]  # fmt: skip
    others = [text + " where it sleeps", "How big is the Sun?"] + [f"{task} case {i} {i} {i}" for i in range(30)]
    assert near_duplicates(texts, others) == {0, 1, 4}
    assert near_duplicates(texts, []) == set()
