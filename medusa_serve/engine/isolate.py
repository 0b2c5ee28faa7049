"""One row's failure is nobody else's: a call of the runner that raises is repeated row by row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeVar

from ..types import Started

log = logging.getLogger(__name__)

Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RowFailed:
    """The row fails also when it is alone. `reason` is the name of the exception; its text may hold anything."""

    reason: str


def start_rows(
    call: Callable[[Seq[Row]], Started[Result]], alone: Callable[[Seq[Row]], Started[Result]], rows: Seq[Row]
) -> tuple[Callable[[], list[Result | RowFailed]], bool]:
    """Start a pass: (what gives one result a row, whether `call(rows)` succeeded). When it raises, `alone([row])` is
    run to its end for each row.

    Relies on the runner's promise that a call that raises leaves every sequence as it was. Exceptions are dropped
    before the next try: their tracebacks would keep device memory alive just when it may be short. The results raise
    RuntimeError when the runner gives another number of them than rows.
    """
    try:
        started = call(rows)
    except Exception:
        log.debug("A call of the runner failed; its rows run alone.", exc_info=True)
    else:
        return lambda: list(_checked(started.outputs(), len(rows))), True
    outputs: list[Result | RowFailed] = []
    for row in rows:
        try:
            results = alone([row]).outputs()
        except Exception as error:
            log.warning("A row fails alone too: %r", row, exc_info=True)
            outputs.append(RowFailed(type(error).__name__))
        else:
            outputs.append(_checked(results, 1)[0])
    return lambda: outputs, False


def _checked(results: Seq[Result], expected: int) -> Seq[Result]:
    if len(results) != expected:
        raise RuntimeError(f"The runner gave {len(results)} results for {expected} rows.")
    return results
