"""The last stage, once per budget: mutating-expansion distillation, then pruning. Budgets run side
by side as Ray tasks; with `finalize.num_workers` above one each trains data-parallel.

The extracted network is final: there is no fine-tuning after it.
"""

import contextlib
import logging
import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import ray
import torch

from .. import export
from ..artifacts import Checkpoints, Store
from ..config import RunConfig
from ..elastic import Subnet
from ..errors import RunError, StpError
from ..method import calibrate
from ..method.modes import inspecting
from ..tracking import Tracker
from . import cluster
from .images import Images, SharedImages
from .jobs import METRICS, RESULT, SHARED, WEIGHTS, Job, Place, Report, seconds_spent, train
from .network import build_supernet, divisor
from .predictions import PREDICTIONS, compare, top1
from .relay import relayed
from .supernet import fit, fit_group

log = logging.getLogger(__name__)

#: The shape that a budget's folder is about.
SUBNET = "subnet.json"
#: What the stage leaves when it is done, beside the files that it names.
PRUNED = "pruned.json"

Trackers = Mapping[str, Tracker]


def folder(label: str) -> str:
    """Where a budget's artifacts lie in the run's folder."""
    return f"budget-{label}"


def claim(run: Store, label: str, target: str) -> None:
    """Have a budget's folder be about a target. What was made there for another one, which a search
    that had to be made again did not find, is deleted.

    Args:
        run: the run's folder.
        label: of the budget.
        target: the subnet (JSON).
    """
    home, content = run.child(folder(label)), _line(target)
    if home.exists(SUBNET) and home.read_bytes(SUBNET) == content:
        return
    others = [name for name in home.names() if name != SUBNET]
    if others:
        log.warning("budget %s has another shape than before, and is pruned anew", label)
    for name in others:  # before the shape, which says whose they are should this be cut off
        home.delete(name)
    home.write_bytes(SUBNET, content)


def _line(target: str) -> bytes:
    return f"{target}\n".encode()


def finalize(
    config: RunConfig,
    run: Store,
    targets: Mapping[str, str],
    images: Images | SharedImages,
    trackers: Trackers,
) -> Generator[tuple[str, dict[str, Any], float]]:
    """Prune the supernet to each target; yields (budget label, `pruned.json`, seconds that it held
    its workers, over all attempts) as they finish.

    Args:
        config: the run's configuration.
        run: the run's folder.
        targets: budget label -> subnet (JSON).
        images: the data.
        trackers: by stage name, "finalize/<label>" and, with `finalize.control`,
            "control/<label>".

    Raises:
        RunError: a budget failed; the others are finished first.
    """
    jobs = {label: _jobs(config, run, label, target) for label, target in targets.items()}
    if config.cluster.in_process:
        for label, trainings in jobs.items():
            started = time.monotonic() - spent(trainings[0].store)
            for job in trainings:
                fit(job, images, config.finalize.num_workers, trackers[job.stage])
            pruned = prune(trainings[0], images.here(), torch.device("cpu"))
            yield label, pruned, time.monotonic() - started
        return
    with relayed(trackers) as relay:
        yield from _side_by_side(config, jobs, images, relay)


def _side_by_side(
    config: RunConfig, jobs: dict[str, list[Job]], images: Images | SharedImages, relay: Any
) -> Generator[tuple[str, dict[str, Any], float]]:
    """A task per budget. All are asked for at once, so that a cluster that can grows for them; but
    those with workers of their own only while there is room for these."""
    options, workers = config.cluster, config.finalize.num_workers
    cluster.require_resources(options, options.fewest(workers))
    # A task with workers of its own only waits for them.
    own = cluster.worker_resources(options) if workers == 1 else {"CPU": 0.0}
    task = ray.remote(_finalize_task).options(
        num_cpus=own["CPU"], num_gpus=own.get("GPU", 0), max_retries=options.max_failures
    )
    waiting: list[str] = list(jobs)
    running: dict[Any, str] = {}
    failed: dict[str, BaseException] = {}
    try:
        while waiting or running:
            while waiting and (
                workers == 1 or len(running) < max(1, cluster.places(options) // workers)
            ):
                label = waiting.pop(0)
                running[task.remote(jobs[label], images, relay)] = label
            if workers == 1:
                done = cluster.first(running, options)
            else:  # their trainings wait for machines themselves
                (done,), _ = ray.wait(list(running), num_returns=1)
            label = running.pop(done)
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                failed[label] = error
            else:
                if outcome is not None:
                    yield label, *outcome
    finally:  # an interruption: without the driver nobody may write to the run's folder
        for reference in running:
            with contextlib.suppress(Exception):  # the cluster may be gone
                ray.cancel(reference, force=True)
    told = ray.get(relay.error.remote())
    if told is not None:
        raise told
    for label, cause in failed.items():
        raise RunError(
            f"budget {label} failed: {str(cause).strip().splitlines()[-1][:200]}; the same "
            "command resumes it from its last checkpoint"
        ) from cause


def spent(home: Store) -> float:
    """Seconds that attempts before this one have trained for a budget, its control among them.

    Args:
        home: the budget's folder.
    """
    return seconds_spent(home) + seconds_spent(home.child("control"))


def _jobs(config: RunConfig, run: Store, label: str, target: str) -> list[Job]:
    """The ladder, and the control where it is wanted: the same shape from scratch for all epochs
    that the pruned network's weights see."""
    ladder = Job(
        stage=f"finalize/{label}", kind="finalize", folder=folder(label), run_uri=run.uri,
        config=config, options=config.finalize.optimisation, target=target,
    )  # fmt: skip
    if not config.finalize.control:
        return [ladder]
    control = replace(
        ladder, stage=f"control/{label}", kind="control", folder=f"{folder(label)}/control",
        options=config.control_options(),
    )  # fmt: skip
    return [ladder, control]


def _finalize_task(
    jobs: list[Job], images: Images | SharedImages, relay: Any
) -> tuple[dict[str, Any], float] | None:
    """Train and prune one budget; `pruned.json` and the seconds that it took, those of attempts
    before this one among them, or None if an error for the user was recorded."""
    started = time.monotonic() - spent(jobs[0].store)
    config = jobs[0].config
    workers = config.finalize.num_workers
    try:
        for job in jobs:
            if workers > 1:
                fit_group(job, images, workers, relay)
            else:
                train(job, images, _place(config), _to(relay, job))
        if workers == 1:
            pruned = prune(jobs[0], images.here(), _place(config).device)
            return pruned, time.monotonic() - started
        resources = cluster.worker_resources(config.cluster)
        pruning = ray.remote(_prune_task).options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_retries=config.cluster.max_failures,
        )
        pruned = cluster.result(
            pruning.remote(jobs[0], images), f"{jobs[0].stage}'s pruning", config.cluster
        )
        return pruned, time.monotonic() - started
    except StpError as error:
        ray.get(relay.fail.remote(jobs[0].stage, error))
        return None


def _prune_task(job: Job, images: Images | SharedImages) -> dict[str, Any]:
    place = _place(job.config)
    torch.set_num_threads(place.threads)
    return prune(job, images.here(), place.device)


def _place(config: RunConfig) -> Place:
    device = torch.device("cuda" if config.cluster.use_gpu else "cpu")
    return Place(device=device, threads=config.cluster.threads_per_worker)


def _to(relay: Any, job: Job) -> Report:
    return lambda step, metrics: relay.push.remote(job.stage, step, dict(metrics))


def prune(job: Job, images: Images, device: torch.device) -> dict[str, Any]:
    """Extract the target from its trained ladder, recalibrate, evaluate, and write what a person
    uses: weights, description, ONNX and .pt2. Returns `pruned.json`, which is written last.

    Args:
        job: the ladder, trained to the end.
        images: the data.
        device: where to calibrate and evaluate.
    """
    store, config = job.store, job.config
    if store.exists(PRUNED):
        _tidy(store)
        return store.read_json(PRUNED)
    assert job.target is not None
    target = Subnet.from_json(job.target)
    net = build_supernet(config, images.summary)
    net.model.load_state_dict(store.load_tensors(SHARED))
    net.to(device).eval()
    batches = images.calibration(config.seed, config.finalize.calibration_images, device)
    small = net.extract(target, calibrate(net, target, batches))
    # The network it is compared with: the one trained alone, where there is one.
    reference = "baseline" if job.run.exists(f"baseline/{WEIGHTS}") else "supernet"
    net.model.load_state_dict(job.run.child(reference).load_tensors(WEIGHTS))
    with inspecting(small):
        said = compare(
            net, small, images.batches("test", device), config.data, images.summary.class_names
        )
    small.cpu()
    size = images.summary.image_size
    description = {
        "model": {"name": config.model.name, "kwargs": config.model.kwargs},
        "num_classes": images.summary.num_classes,
        "class_names": list(images.summary.class_names),
        "image_size": size,
        "resize": images.summary.held_size if config.data.image_size else None,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "space": {
            "divisor": divisor(config), "min_ratio": config.space.min_ratio,
            "ignore": list(config.space.ignore), "only": list(config.space.only),
        },
        "subnet": target.to_json(),
        "data": config.data.name,
    }  # fmt: skip
    outputs = export.save_model(store, small, description)
    outputs[SUBNET] = store.write_bytes(SUBNET, _line(job.target))
    outputs[PREDICTIONS] = store.write_table(PREDICTIONS, said)
    wanted = [name for name, on in config.export.model_dump().items() if on]
    written, programs, notes = export.write_programs(
        store, small, torch.randn(2, 3, size, size), wanted
    )
    trained = store.read_json(RESULT)
    cost = net.cost(target)
    pruned = {
        "top1": top1(said),
        "shared_main_top1": trained["metrics"]["top1"],
        "subnet_id": target.id,
        "macs": cost.macs,
        "params": cost.params,
        "compared_with": reference,
        "programs": programs,
        "notes": notes,
        "outputs": {**outputs, **written, METRICS: trained["outputs"][METRICS]},
        "seconds": trained["seconds"],
    }
    if store.exists(f"control/{RESULT}"):
        pruned["control_top1"] = store.read_json(f"control/{RESULT}")["metrics"]["top1"]
    store.write_json(PRUNED, pruned)
    _tidy(store)
    return pruned


def _tidy(store: Store) -> None:
    """Once the network is pruned, nothing needs the shared weights behind it any more."""
    for place in (store, store.child("control")):
        for name in place.names(Checkpoints.PREFIX):
            place.delete(name)
    with contextlib.suppress(StpError):
        store.delete(SHARED)
