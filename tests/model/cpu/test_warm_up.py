"""Kernels that are made while a model is read."""

import sys

import pytest

from medusa_serve.model.cpu import attention, draft, int_products, search, tape, warm_up


def test_all_are_there_once_the_thread_has_ended(monkeypatch):
    functions = [
        attention.attention_function, draft.block_function, draft.linear_function,
        int_products.product_function, search.children_function, search.largest_function,
        tape.tape_function,
    ]  # fmt: skip
    for function in functions:
        function.cache_clear()
    warm_up.kernels_ahead().join()
    assert [function.cache_info().currsize for function in functions] == [1] * len(functions)
    assert all(function() for function in functions)


@pytest.mark.parametrize(("program", "ended"), [(sys.executable, [0]), ("/no/python", [None])])
def test_half_of_them_are_made_apart_where_none_is_found(program, ended, monkeypatch):
    processes, start = [], warm_up._second_process
    monkeypatch.setattr(warm_up, "FOUND_S", 0.0)
    monkeypatch.setattr(warm_up, "_second_process", lambda: processes.append(start()) or processes[-1])
    monkeypatch.setattr(sys, "executable", program)
    functions = attention.attention_function, tape.tape_function
    for function in functions:
        function.cache_clear()
    warm_up.kernels_ahead().join()
    assert [process and process.returncode for process in processes] == ended
    assert [function.cache_info().currsize for function in functions] == [1, 1]


def test_what_fails_is_told_by_whoever_uses_it(monkeypatch, capfd):
    def broken():
        raise RuntimeError("no kernel")

    monkeypatch.setattr(attention, "attention_function", broken)
    warm_up.kernels_ahead().join()
    assert capfd.readouterr().err == ""
