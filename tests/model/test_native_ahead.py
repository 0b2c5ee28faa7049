"""Kernels that are made while a model is read."""

from medusa_serve.model import canonical, native_ahead, native_draft, native_products, native_step


def test_all_are_there_once_the_thread_has_ended(monkeypatch):
    shares = [
        canonical.attention_share, native_draft.block_share, native_draft.linear_share, native_products.product_share,
        native_step.children_share, native_step.largest_share,
    ]  # fmt: skip
    for share in shares:
        share.cache_clear()
    native_ahead.kernels_ahead().join()
    assert [share.cache_info().currsize for share in shares] == [1] * len(shares)
    assert all(share() for share in shares)


def test_what_fails_is_told_by_whoever_uses_it(monkeypatch, capfd):
    def broken():
        raise RuntimeError("no kernel")

    monkeypatch.setattr(canonical, "attention_share", broken)
    native_ahead.kernels_ahead().join()
    assert capfd.readouterr().err == ""
