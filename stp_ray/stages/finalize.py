"""The last stage, once per budget: mutating-expansion distillation, then pruning. Budgets run side
by side as Ray tasks; with `finalize.num_workers` above one each trains data-parallel.

The extracted network is final: there is no fine-tuning after it.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import ray
import torch

from .. import export
from ..artifacts import Checkpoints, Store
from ..config import RunConfig
from ..elastic import Subnet
from ..errors import RunError, StpError
from ..method import calibrate, evaluate
from ..method.modes import inspecting
from ..tracking import Tracker
from . import cluster
from .images import Images, SharedImages
from .jobs import METRICS, RESULT, SHARED, Job, Place, Report, train
from .network import build_supernet
from .supernet import fit

SUBNET = "subnet.json"
#: What the stage leaves when it is done, beside the files that it names.
PRUNED = "pruned.json"

Trackers = Mapping[str, Tracker]


def folder(label: str) -> str:
    """Where a budget's artifacts lie in the run's folder."""
    return f"budget-{label}"


def finalize(
    config: RunConfig,
    run: Store,
    targets: Mapping[str, str],
    images: Images | SharedImages,
    trackers: Trackers,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prune the supernet to each target; yields (budget label, `pruned.json`) as they finish.

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
    options = config.cluster
    if options.in_process:
        for label, target in targets.items():
            jobs = _jobs(config, run, label, target)
            for job in jobs:
                fit(job, images, 1, trackers[job.stage])
            yield label, prune(jobs[0], images.here(), torch.device("cpu"))
        return
    if config.finalize.num_workers > 1:  # one budget after the other, each on the whole cluster
        for label, target in targets.items():
            jobs = _jobs(config, run, label, target)
            for job in jobs:
                fit(job, images, config.finalize.num_workers, trackers[job.stage])
            yield label, ray.get(_remote(_prune_task, config).remote(jobs[0], images))
        return
    cluster.require_resources(options, 1)
    with cluster.relay(trackers) as relay:
        tasks = {
            _remote(_finalize_task, config).remote(_jobs(config, run, label, target), images, relay): label
            for label, target in targets.items()
        }
        failed: dict[str, BaseException] = {}
        waiting = list(tasks)
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            try:
                yield tasks[done], ray.get(done)
            except ray.exceptions.RayError as error:
                failed[tasks[done]] = error
        told = ray.get(relay.error.remote())
    if told is not None:
        raise told
    if failed:
        label, error = next(iter(failed.items()))
        raise RunError(
            f"budget {label} failed {options.max_failures + 1} times, last: "
            f"{str(error).strip().splitlines()[-1][:200]}; the same command resumes it"
        ) from error


def _jobs(config: RunConfig, run: Store, label: str, target: str) -> list[Job]:
    """The ladder, and the control where it is wanted: the same shape from scratch for as many
    epochs as supernet and ladder have together."""
    ladder = Job(
        stage=f"finalize/{label}", kind="finalize", folder=folder(label), run_uri=run.uri,
        config=config, options=config.finalize.optimisation, target=target,
    )  # fmt: skip
    if not config.finalize.control:
        return [ladder]
    both = config.supernet.optimisation.epochs + config.finalize.optimisation.epochs
    like = config.baseline or config.supernet.optimisation
    control = replace(
        ladder, stage=f"control/{label}", kind="control", folder=f"{folder(label)}/control",
        options=replace(like, epochs=both),
    )  # fmt: skip
    return [ladder, control]


def _remote(function: Any, config: RunConfig) -> Any:
    resources = cluster.worker_resources(config.cluster)
    return ray.remote(function).options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        max_retries=config.cluster.max_failures,
    )


def _device(config: RunConfig) -> torch.device:
    return torch.device("cuda" if config.cluster.use_gpu else "cpu")


def _finalize_task(jobs: list[Job], images: Images | SharedImages, relay: Any) -> dict[str, Any]:
    config = jobs[0].config
    place = Place(device=_device(config), threads=config.cluster.threads_per_worker)

    def to_relay(job: Job) -> Report:
        return lambda step, metrics: relay.push.remote(job.stage, step, dict(metrics))

    try:
        for job in jobs:
            train(job, images, place, to_relay(job))
        return prune(jobs[0], images.here(), place.device)
    except StpError as error:
        ray.get(relay.fail.remote(error))
        return {}


def _prune_task(job: Job, images: Images | SharedImages) -> dict[str, Any]:
    torch.set_num_threads(job.config.cluster.threads_per_worker)
    return prune(job, images.here(), _device(job.config))


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
        return store.read_json(PRUNED)
    assert job.target is not None
    target = Subnet.from_json(job.target)
    net = build_supernet(config, images.summary)
    net.model.load_state_dict(store.load_tensors(SHARED))
    net.to(device).eval()
    calibration = [x for x, _ in images.batches("train", device, config.finalize.calibration_images)]
    small = net.extract(target, calibrate(net, target, calibration))
    with inspecting(small):
        metrics = evaluate(small, images.batches("test", device))
    small.cpu()
    size = images.summary.image_size
    description = {
        "model": {"name": config.model.name, "kwargs": config.model.kwargs},
        "num_classes": images.summary.num_classes,
        "class_names": list(images.summary.class_names),
        "image_size": size,
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "space": {"divisor": config.space.divisor, "min_ratio": config.space.min_ratio},
        "subnet": target.to_json(),
        "data": config.data.name,
    }
    outputs = export.save_model(store, small, description)
    outputs[SUBNET] = store.write_bytes(SUBNET, (target.to_json() + "\n").encode())
    programs, notes = export.write_programs(
        store, small, torch.randn(2, 3, size, size), onnx=config.export.onnx, pt2=config.export.pt2
    )
    trained = store.read_json(RESULT)
    cost = net.cost(target)
    pruned = {
        "top1": metrics["top1"],
        "shared_main_top1": trained["metrics"]["top1"],
        "subnet_id": target.id,
        "macs": cost.macs,
        "params": cost.params,
        "notes": notes,
        "outputs": {**outputs, **programs, METRICS: trained["outputs"][METRICS]},
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

