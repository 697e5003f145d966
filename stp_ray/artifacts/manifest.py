"""Which stages of a run are done."""

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypedDict

from ..errors import StorageError
from .store import Store

log = logging.getLogger(__name__)


class Record(TypedDict):
    """What the manifest says about a finished stage."""

    inputs: dict[str, Any]
    outputs: dict[str, str]
    seconds: float
    device_seconds: float
    metrics: dict[str, Any]
    finished: str


class Manifest:
    """Which stages of a run are done, in `manifest.json`. Written by one process: the driver.

    Args:
        store: the run's folder.
        guard: called before a stage is recorded; raises if this process may not write any more.
    """

    _NAME = "manifest.json"

    def __init__(self, store: Store, guard: Callable[[], object] = lambda: None) -> None:
        self.store = store
        self._guard = guard

    def stages(self) -> dict[str, Record]:
        """The records of all finished stages, in the order in which they finished."""
        if not self.store.exists(self._NAME):
            return {}
        content = self.store.read_json(self._NAME)
        stages = content.get("stages") if isinstance(content, dict) else None
        if not isinstance(stages, dict):
            raise StorageError(
                f"{self.store.uri}/{self._NAME} holds no stages; delete it to run them all again"
            )
        return stages

    def done(self, stage: str) -> Record | None:
        """The record of a finished stage whose outputs are still there and undamaged.

        None, with a warning, if an output is missing or fails its checksum: then the stage
        has to run again.
        """
        record = self.stages().get(stage)
        if record is None:
            return None
        for name, expected in record["outputs"].items():
            if not self.store.exists(name) or self.store.checksum(name) != expected:
                log.warning("stage %s runs again: its output %s is missing or damaged", stage, name)
                return None
        return record

    def finish(
        self,
        stage: str,
        *,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, str],
        seconds: float,
        device_seconds: float,
        metrics: Mapping[str, Any],
    ) -> Record:
        """Record that a stage is done.

        Args:
            stage: for example "supernet" or "finalize/0.15".
            inputs: what it was made from: names and checksums or URIs.
            outputs: name relative to the run's folder -> sha256.
            seconds: wall-clock duration.
            device_seconds: seconds times the devices (CPU cores or GPUs) that were asked for.
            metrics: JSON-able figures.
        """
        stages = self.stages()
        record = Record(
            inputs=dict(inputs),
            outputs=dict(outputs),
            seconds=float(seconds),
            device_seconds=float(device_seconds),
            metrics=dict(metrics),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        stages[stage] = record
        self._write(stages)
        return record

    def forget(self, stage: str) -> None:
        """Take back that a stage is done; it runs again. Nothing happens where it is not."""
        stages = self.stages()
        if stages.pop(stage, None) is not None:
            self._write(stages)

    def rewritten(self, stage: str, name: str) -> None:
        """Record that an output of a stage was written again after it, or it would pass for
        damaged. Nothing happens where the stage is not done.

        Args:
            stage: as for `finish`.
            name: of the output, relative to the run's folder.
        """
        stages = self.stages()
        if stage in stages:
            stages[stage]["outputs"][name] = self.store.checksum(name)
            self._write(stages)

    def _write(self, stages: Mapping[str, Record]) -> None:
        self._guard()
        self.store.write_json(self._NAME, {"stages": stages})
