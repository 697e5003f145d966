"""Joining a Ray cluster, and making sure that it can give what is asked."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..errors import ClusterError, RunError, StpError
from . import quiet

if TYPE_CHECKING:
    from ..config import ClusterOptions

#: Seconds between two looks at what is left of the cluster.
LOOK_EVERY_S = 1.0

#: What Ray Train reads, and the values of it that this process has set: any other is the user's.
_LIMIT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_set_here: set[str] = set()


def wait_for_workers(options: "ClusterOptions", workers: int) -> None:
    """Have the next training of so many workers that this process starts, driver or task, wait for
    lost machines as long as `schedule_timeout_s` says, in each of its attempts. Ray's default is a
    minute. One that goes on with fewer does not wait, and a short limit ends what Ray promised it
    wrongly."""
    if os.environ.get(_LIMIT) not in {None, *_set_here}:
        return
    os.environ.pop(_LIMIT, None)
    if options.fewest(workers) == workers:
        os.environ[_LIMIT] = limit = str(options.schedule_timeout_s)
        _set_here.add(limit)


@contextlib.contextmanager
def connected(options: "ClusterOptions") -> Iterator[None]:
    """Join the cluster that the options or the environment name, else start a local one for as
    long as the block lasts.

    Raises:
        ClusterError: the cluster does not answer.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if (
        os.environ.get(_LIMIT) in _set_here
    ):  # an earlier run's; workers would take it for the user's
        del os.environ[_LIMIT]
    address = _address(options)
    settings: dict[str, Any] = {"logging_level": "warning", "log_to_driver": True}
    # "local", or Ray joins whatever cluster was started on this machine.
    settings["address"] = address or "local"
    if not address:
        # A local worker group is watched five times a second instead of every two seconds.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        settings["include_dashboard"] = False
        settings["runtime_env"] = {"worker_process_setup_hook": quiet.worker}
        quiet.driver()
        settings["num_cpus"] = os.cpu_count()
    try:
        ray.init(**settings)
    except Exception as error:  # Ray raises bare exceptions when a node does not come up
        what = f"join the Ray cluster at {address}" if address else "start Ray on this machine"
        cure = "check cluster.address" if address else "free some memory or CPU and try again"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError(f"cannot {what}: {reason}; expected it to answer; {cure}") from error
    try:
        yield
    finally:
        ray.shutdown()


def require_resources(options: "ClusterOptions", workers: int) -> None:
    """Wait until the cluster could place `workers` at once, scaling up if it can.

    Raises:
        ClusterError: a local cluster that never can (at once), or any other after
            `schedule_timeout_s`.
    """
    if places(options) >= workers:
        return
    joined = bool(_address(options)) or not _started_here()
    if joined:
        bundles = [worker_resources(options)] * workers
        group = placement_group(bundles, strategy="PACK")
        ready = group.wait(timeout_seconds=options.schedule_timeout_s)
        remove_placement_group(group)
        if ready:
            return
    has = ray.cluster_resources()
    given = ", ".join(f"{has.get(name, 0):g} {name}" for name in worker_resources(options))
    asked, each = _needed(options, workers), _needed(options)
    waited = f" after {options.schedule_timeout_s:g} s" if joined else ""
    raise ClusterError(
        f"the cluster has {given}{waited}; {workers} workers need {asked}, {each} of one machine "
        "each; lower cluster.num_workers or threads_per_worker, or add nodes"
    )


def _started_here() -> bool:
    """Whether Ray's head is of this process, so that no machine will ever join it. There is no
    public way to ask."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def _address(options: "ClusterOptions") -> str | None:
    return options.address or os.environ.get("RAY_ADDRESS")


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Places what asks for no resources on the driver's machine, which stays: on a worker it would
    be lost with the machine, or keep it from going."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def worker_resources(options: "ClusterOptions") -> dict[str, float]:
    """What one worker asks Ray for."""
    resources = {"CPU": float(options.threads_per_worker)}
    if options.use_gpu:
        resources["GPU"] = 1.0
    return resources


def _needed(options: "ClusterOptions", workers: int = 1) -> str:
    """What so many workers ask Ray for, for a message."""
    bundle = worker_resources(options)
    return ", ".join(f"{amount * workers:g} {name}" for name, amount in bundle.items())


def places(options: "ClusterOptions") -> int:
    """Workers that the cluster has room for at its present size."""
    bundle = worker_resources(options)
    return sum(
        int(min(node["Resources"].get(name, 0) // amount for name, amount in bundle.items()))
        for node in ray.nodes()
        if node["Alive"]
    )


class Patience:
    """How long a stage waits for a cluster that has lost the machines which it cannot go on
    without. Ray would wait for ever.

    Args:
        options: of the cluster; `schedule_timeout_s` is how long.
        workers: what there has to be room for.
    """

    def __init__(self, options: "ClusterOptions", workers: int = 1) -> None:
        self._options, self._workers = options, workers
        self._over = False
        #: When there was room last, and when that was looked at.
        self._room = self._looked = time.monotonic()

    def over(self) -> bool:
        """Whether there has been no room for too long, now or at an earlier look."""
        now = time.monotonic()
        if now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            if places(self._options) >= self._workers:
                self._room = now
            self._over |= now - self._room > self._options.schedule_timeout_s
        return self._over

    def error(self) -> RunError:
        """What the user is told then."""
        few = "a worker" if self._workers == 1 else f"{self._workers} workers"
        return RunError(
            f"no machine of the cluster has had room for {few} "
            f"({_needed(self._options, self._workers)}) for "
            f"{self._options.schedule_timeout_s:g} s; expected lost ones to be replaced; add nodes "
            "or raise cluster.schedule_timeout_s; the same command goes on from what is kept"
        )


def first(references: Iterable[Any], options: "ClusterOptions") -> Any:
    """The first of these tasks of one worker each that ends.

    Args:
        references: Ray's to their outcomes.
        options: of the cluster.

    Raises:
        RunError: the cluster has no machine for them any more.
    """
    waiting, patience = list(references), Patience(options)
    while True:
        done, _ = ray.wait(waiting, num_returns=1, timeout=LOOK_EVERY_S)
        if done:
            return done[0]
        if patience.over():
            raise patience.error()


def result(reference: Any, what: str, options: "ClusterOptions") -> Any:
    """What a task of one worker returned.

    Args:
        reference: Ray's to its outcome.
        what: the task, for the message.
        options: of the cluster.

    Raises:
        StpError: what it raised for the user.
        RunError: anything else that ended it, or the cluster has no machine for it any more, and
            it is cancelled.
    """
    try:
        first([reference], options)
    except RunError:
        ray.cancel(reference, force=True)
        raise
    try:  # apart: what a task raised may be a RunError of Ray's making, with all of its traceback
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, StpError):
            raise cause from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"{what} failed: {lines[-1].strip()[:200]}; the same command goes on from what is kept"
        ) from error


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A local folder for what Ray writes of its own accord; never read back."""
    with tempfile.TemporaryDirectory(prefix="stp_ray-", ignore_cleanup_errors=True) as folder:
        yield folder
