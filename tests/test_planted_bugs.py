"""Negative controls: each oracle of the server's tests sees the bugs planted for it, and nothing while there are none.

Those of exactness are in test_faults.py (a wrong mask bit, a position off by one, a skipped commit, reused noise, a
leaked slot), those of the load bench in campaigns/test_load.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from medusa_serve.engine import in_flight as flights
from medusa_serve.engine import row_retry as isolate
from medusa_serve.engine import sequence as sequence_module
from medusa_serve.engine.batch_manager import BatchManager
from medusa_serve.engine.deliveries import Deliveries
from medusa_serve.engine.metrics import Metrics
from medusa_serve.engine.scheduler import Scheduler
from medusa_serve.errors import InvalidRequest
from medusa_serve.server import events as answer_events
from medusa_serve.server.config import ServerConfig
from medusa_serve.server.guard import error_replies as failures
from medusa_serve.server.guard import keys as auth
from medusa_serve.server.guard.hosts import Hosts
from medusa_serve.server.guard.keys import KeyGuard

from .engine.test_machine import run as run_machine
from .server.corpus import CHAT, OWN, TEXT, cases
from .server.standins import HandLLM, ask
from .server.test_corpus import send, streamed

Plant = Callable[[pytest.MonkeyPatch], None]

# ---- in the engine: the state machine ------------------------------------------------------------------------------


def a_cancel_is_swallowed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BatchManager, "cancel", lambda self, id, outcome="cancelled": None)


def the_last_word_comes_twice(patch: pytest.MonkeyPatch) -> None:
    put = Deliveries.put

    def twice(self: Deliveries, seq: Any, delta: Any) -> None:
        put(self, seq, delta)
        if delta.is_last:
            put(self, seq, delta)

    patch.setattr(Deliveries, "put", twice)


def the_last_word_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    put = Deliveries.put
    patch.setattr(Deliveries, "put", lambda self, seq, delta: None if delta.error else put(self, seq, delta))


def two_sequences_get_each_others_text(patch: pytest.MonkeyPatch) -> None:
    put = Deliveries.put
    kept: dict[int, Any] = {}

    def swapped(self: Deliveries, seq: Any, delta: Any) -> None:
        if delta.is_last or not delta.token_ids:
            return put(self, seq, delta)
        before = kept.get(id(self))
        kept[id(self)] = delta
        return put(self, seq, before or delta)

    patch.setattr(Deliveries, "put", swapped)


def an_outcome_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    ended = Metrics.ended
    patch.setattr(Metrics, "ended", lambda self, outcome: None if outcome == "error" else ended(self, outcome))


def a_failed_sequence_keeps_its_slot(patch: pytest.MonkeyPatch) -> None:
    release = Scheduler.release

    def kept(self: Scheduler, seq: Any, *, failed: bool = False) -> None:
        slot = seq.slot
        release(self, seq, failed=failed)
        if failed and slot is not None:
            self._free.discard(slot)

    patch.setattr(Scheduler, "release", kept)


def one_bad_row_fails_them_all(patch: pytest.MonkeyPatch) -> None:
    def together(call: Any, alone: Any, rows: Any) -> Any:
        try:
            started = call(rows)
        except Exception as error:
            failed = [isolate.RowFailed(type(error).__name__) for _ in rows]
            return lambda: failed, False
        return lambda: list(started.outputs()), True

    patch.setattr(flights, "start_rows", together)


def it_is_taken_while_it_drains(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("medusa_serve.engine.batch_manager.refuse_unless_ok", lambda status: None)


def an_accepted_run_goes_beyond_the_limit(patch: pytest.MonkeyPatch) -> None:
    limit = sequence_module.token_limit
    patch.setattr("medusa_serve.engine.batch_manager.token_limit", lambda *args, **options: limit(*args, **options) + 1)


ENGINE = (
    *(a_cancel_is_swallowed, the_last_word_comes_twice, the_last_word_is_forgotten, two_sequences_get_each_others_text),
    *(an_outcome_is_not_counted, a_failed_sequence_keeps_its_slot, one_bad_row_fails_them_all),
    *(it_is_taken_while_it_drains, an_accepted_run_goes_beyond_the_limit),
)


@pytest.mark.parametrize("plant", ENGINE)
def test_the_state_machine_sees(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(BaseException) as seen:  # noqa: PT011 (whichever of its checks comes first)
        run_machine(40, 40, shrink=False)
    assert not isinstance(seen.value, KeyboardInterrupt | SystemExit)


# ---- in the server: the corpus ---------------------------------------------------------------------------------------


def an_error_quotes_the_input(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(failures, "explain", lambda errors: InvalidRequest(f"Bad: {errors[0].get('input')!r}."))


def a_refusal_is_422(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(InvalidRequest, "status", 422)


def numbers_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("medusa_serve.types.Number.check", lambda *args: None)


def an_unsupported_field_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("medusa_serve.server.api.openai_schemas.refuse", lambda body, neutral: None)


def a_stream_has_no_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(answer_events, "DONE", b"")


SERVER = (
    *((an_error_quotes_the_input, OWN), (a_refusal_is_422, TEXT), (numbers_are_not_looked_at, OWN)),
    *((an_unsupported_field_is_ignored, CHAT), (a_stream_has_no_end, TEXT)),
)


@pytest.mark.parametrize(("plant", "endpoint"), SERVER)
def test_the_corpus_sees(plant: Plant, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cases(endpoint)[::4]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        send(endpoint, [*plain, *filter(None, map(streamed, plain[::8]))])


# ---- at the door: keys and hosts -------------------------------------------------------------------------------------


def a_path_is_open_by_its_ending(patch: pytest.MonkeyPatch) -> None:
    class Loose(frozenset):  # type: ignore[type-arg]
        def __contains__(self, asked: object) -> bool:
            return isinstance(asked, tuple) and str(asked[1]).endswith(("health", "s"))

    patch.setattr(auth, "OPEN", Loose())


def the_key_is_compared_without_its_case(patch: pytest.MonkeyPatch) -> None:
    presented = auth.presented_key
    patch.setattr(auth, "presented_key", lambda headers: (presented(headers) or b"").lower())


def any_host_is_ours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Hosts, "__contains__", lambda self, name: True)


def the_door() -> list[int]:
    """Statuses of requests that must not come in."""
    config = ServerConfig(api_key="key")
    wrong = {"json": {"prompt": "a"}, "headers": {"x-api-key": "KEY"}}
    evil = {"json": {"prompt": "a"}, "headers": {"x-api-key": "key", "host": "evil.example"}}
    models = {"method": "GET", "url": "/v1/models"}
    return [reply.status_code for reply in ask(HandLLM(), wrong, evil, models, config=config)]


@pytest.mark.parametrize(
    "plant", [a_path_is_open_by_its_ending, the_key_is_compared_without_its_case, any_host_is_ours]
)
def test_the_door_s_tests_see(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert KeyGuard.__module__ == auth.__name__
    assert the_door() == [401, 400, 401]
    plant(monkeypatch)
    assert the_door() != [401, 400, 401]
