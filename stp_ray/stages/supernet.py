"""Data-parallel training with Ray Train: the supernet, and any other job of a run."""

import contextlib
import logging
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from ..errors import RunError, StpError
from ..tracking import Tracker
from . import cluster
from .images import Images, SharedImages
from .jobs import RESULT, Job, Place, train
from .relay import relayed

#: Seconds until a collective operation that lost a peer gives up.
_COLLECTIVE_TIMEOUT_S = 120


def fit(job: Job, images: Images | SharedImages, workers: int, tracker: Tracker) -> dict[str, Any]:
    """Train a job to the end on `workers` data-parallel workers, or in this process where the
    configuration says so; returns its `result.json`. Errors as for `fit_group`."""
    store, options = job.store, job.config.cluster
    if options.in_process:
        place = Place(shares=workers, threads=options.threads_per_worker)
        train(job, images, place, lambda step, metrics: tracker.log(metrics, step))
        return store.read_json(RESULT)
    with relayed({job.stage: tracker}) as relay:
        return fit_group(job, images, workers, relay)


def fit_group(job: Job, images: Images | SharedImages, workers: int, relay: Any) -> dict[str, Any]:
    """Train a job to the end with Ray Train, reporting through a `relay.Relay`.

    A worker that dies is replaced and the group goes on from the last checkpoint, up to
    `cluster.max_failures` times; with `cluster.min_workers` it goes on with fewer where there is
    no room, and with all of them once there is. A step is the same in either case.

    Raises:
        StpError: what a worker raised for the user.
        ClusterError: the cluster cannot give the workers.
        RunError: workers failed too often, or too few are left for too long.
    """
    store, options = job.store, job.config.cluster
    if store.exists(RESULT):
        return store.read_json(RESULT)
    fewest = options.fewest(workers)
    cluster.require_resources(options, fewest)
    failure: ray.train.TrainingFailedError | None = None
    with cluster.scratch() as folder:
        trainer = _trainer(job, images, workers, relay, folder)
        # One that waits for all of its workers has a limit of Ray's.
        patience = cluster.Patience(options, fewest) if fewest < workers else None
        try:
            with _ended(trainer, patience):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            failure = error
    told = ray.get(relay.error.remote(job.stage))
    if told is not None:
        raise told
    if failure is not None:
        raise RunError(
            f"stage {job.stage} failed {options.max_failures + 1} times, last: "
            f"{_root_cause(failure)}; the same command resumes it from its last checkpoint"
        ) from failure
    return store.read_json(RESULT)


class _Trainer(TorchTrainer):
    """Leaves an interruption to the driver: Ray's own handler would hide it from what this program
    does with one, and outlives the training, after which it swallows all that come. Ray asks for it
    in the main thread alone: in another one nobody ends a training but itself."""

    #: The actor that starts and watches the workers, once there is one.
    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def end(self) -> None:
        """Let controller and workers go."""
        if self.controller is not None:
            with contextlib.suppress(Exception):  # the cluster may be gone
                ray.kill(self.controller)


@contextlib.contextmanager
def _ended(trainer: _Trainer, patience: cluster.Patience | None) -> Iterator[None]:
    """Have a training not outlive the block: not where it is interrupted in a session that goes on,
    nor where it would wait longer than `patience` for machines that were lost.

    Raises:
        RunError: it did.
    """
    over = threading.Event()

    def watch(patience: cluster.Patience) -> None:
        while not over.wait(cluster.LOOK_EVERY_S):
            with contextlib.suppress(Exception):  # the cluster may be gone
                if patience.over():
                    trainer.end()

    watcher = threading.Thread(target=watch, args=(patience,), daemon=True)
    if patience is not None:
        watcher.start()
    try:
        yield
    except ray.exceptions.RayActorError as error:
        if patience is None or not patience.over():
            raise
        raise patience.error() from error
    except BaseException:
        trainer.end()
        raise
    finally:
        over.set()
        if patience is not None:
            watcher.join()


def _trainer(
    job: Job, images: Images | SharedImages, workers: int, relay: Any, folder: str
) -> _Trainer:
    options = job.config.cluster
    fewest = options.fewest(workers)
    cluster.wait_for_workers(options, workers)
    return _Trainer(
        _worker,
        train_loop_config={"job": job, "images": images, "relay": relay, "shares": workers},
        torch_config=TorchConfig(
            backend="nccl" if options.use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S
        ),
        scaling_config=ScalingConfig(
            num_workers=workers if fewest == workers else (fewest, workers),
            elastic_resize_monitor_interval_s=options.resize_every_s,
            use_gpu=options.use_gpu,
            resources_per_worker=cluster.worker_resources(options),
        ),
        run_config=RunConfig(
            # The run's state is in its own checkpoints; what Ray writes is scratch.
            name=f"{job.stage.replace('/', '-')}-{uuid.uuid4().hex[:8]}",
            storage_path=folder,
            logging_config=LoggingConfig(log_level="ERROR"),
            failure_config=FailureConfig(
                max_failures=options.max_failures,
                controller_failure_limit=options.max_failures,
            ),
        ),
    )


def _worker(config: dict[str, Any]) -> None:
    """One rank of the group. An error meant for the user is recorded and ends the attempt; the
    group that Ray then starts finds the record and returns at once, so that nothing is retried
    that cannot succeed."""
    job, relay = config["job"], config["relay"]
    logging.getLogger().setLevel(logging.WARNING)  # Train has made it INFO
    if ray.get(relay.error.remote(job.stage)) is not None:
        return
    context = ray.train.get_context()
    place = Place(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        shares=config["shares"],
        device=get_device(),
        threads=job.config.cluster.threads_per_worker,
    )

    def report(step: int, metrics: Any) -> None:
        relay.push.remote(job.stage, step, dict(metrics))

    try:
        train(job, config["images"].here(), place, report)
    except StpError as error:
        ray.get(relay.fail.remote(job.stage, error))
        raise


def _root_cause(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else repr(error)
