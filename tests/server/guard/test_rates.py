"""Amounts within sliding windows."""

from medusa_serve.server.guard.rates import Window

from ...fakes import ManualClock


def test_a_window_slides() -> None:
    clock = ManualClock()
    window = Window(3, 60.0, clock)
    for _ in range(3):
        assert window.wait("a") == 0
        window.add("a")
        clock.advance(10)
    assert (window.wait("a"), window.wait("b")) == (30, 0)
    clock.advance(30)
    assert window.wait("a") == 0
    window.add("a", 5)  # more than there is room for counts too
    assert window.wait("a") == 60
    clock.advance(60)
    assert window.wait("a") == 0
    assert not window._events
    assert not window._sums
