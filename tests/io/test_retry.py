"""Repeating what a network fails at: how often, how long, and what the log says."""

from __future__ import annotations

import errno
import logging
from types import SimpleNamespace

import pytest

from slop_hf.io.retry import Retries, RetryPolicy

AT_ONCE = RetryPolicy(attempts=3, first_wait=0.0)


def fails(times: int, error: Exception):
    """An action that raises an error a number of times, and then returns the number of calls."""
    calls = []

    def action() -> int:
        calls.append(None)
        if len(calls) <= times:
            raise error
        return len(calls)

    return action


def test_an_action_is_repeated_until_it_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert AT_ONCE.call(fails(2, ConnectionResetError("reset by peer")), "reading text") == 3
    waits = [record.getMessage() for record in caplog.records]
    assert waits == [
        "reading text: reset by peer; attempt 2 of 3 in 0.0 s",
        "reading text: reset by peer; attempt 3 of 3 in 0.0 s",
    ]


def test_the_last_failure_is_raised() -> None:
    with pytest.raises(ConnectionResetError, match="again"):
        AT_ONCE.call(fails(3, ConnectionResetError("again")), "reading")


def test_a_failure_for_good_is_raised_at_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FileNotFoundError):
        AT_ONCE.call(fails(1, FileNotFoundError()), "reading")
    assert not caplog.records


def test_progress_counts_from_zero_again() -> None:
    retries = Retries(AT_ONCE, "reading")
    assert [retries.wait_after(ConnectionResetError()) for _ in range(3)] == [True, True, False]
    retries.reset()
    assert retries.wait_after(ConnectionResetError())


@pytest.mark.parametrize(
    ("asked", "least", "most"), [("20", 20, 20), ("86400", 300, 300), ("-5", 0, 1), ("soon", 0, 1)]
)
def test_retry_after_is_obeyed_up_to_a_bound(asked: str, least: float, most: float) -> None:
    caught = OSError()
    caught.response = SimpleNamespace(headers={"Retry-After": asked}, status_code=429)  # type: ignore[attr-defined]
    assert least <= RetryPolicy(first_wait=1.0).choose_wait(1, caught) <= most


@pytest.mark.parametrize(
    ("error", "attempts"),
    [(ConnectionRefusedError(), 2), (OSError(errno.ENETUNREACH, "no network"), 2), (ConnectionResetError(), 3)],
)
def test_a_host_that_cannot_be_reached_is_tried_less_often(error: Exception, attempts: int) -> None:
    retries = Retries(RetryPolicy(attempts=3, first_wait=0.0, connect_attempts=2), "reading")
    assert [retries.wait_after(error) for _ in range(attempts)] == [True] * (attempts - 1) + [False]


def test_the_failure_behind_an_exception_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    wrapped = FileNotFoundError("not in the cache")
    wrapped.__cause__ = ConnectionResetError("reset by peer")
    Retries(AT_ONCE, "reading").wait_after(wrapped)
    assert "reading: reset by peer" in caplog.text


def test_a_used_up_limit_of_the_hub_is_waited_for() -> None:
    caught = OSError()
    headers = {"RateLimit": '"api";r=0;t=55'}
    caught.response = SimpleNamespace(headers=headers, status_code=429)  # type: ignore[attr-defined]
    assert RetryPolicy(first_wait=1.0).choose_wait(1, caught) == 55
