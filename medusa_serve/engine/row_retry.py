"""One row's failure is no other row's failure: a runner call that raises is repeated row by row."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeVar

from ..errors import GenerationFailed, MedusaServeError, OutOfMemory
from ..types import StartedPass
from .health import is_out_of_memory, is_sticky
from .quiet_log import QuietLogger

log = QuietLogger(__name__)

Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RowFailed:
    """The row fails also when it runs alone. `reason` is the name of the exception: its text may hold private data."""

    reason: str
    out_of_memory: bool = False

    def error(self) -> MedusaServeError:
        """The error that ends its sequence."""
        if self.out_of_memory:
            return OutOfMemory("The device has too little memory for this sequence now; a shorter one may fit.")
        return GenerationFailed(f"The model failed on this sequence ({self.reason}).")


def start_rows(
    call: Callable[[Seq[Row]], StartedPass[Result]], alone: Callable[[Seq[Row]], StartedPass[Result]], rows: Seq[Row]
) -> tuple[Callable[[], list[Result | RowFailed]], bool]:
    """Start a pass. Returns a function that gives one result per row, and whether `call(rows)` succeeded.

    When it raises, `alone([row])` is run to its end for each row. An error that every later call would meet too is
    raised.

    The runner promises that a call that raises leaves every sequence as it was. Exceptions are dropped before the next
    try, because their tracebacks would keep device memory alive when it may be short. Reading the results raises
    RuntimeError when the runner returns another number of results than rows.
    """
    try:
        started = call(rows)
    except Exception as error:
        if is_sticky(error):
            raise
        log.debug("A call of the runner failed; its rows run alone.", exc_info=True)
    else:
        return lambda: list(_checked(started.outputs(), len(rows))), True
    outputs: list[Result | RowFailed] = []
    for row in rows:
        try:
            results = alone([row]).outputs()
        except Exception as error:
            if is_sticky(error):
                raise
            log.warning("A row fails alone too: %r", row, exc_info=True)
            outputs.append(RowFailed(type(error).__name__, is_out_of_memory(error)))
        else:
            outputs.append(_checked(results, 1)[0])
    return lambda: outputs, False


def _checked(results: Seq[Result], expected: int) -> Seq[Result]:
    if len(results) != expected:
        raise RuntimeError(f"The runner gave {len(results)} results for {expected} rows.")
    return results
