"""One row's failure is nobody else's: a call of the runner that raises is repeated row by row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeVar

log = logging.getLogger(__name__)

Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RowFailed:
    """The row fails also when it is alone. `reason` is the name of the exception; its text may hold anything."""

    reason: str


def run_rows(
    call: Callable[[Seq[Row]], list[Result]], alone: Callable[[Seq[Row]], list[Result]], rows: Seq[Row]
) -> tuple[list[Result | RowFailed], bool]:
    """One result a row, and whether `call(rows)` succeeded. When it raises, `alone([row])` is tried for each row.

    Relies on the runner's promise that a call that raises leaves every sequence as it was. Exceptions are dropped
    before the next try: their tracebacks would keep device memory alive just when it may be short.
    Raises RuntimeError when the runner gives another number of results than rows.
    """
    try:
        results = call(rows)
    except Exception:
        log.debug("A call of the runner failed; its rows run alone.", exc_info=True)
    else:
        return list(_checked(results, len(rows))), True
    outputs: list[Result | RowFailed] = []
    for row in rows:
        try:
            results = alone([row])
        except Exception as error:
            log.warning("A row fails alone too: %r", row, exc_info=True)
            outputs.append(RowFailed(type(error).__name__))
        else:
            outputs.append(_checked(results, 1)[0])
    return outputs, False


def _checked(results: Seq[Result], expected: int) -> Seq[Result]:
    if len(results) != expected:
        raise RuntimeError(f"The runner gave {len(results)} results for {expected} rows.")
    return results
