"""Kernels that are made while a model is read."""

import sys

import pytest

from medusa_serve.model.cpu import (
    attention as canonical,
)
from medusa_serve.model.cpu import (
    draft as native_draft,
)
from medusa_serve.model.cpu import (
    int_products as native_products,
)
from medusa_serve.model.cpu import (
    search as native_step,
)
from medusa_serve.model.cpu import (
    tape as native_tape,
)
from medusa_serve.model.cpu import (
    warm_up as native_ahead,
)


def test_all_are_there_once_the_thread_has_ended(monkeypatch):
    shares = [
        canonical.attention_share, native_draft.block_share, native_draft.linear_share, native_products.product_share,
        native_step.children_share, native_step.largest_share, native_tape.tape_share,
    ]  # fmt: skip
    for share in shares:
        share.cache_clear()
    native_ahead.kernels_ahead().join()
    assert [share.cache_info().currsize for share in shares] == [1] * len(shares)
    assert all(share() for share in shares)


@pytest.mark.parametrize(("program", "ended"), [(sys.executable, [0]), ("/no/python", [None])])
def test_half_of_them_are_made_apart_where_none_is_found(program, ended, monkeypatch):
    apart, start = [], native_ahead._apart
    monkeypatch.setattr(native_ahead, "FOUND_S", 0.0)
    monkeypatch.setattr(native_ahead, "_apart", lambda: apart.append(start()) or apart[-1])
    monkeypatch.setattr(sys, "executable", program)
    shares = canonical.attention_share, native_tape.tape_share
    for share in shares:
        share.cache_clear()
    native_ahead.kernels_ahead().join()
    assert [process and process.returncode for process in apart] == ended
    assert [share.cache_info().currsize for share in shares] == [1, 1]


def test_what_fails_is_told_by_whoever_uses_it(monkeypatch, capfd):
    def broken():
        raise RuntimeError("no kernel")

    monkeypatch.setattr(canonical, "attention_share", broken)
    native_ahead.kernels_ahead().join()
    assert capfd.readouterr().err == ""
