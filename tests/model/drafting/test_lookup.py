import pytest
import torch

from medusa_serve.model.drafting.lookup import lookup


def run(history: list[int], num_tokens: int = 3, columns: int = 24) -> list[int]:
    row = torch.full((1, columns), 999)
    row[0, : len(history)] = torch.tensor(history)
    return lookup(row, torch.tensor([len(history) - 1]), num_tokens)[0].tolist()


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([5, 6, 7, 8, 5, 6], [7, 8, 5]),  # the docstring's example
        ([5, 6, 7], [-1, -1, -1]),  # nothing stood twice
        ([6, 7, 8, 5, 6], [-1, -1, -1]),  # one token is no n-gram
        ([1, 2, 3, 9, 8, 2, 3, 7, 7, 1, 2, 3], [9, 8, 2]),  # the longer match wins over the later one
        ([2, 3, 4, 2, 3, 5, 2, 3], [5, 2, 3]),  # the later one among equals
        ([1, 1, 1, 1], [1, -1, -1]),  # an overlapping match: only tokens that exist are drafted
        ([4], [-1, -1, -1]),
    ],
)
def test_the_continuation_of_the_longest_then_latest_match(history, expected):
    assert run(history) == expected


def test_columns_behind_the_sequence_are_never_read():
    """What a former owner of the slot left behind must not become a draft."""
    row = torch.tensor([[1, 2, 3, 1, 2, 9, 9, 1, 2, 3, 1, 2]])
    assert lookup(row, torch.tensor([1]), 3).tolist() == [[-1, -1, -1]]
    assert lookup(row, torch.tensor([4]), 3).tolist() == [[3, 1, 2]]


def test_rows_are_independent():
    rows = torch.tensor([[5, 6, 7, 5, 6, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert lookup(rows, torch.tensor([4, 7]), 2).tolist() == [[7, 5], [-1, -1]]


def test_it_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        length = int(torch.randint(1, 30, (), generator=generator))
        tokens = torch.randint(0, 3, (length,), generator=generator).tolist()
        assert run(tokens, 4, 32) == slow(tokens, 4)


def slow(tokens: list[int], count: int) -> list[int]:
    for size in (4, 3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == tokens[-size:]:
                found = tokens[end : end + count]
                return found + [-1] * (count - len(found))
    return [-1] * count
