"""Progress and errors from workers to the driver, through an actor that starts in no time because
it imports neither torch nor data libraries."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ray

from ..errors import StpError
from . import cluster

if TYPE_CHECKING:
    from ..tracking import Tracker

_POLL_S = 0.5


class Relay:
    """Carries metrics and, for each stage, a user-facing error from workers to the driver."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, int, dict[str, float]]] = []
        self._errors: dict[str, StpError] = {}

    def push(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self._lines.append((stage, step, metrics))

    def drain(self) -> list[tuple[str, int, dict[str, float]]]:
        lines, self._lines = self._lines, []
        return lines

    def fail(self, stage: str, error: StpError) -> None:
        self._errors.setdefault(stage, error)

    def error(self, stage: str | None = None) -> StpError | None:
        """What a stage, or the first of all, failed with."""
        if stage is None:
            return next(iter(self._errors.values()), None)
        return self._errors.get(stage)


@contextlib.contextmanager
def relayed(trackers: "Mapping[str, Tracker]") -> Iterator[Any]:
    """A relay whose metrics go to the tracker of their stage while the block lasts."""
    here = cluster.beside_driver()
    actor = ray.remote(Relay).options(num_cpus=0, scheduling_strategy=here).remote()
    stop = threading.Event()

    def drain() -> None:
        for stage, step, metrics in ray.get(actor.drain.remote(), timeout=30):
            trackers[stage].log(metrics, step)

    def poll() -> None:
        while not stop.wait(_POLL_S):
            with contextlib.suppress(ray.exceptions.RayError):
                drain()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        stop.set()
        thread.join(timeout=30)
        with contextlib.suppress(ray.exceptions.RayError):
            drain()
        ray.kill(actor)
