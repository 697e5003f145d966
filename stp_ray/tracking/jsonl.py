"""Every call as a line of JSON in the run's folder."""

import json
import time
from collections.abc import Callable
from typing import Any, TextIO

from ..artifacts import Store, jsonable
from .base import Artifact, Draw, Metrics, Rows, file_name


class JsonlTracker:
    """Every call as one JSON line in `logs/<stage>.jsonl` of the run's folder.

    On local storage each line is appended at once. Elsewhere lines are gathered in memory
    and the file is written every `push_s` seconds and at the end. A stage that is started
    again adds to its file.

    Args:
        store: the run's folder.
        push_s: seconds between writes to remote storage.
        clock: seconds, monotonic; replaced in tests.
    """

    def __init__(
        self,
        store: Store,
        push_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store.child("logs")
        self._push_s = push_s
        self._clock = clock
        self._pushed_at = 0.0
        self._stage = self._name = ""
        self._file: TextIO | None = None
        self._lines = ""
        self._changed = False

    def start(self, stage: str, config: Metrics) -> None:
        self._stage = stage
        self._name = f"{file_name(stage)}.jsonl"
        self._pushed_at = self._clock()
        folder = self._store.local_path
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / self._name
            # A process that was killed may have left half a line.
            torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
            self._file = path.open("a", encoding="utf-8")
            if torn:
                self._file.write("\n")
        elif self._store.exists(self._name):
            self._lines = self._store.read_bytes(self._name).decode(errors="replace")
        self._write("start", config=config)

    def log(self, metrics: Metrics, step: int) -> None:
        self._write("log", step=step, metrics=metrics)

    def summary(self, metrics: Metrics) -> None:
        self._write("summary", metrics=metrics)

    def table(self, name: str, rows: Rows, axes: tuple[str, str] | None = None) -> None:
        """Its name and size alone: the run's folder holds the content."""
        self._write("table", name=name, rows=len(rows), columns=list(rows[0]) if rows else [])

    def picture(self, name: str, draw: Draw) -> None:
        """No place for a picture."""

    def artifact(self, artifact: Artifact) -> None:
        self._write("artifact", name=artifact.name, uri=artifact.uri)

    def finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        elif self._changed:
            self._push()

    def _write(self, event: str, **content: Any) -> None:
        record = {"time": round(time.time(), 3), "stage": self._stage, "event": event, **content}
        line = json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._lines += line
        self._changed = True
        if self._clock() - self._pushed_at >= self._push_s:
            self._push()

    def _push(self) -> None:
        begin = self._clock()
        self._store.write_bytes(self._name, self._lines.encode())
        self._changed = False
        # However slow the storage, at most a fiftieth of the time goes into writing.
        self._pushed_at = self._clock()
        self._push_s = max(self._push_s, 50 * (self._pushed_at - begin))
