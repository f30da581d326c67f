"""Errors that a user can act on.

Every message says what was wrong, what was expected, what was found and what to do about it, in one
or two lines, and is raised before training or writing begins. All of them are `ValueError`s.
"""


class SlopError(ValueError):
    """Base of every error that slop-hf raises about its input."""


class DimsError(SlopError):
    """A model structure that transformers could not build, save or reload."""


class ArchitectureError(SlopError):
    """A model family without an axis table."""


class ScheduleError(SlopError):
    """A schedule whose stages do not follow one another, or a malformed schedule file."""


class PlanError(SlopError):
    """A planning request that no schedule can satisfy."""


class GrowthError(SlopError):
    """A growth that cannot be done: unknown operator or init, shrinking, misfit of model and dims."""


class DataError(SlopError):
    """A corpus, tokenizer or cache that cannot be used."""


class RunError(SlopError):
    """A training run that cannot start or resume, or a run directory that is not one."""


class DivergedError(RunError):
    """A run whose loss or gradients are not finite any more."""


class EvaluationError(SlopError):
    """A task or a model that cannot be scored."""


class HubError(SlopError):
    """Something on the Hub that cannot be read or written: no permission, no network, other content than expected."""
