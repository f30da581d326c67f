"""`RetryPolicy`: how often, and how patiently, to repeat what a network may fail at."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .network_errors import find_network_error, find_retry_after, is_transient, is_unreachable, summarise_error

T = TypeVar("T")

logger = logging.getLogger(__name__)
_generator = random.Random()  # the global generator stays as the training seed left it


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with up to 50% jitter, at least as long as the server's Retry-After. Every wait is logged.

    Args:
        attempts: number of attempts in all.
        first_wait: longest wait after the first failure, in seconds; each further one is twice as long.
        longest_wait: upper bound of these waits, in seconds.
        longest_retry_after: upper bound of a Retry-After, in seconds; a longer one is cut to it.
        connect_attempts: number of attempts while no connection can be made at all; None for `attempts`.
    """

    attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_retry_after: float = 300.0
    connect_attempts: int | None = None

    def call(self, action: Callable[[], T], doing: str, *, may_pass: Callable[[Exception], bool] = is_transient) -> T:
        """Call a function until it succeeds, an attempt fails for good, or no attempt is left.

        Args:
            action: function that can be called any number of times.
            doing: description of the action, for the log, such as `uploading stage-1-layer`.
            may_pass: whether an exception may not occur again.

        Raises:
            Exception: the last one that `action` raised.

        >>> failures = iter([ConnectionResetError("reset by peer")])
        >>> def read():
        ...     for failure in failures:
        ...         raise failure
        ...     return "content"
        >>> RetryPolicy(first_wait=0.0).call(read, "reading")
        'content'
        """
        retries = Retries(self, doing)
        while True:
            try:
                return action()
            except Exception as caught:
                if not may_pass(caught) or not retries.wait_after(caught):
                    raise

    def count_attempts(self, caught: BaseException) -> int:
        """Return the number of attempts in all, for an action that failed with an exception."""
        if self.connect_attempts is None or not is_unreachable(caught):
            return self.attempts
        return min(self.attempts, self.connect_attempts)

    def choose_wait(self, failures: int, caught: BaseException) -> float:
        """Return the seconds to wait after a failure.

        Args:
            failures: number of failures in a row, this one included.
            caught: exception of the last one.

        >>> policy = RetryPolicy(first_wait=1.0, longest_wait=5.0)
        >>> 0.5 <= policy.choose_wait(1, ConnectionResetError()) <= 1.0
        True
        >>> 2.5 <= policy.choose_wait(9, ConnectionResetError()) <= 5.0
        True
        """
        wait = min(self.first_wait * 2 ** (failures - 1), self.longest_wait) * _generator.uniform(0.5, 1)
        return max(wait, min(find_retry_after(caught), self.longest_retry_after))


class Retries:
    """The failures in a row of one action, for callers that make progress between them, such as a stream.

    Args:
        policy: how often to repeat the action.
        doing: description of the action, for the log; without secrets.
    """

    def __init__(self, policy: RetryPolicy, doing: str) -> None:
        self.policy, self.doing = policy, doing
        self.failures = 0

    def reset(self) -> None:
        """Count from zero again: the action has made progress."""
        self.failures = 0

    def wait_after(self, caught: BaseException) -> bool:
        """Count a failure, log it and wait; return False at once if it was the last attempt."""
        caught = find_network_error(caught) or caught
        self.failures += 1
        attempts = self.policy.count_attempts(caught)
        if self.failures >= attempts:
            return False
        seconds = self.policy.choose_wait(self.failures, caught)
        logger.warning(
            "%s: %s; attempt %d of %d in %.1f s",
            self.doing,
            summarise_error(caught),
            self.failures + 1,
            attempts,
            seconds,
        )
        time.sleep(seconds)
        return True
