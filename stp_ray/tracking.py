"""Where metrics go. A producer of metrics knows none of this, and no tracker stops a run."""

import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .artifacts import Store, jsonable

log = logging.getLogger(__name__)

Metrics = Mapping[str, Any]


class TrackingChoice(Protocol):
    """The part of a run's configuration that is read here."""

    @property
    def console(self) -> bool: ...

    @property
    def wandb(self) -> str: ...

    @property
    def project(self) -> str: ...


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
                images/s.
        """

    def log(self, metrics: Metrics, step: int) -> None:
        """Metrics after `step` optimiser steps (or generations, or whatever the stage counts)."""

    def summary(self, metrics: Metrics) -> None:
        """Figures of the whole stage."""

    def artifact(self, name: str, uri: str) -> None:
        """Something was written to `uri`."""

    def finish(self) -> None:
        """The stage is over; called again, it does nothing."""


def make_trackers(options: TrackingChoice, run_id: str, stage: str, store: Store) -> Tracker:
    """All trackers of one stage as one: JSON lines always, console and wandb as asked for.

    Args:
        options: the run's `tracking` section.
        run_id: groups a run's stages in wandb.
        stage: for example "supernet".
        store: the run's folder.
    """
    trackers: list[Tracker] = [JsonlTracker(store)]
    if options.console:
        trackers.append(ConsoleTracker())
    if options.wandb != "off":
        trackers.append(
            WandbTracker(
                options.project,
                run_id,
                online=options.wandb == "online",
                folder=wandb_folder(store, run_id),
            )
        )
    return MultiTracker(trackers)


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

    def artifact(self, name: str, uri: str) -> None:
        self._each(lambda tracker: tracker.artifact(name, uri))

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


# -- console ----------------------------------------------------------------------------


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

    def artifact(self, name: str, uri: str) -> None:
        self._line(f"{self._stage}  wrote {name}: {uri}")

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


# -- JSON lines -------------------------------------------------------------------------


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
            self._lines = self._store.read_bytes(self._name).decode()
        self._write("start", config=config)

    def log(self, metrics: Metrics, step: int) -> None:
        self._write("log", step=step, metrics=metrics)

    def summary(self, metrics: Metrics) -> None:
        self._write("summary", metrics=metrics)

    def artifact(self, name: str, uri: str) -> None:
        self._write("artifact", name=name, uri=uri)

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


def file_name(stage: str) -> str:
    """A stage's name as a file name: "finalize/0.15" -> "finalize-0.15"."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", stage).strip(".-") or "stage"


# -- wandb ------------------------------------------------------------------------------


def wandb_folder(store: Store, run_id: str) -> Path:
    """Where wandb keeps its files: the run's folder if that is local, else a cache folder.

    Never the current folder. WANDB_DIR, where the user has set it, wins.
    """
    if os.environ.get("WANDB_DIR"):
        return Path(os.environ["WANDB_DIR"])
    if store.local_path is not None:
        return store.local_path
    return _cache_folder() / "wandb" / run_id


def _cache_folder() -> Path:
    """This project's folder among the user's caches, or a temporary one if that is read-only."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "stp_ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="stp_ray-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="stp_ray-"))


class WandbTracker:
    """One Weights & Biases run per stage, grouped by the run's id.

    Offline unless asked otherwise: files that `wandb sync FOLDER` uploads. Online without a
    login or a reachable server it falls back to offline and says how to sync.

    Args:
        project: wandb project.
        run_id: the group.
        online: send to the server while the stage runs.
        folder: where wandb's files go.
        init_timeout_s: seconds to wait for the server.
    """

    def __init__(
        self, project: str, run_id: str, *, online: bool, folder: Path, init_timeout_s: float = 20
    ) -> None:
        self._project = project
        self._run_id = run_id
        self._online = online
        self._folder = folder
        self._timeout = init_timeout_s
        self._run: Any = None

    def start(self, stage: str, config: Metrics) -> None:
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._online:
            self._run = self._init(stage, config, "offline")
        elif not wandb.login(prompt=False, verify=False):
            self._fall_back(stage, config, "no wandb login; run `wandb login`")
        else:
            try:
                self._run = self._init(stage, config, "online")
            except wandb.Error as error:
                self._fall_back(stage, config, " ".join(str(error).split()))
        # Steps of a stage that was resumed may repeat: wandb's own counter refuses that.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Metrics, step: int) -> None:
        if self._run is not None:
            self._run.log({**metrics, "step": step})

    def summary(self, metrics: Metrics) -> None:
        if self._run is not None:
            self._run.summary.update(dict(metrics))

    def artifact(self, name: str, uri: str) -> None:
        if self._run is None:
            return
        import wandb

        artifact = wandb.Artifact(file_name(f"{self._run_id}-{name}")[:128], type="model")
        artifact.add_reference(uri, name=file_name(uri.rpartition("/")[2]), checksum=False)
        self._run.log_artifact(artifact)

    def finish(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()

    def _fall_back(self, stage: str, config: Metrics, reason: str) -> None:
        log.warning(
            "wandb cannot be reached (%s); going on offline, upload later with: wandb sync %s",
            reason,
            self._folder / "wandb" / "offline-run-*",
        )
        self._run = self._init(stage, config, "offline")

    def _init(self, stage: str, config: Metrics, mode: str) -> Any:
        import wandb

        return wandb.init(
            project=self._project,
            group=self._run_id,
            job_type=stage.partition("/")[0],
            name=stage,
            id=file_name(f"{self._run_id}-{stage}")[:128],
            config=dict(config),
            dir=self._folder,
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,  # a git remote may hold a token
                init_timeout=self._timeout,
            ),
        )
