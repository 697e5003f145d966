"""What a tracker is told, and several of them as one."""

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

log = logging.getLogger(__name__)

Metrics = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
#: Makes a picture (PNG), or None where there is nothing to see. Called only by who keeps it.
Draw = Callable[[], bytes | None]


@dataclass(frozen=True)
class Artifact:
    """Something that a stage left in storage, and what it was made from."""

    name: str
    """For example "supernet" or "export-0.15"."""
    kind: str
    """What it is: "supernet", "subnet", "export" and so on."""
    uri: str
    """The folder that it lies in."""
    files: Metrics = field(default_factory=dict)
    """Names of its files in that folder -> sha256 of their content."""
    made_from: tuple["Artifact", ...] = ()
    """The artifacts that the stage read."""


class Tracker(Protocol):
    """One destination of one stage's metrics, called from one process in this order:
    `start`, then the others any number of times, then `finish`.
    """

    def start(self, stage: str, config: Metrics) -> None:
        """A stage begins.

        Args:
            stage: for example "supernet" or "finalize/0.15".
            config: what is worth keeping beside the metrics. `total_steps` (optimiser steps
                of the stage) and `batch_size` (images of a step) give the console its ETA and
                images/s; `counts` says what the stage's steps are, where they are not steps.
        """

    def log(self, metrics: Metrics, step: int) -> None:
        """Metrics after `step` optimiser steps (or generations, or whatever the stage counts)."""

    def summary(self, metrics: Metrics) -> None:
        """Figures of the whole stage."""

    def table(self, name: str, rows: Rows, axes: tuple[str, str] | None = None) -> None:
        """Rows with the same columns; `axes` are two of them that make a plot (x, y)."""

    def picture(self, name: str, draw: Draw) -> None:
        """A picture of what the stage made."""

    def artifact(self, artifact: Artifact) -> None:
        """Something was written."""

    def finish(self) -> None:
        """The stage is over; called again, it does nothing."""


class MultiTracker:
    """Passes everything on; a tracker that fails is named once and then left out."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        # Metrics may arrive from a thread that listens to the workers.
        self._lock = threading.RLock()

    def start(self, stage: str, config: Metrics) -> None:
        self._each(lambda tracker: tracker.start(stage, config))

    def log(self, metrics: Metrics, step: int) -> None:
        self._each(lambda tracker: tracker.log(metrics, step))

    def summary(self, metrics: Metrics) -> None:
        self._each(lambda tracker: tracker.summary(metrics))

    def table(self, name: str, rows: Rows, axes: tuple[str, str] | None = None) -> None:
        self._each(lambda tracker: tracker.table(name, rows, axes))

    def picture(self, name: str, draw: Draw) -> None:
        self._each(lambda tracker: tracker.picture(name, draw))

    def artifact(self, artifact: Artifact) -> None:
        self._each(lambda tracker: tracker.artifact(artifact))

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        with self._lock:
            for tracker in list(self._trackers):
                try:
                    call(tracker)
                except Exception as error:  # whatever a tracker does, the run goes on
                    self._trackers.remove(tracker)
                    reason = " ".join(str(error).split()) or "no reason given"
                    log.warning(
                        "%s failed and is left out from here on (%s: %s); the run goes on",
                        type(tracker).__name__,
                        type(error).__name__,
                        reason,
                    )


def file_name(stage: str) -> str:
    """A stage's name as a file name: "finalize/0.15" -> "finalize-0.15"."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", stage).strip(".-") or "stage"
