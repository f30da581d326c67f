"""`RunSettings`: settings of a run that may change when it is resumed, and the steps from which they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import RunError
from ..io.record import Record
from ..io.serialization import Json
from .directory import RunFile
from .records import INCOMPLETE


@dataclass(frozen=True)
class SettingsChange(Record, error=RunError, if_missing=INCOMPLETE):
    """Settings that hold from a step on, until a later change.

    Args:
        step: number of global steps done before they hold.
        settings: the changed settings by name; the first change of a run has all of them.
    """

    step: int
    settings: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSettings(RunFile, error=RunError, if_missing=INCOMPLETE):
    """The changes of a run's settings, in the order of their steps. Stored as `settings.json`.

    A run that an earlier release began has changes only from the step at which it was resumed.
    """

    file_name = "settings.json"

    changes: tuple[SettingsChange, ...] = ()

    def before(self, step: int) -> dict[str, Json]:
        """Return the settings that held for the last step before a step; empty if they are not known.

        >>> changes = SettingsChange(0, {"learning_rate": 1e-3}), SettingsChange(8, {"learning_rate": 1e-4})
        >>> RunSettings(changes).before(8), RunSettings(changes).before(9)
        ({'learning_rate': 0.001}, {'learning_rate': 0.0001})
        """
        settings: dict[str, Json] = {}
        for change in self.changes:
            if change.step < step:
                settings |= change.settings
        return settings

    def resume(self, step: int, settings: Mapping[str, Json]) -> RunSettings:
        """Return the settings of the run if it continues at a step; later steps are trained again, or never were."""
        before = self.before(step)
        changed = {name: value for name, value in settings.items() if name not in before or before[name] != value}
        kept = tuple(change for change in self.changes if change.step < step)
        return RunSettings((*kept, SettingsChange(step, changed)) if changed else kept)
