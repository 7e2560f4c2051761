"""What users know a step and a governor by: on events it stands beside the governor's own count."""

from __future__ import annotations

import dataclasses

import numpy as np

from tolaria.telemetry.events import GovernorEvent, RollbackEvent

Tag = int | str

_MOST = 4096
"""Tags that are kept: a CUDA device tells of a step long before the host is so many ahead."""


def as_tag(tag: object) -> Tag:
    """``tag`` as an event holds it.

    Raises:
        TypeError: it is neither a whole number nor a string (a tensor would have to be waited for).
    """
    if isinstance(tag, str):
        return tag
    if isinstance(tag, bool) or not isinstance(tag, int | np.integer):
        raise TypeError(f"tag: expected an int or a str, got {type(tag).__name__}")
    return int(tag)


def check_name(name: str | None) -> None:
    """A governor's name.

    Raises:
        TypeError: it is neither a string nor None.
        ValueError: it is empty.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name: expected a str or None, got {type(name).__name__}")
    if name == "":
        raise ValueError("name: expected a name of at least one character, or None, got ''")


class Labels:
    """The name of a governor, and the tags of its last steps.

    The device tells step numbers; the tags stay on the host.
    """

    def __init__(self, name: str | None = None) -> None:
        check_name(name)
        self.name = name
        self._tags: dict[int, Tag] = {}

    def note(self, step: int, tag: Tag) -> None:
        """Step ``step`` is the caller's ``tag``."""
        self._tags.pop(step, None)
        self._tags[step] = tag
        if len(self._tags) > _MOST:
            del self._tags[next(iter(self._tags))]

    def forget(self, step: int | None = None) -> None:
        """Step ``step`` has no tag, after all; None: no step has."""
        if step is None:
            self._tags.clear()
        else:
            self._tags.pop(step, None)

    def on(self, event: GovernorEvent) -> GovernorEvent:
        """``event``, labelled."""
        tag = self._tags.get(event.step) if event.tag is None else event.tag
        if (tag, self.name) == (event.tag, event.governor):
            return event
        if isinstance(event, RollbackEvent):
            report = dataclasses.replace(event.report, tag=tag)
            return dataclasses.replace(event, tag=tag, governor=self.name, report=report)
        return dataclasses.replace(event, tag=tag, governor=self.name)
