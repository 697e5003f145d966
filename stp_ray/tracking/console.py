"""Progress on a terminal or in a log."""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .base import Artifact, Draw, Metrics, Rows


class ConsoleTracker:
    """A live line on a terminal; elsewhere a plain line at most every `interval_s` seconds.

    Args:
        stream: where to; standard error by default, so that results alone go to standard
            output.
        interval_s: seconds between plain lines.
        clock: seconds, monotonic; replaced in tests.
    """

    #: Metrics that the line shows in a place of their own.
    _PLACED = ("step", "total_steps", "batch_size", "images_per_s", "epoch", "lr")
    _WINDOW = 50

    def __init__(
        self,
        stream: TextIO | None = None,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream or sys.stderr
        self._screen = _screen(self._stream) if self._stream.isatty() else None
        self._interval = interval_s if self._screen is None else 0.2
        self._clock = clock
        self._stage = ""
        self._total = 0
        self._batch = 0
        self._begin = self._shown_at = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=self._WINDOW)

    def start(self, stage: str, config: Metrics) -> None:
        self._stage = stage
        self._total = int(config.get("total_steps") or 0)
        self._batch = int(config.get("batch_size") or 0)
        self._begin = self._clock()
        self._shown_at = -math.inf
        self._recent.clear()
        self._line(f"{stage}  started")

    def log(self, metrics: Metrics, step: int) -> None:
        now = self._clock()
        if self._recent and step < self._recent[-1][1]:
            self._recent.clear()  # the stage was restarted from a checkpoint
        self._recent.append((now, step))
        self._total = int(metrics.get("total_steps") or self._total)
        self._batch = int(metrics.get("batch_size") or self._batch)
        if now - self._shown_at >= self._interval or (self._total and step >= self._total):
            self._show(metrics, step, now)

    def summary(self, metrics: Metrics) -> None:
        seconds = self._clock() - self._begin
        self._line(f"{self._stage}  done in {_duration(seconds)}{_figures(metrics)}")

    def table(self, name: str, rows: Rows, axes: tuple[str, str] | None = None) -> None:
        """Too long for a line."""

    def picture(self, name: str, draw: Draw) -> None:
        """Nothing that a line could show."""

    def artifact(self, artifact: Artifact) -> None:
        self._line(f"{self._stage}  wrote {artifact.name}: {artifact.uri}")

    def finish(self) -> None:
        if self._screen is not None:
            self._screen.remove(self._stage)

    def _show(self, metrics: Metrics, step: int, now: float) -> None:
        self._shown_at = now
        total = self._total if self._total >= step else 0
        parts = [self._stage, f"{step}/{total}" if total else str(step)]
        if metrics.get("epoch") is not None:
            parts.append(f"epoch {_number(metrics['epoch'])}")
        rate = self._steps_per_second()
        images = metrics.get("images_per_s") or rate * self._batch
        if images:
            parts.append(f"{images:,.0f} images/s")
        line = "  ".join(parts) + _figures(metrics, skip=self._PLACED)
        if rate and total:
            line += f"  ETA {_duration((total - step) / rate)}"
        if self._screen is not None:
            self._screen.update(self._stage, line)
        else:
            self._line(line)

    def _steps_per_second(self) -> float:
        (begin, first), (end, last) = self._recent[0], self._recent[-1]
        return (last - first) / (end - begin) if end > begin else 0.0

    def _line(self, line: str) -> None:
        if self._screen is not None:
            self._screen.print(line)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


class _Screen:
    """A terminal with one live line for each stage that is running: budgets run side by side."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._lines: dict[str, Text] = {}
        self._lock = threading.RLock()

    def print(self, line: str) -> None:
        with self._lock:
            self._console.print(Text(line))

    def update(self, stage: str, line: str) -> None:
        with self._lock:
            self._lines[stage] = Text(line, no_wrap=True, overflow="ellipsis")
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(Group(*self._lines.values()), refresh=True)

    def remove(self, stage: str) -> None:
        with self._lock:
            self._lines.pop(stage, None)
            if self._live is not None and not self._lines:
                self._live.stop()
                self._live = None
            elif self._live is not None:
                self._live.update(Group(*self._lines.values()), refresh=True)


@cache
def _screen(stream: TextIO) -> _Screen:
    """The one screen of a terminal."""
    return _Screen(stream)


def _figures(metrics: Metrics, skip: Sequence[str] = ()) -> str:
    shown = [
        f"  {name} {_number(value)}"
        for name, value in metrics.items()
        if name not in skip and isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return "".join(shown[:6])


def _number(value: float) -> str:
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
