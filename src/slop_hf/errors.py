"""Errors that a user can act on; all of them are `ValueError`s.

Every message says what was wrong, what was expected, what was found and what to do about it, in one or two lines. It
is raised before training or writing begins.
"""


class SlopError(ValueError):
    """Base of all errors that slop-hf raises about its input."""


class DimsError(SlopError):
    """A model structure that transformers could not build, save or reload."""


class ArchitectureError(SlopError):
    """A model family without an axis table."""


class ScheduleError(SlopError):
    """A schedule whose stages do not follow from each other, or a malformed schedule file."""


class PlanError(SlopError):
    """A planning request that no schedule can satisfy."""


class GrowthError(SlopError):
    """An impossible growth: unknown operator or init, shrinking, or dims that do not fit the model."""


class DataError(SlopError):
    """A corpus, tokenizer or cache that cannot be used."""


class RunError(SlopError):
    """A training run that cannot start or resume, or a directory that is not a run."""


class OtherRankError(RunError):
    """The failure of another process of a launch, which gives the reason itself.

    Args:
        rank: rank of the process that failed.
        reason: its error, in one line.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank} failed: {reason}")
        self.rank = rank


class DivergedError(RunError):
    """A run whose loss or gradients are no longer finite."""


class EvaluationError(SlopError):
    """A task or a model that cannot be scored."""


class HubError(SlopError):
    """A read from or write to the Hub that failed: no permission, no network, or unexpected content."""
