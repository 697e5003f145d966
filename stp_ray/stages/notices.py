"""Whether a machine of the cluster is about to be taken away."""

import contextlib
import threading
from types import TracebackType

import ray

#: Seconds between two looks. The shortest notice of a cloud is 30 s.
_LOOK_EVERY_S = 2.0


def leaving() -> set[str]:
    """Ids of the nodes that are being drained: by the watcher of a spot machine
    (`stp_ray.preemption`), by the autoscaler, or by hand."""
    # No public call tells it without being a barrier of all workers.
    nodes: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return set(nodes)


class Notices:
    """Looks out for nodes that leave, while the block lasts and where Ray runs."""

    def __init__(self) -> None:
        self._stop, self._new = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._look_out, name="notices", daemon=True)

    def taken(self) -> bool:
        """Whether a node has been found to leave since this was asked last."""
        found = self._new.is_set()
        self._new.clear()
        return found

    def _look_out(self) -> None:
        known: set[str] = set()
        while not self._stop.wait(_LOOK_EVERY_S):
            # A version of Ray without this call, or a cluster that does not answer.
            with contextlib.suppress(Exception):
                found = leaving()
                if found - known:
                    self._new.set()
                known = found

    def __enter__(self) -> "Notices":
        if ray.is_initialized():
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
