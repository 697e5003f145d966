"""What a run would do and cost, before it does anything."""

import math
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..artifacts import Manifest, Store
from ..config import RunConfig, Training, run_id
from ..data import DataSummary
from ..elastic import Budget, SearchSpace, Subnet, Supernet
from ..elastic.latency import NEAR, NETWORKS
from ..method import Optimisation, ladder, sampler
from ..method.scoring import TUNING_BATCH
from ..method.training import Draw
from ..timing import PAIRS
from .inputs import inputs, require_same
from .network import LATENCY, timed
from .pipeline import latency_threads, preflight

#: Assumed of a GPU that is not here: floating-point operations a second in real training.
ASSUMED_FLOPS = 20e12

#: Steps of a training at which its subnets are drawn to find out what they cost.
_LOOKS = 24
#: A backward pass takes about as long as two forward passes.
_BACKWARD = 2


@dataclass(frozen=True)
class Step:
    """One stage of a run."""

    stage: str
    done: bool
    """Whether it is finished already and would be skipped."""

    devices: int
    """GPUs, or CPU cores, that it holds."""

    device_hours: float
    """What it took where it is done, else the estimate."""


@dataclass(frozen=True)
class Plan:
    """A run that was not started."""

    run: str
    """URI of the run's folder."""

    steps: tuple[Step, ...]
    basis: str
    """Where the estimate comes from."""

    @property
    def left(self) -> float:
        """Device-hours still to come."""
        return sum(step.device_hours for step in self.steps if not step.done)


def plan(config: RunConfig) -> Plan:
    """Check everything, look at what is done, and estimate the rest from the MACs of each stage.

    Starting processes, reading data and exporting are not in it.

    Raises:
        StpError: what `run` would raise before it starts anything expensive.
    """
    summary, net = preflight(config)
    store = Store(config.storage).child(run_id(config))
    require_same(store, inputs(config, summary, net))
    manifest = Manifest(store)
    records = manifest.stages()
    seconds_per_mac, basis = _speed(config, net, summary)
    per_worker, measured = config.cluster.threads_per_worker, latency_threads(config)
    if config.cluster.use_gpu:
        per_worker = measured = 1
    steps = []
    foreseen = {
        budget.label: _foreseen(budget, net.space, seconds_per_mac) for budget in config.budgets
    }
    for stage, workers, macs in _work(config, net, summary, foreseen):
        done = manifest.done(stage) is not None
        spent = records[stage]["device_seconds"] if done else macs * seconds_per_mac * measured
        steps.append(Step(stage, done, workers * per_worker, spent / 3600))
    if timed(config):
        basis += "; latency is taken to follow MACs until it is measured"
    return Plan(store.uri, tuple(steps), basis)


def _foreseen(budget: Budget, space: SearchSpace, seconds_per_mac: float) -> Budget:
    """The budget, with MACs that take as long in place of a latency."""
    if not budget.timed:
        return budget
    least, full = space.cost(space.smallest), space.cost()
    macs, _, seconds = budget.limits(replace(full, latency_s=full.macs * seconds_per_mac))
    enough = max(least.macs, min(macs, seconds / seconds_per_mac))
    return Budget(macs=max(1, int(enough)), params=budget.params)


def _work(
    config: RunConfig, net: Supernet, summary: DataSummary, budgets: Mapping[str, Budget]
) -> Iterable[tuple[str, int, float]]:
    """(stage, workers, MACs of forward and backward passes) of every stage."""
    workers, images = config.cluster.num_workers, summary.train_rows
    full, space = net.cost().macs, net.space

    def training(kind: Training, options: Optimisation, macs_of_an_image: float) -> float:
        once = (1 + _BACKWARD) * macs_of_an_image
        once += full if config.teacher_weight_in(kind) else 0
        return options.epochs * images * once

    if timed(config):
        networks = NETWORKS + NEAR * sum(budget.timed for budget in config.budgets)
        yield LATENCY, 1, 2 * PAIRS * networks * full
    if config.baseline is not None:
        yield "baseline", workers, training("baseline", config.baseline, full)
    draw = sampler(config.supernet.stimulation, space, list(budgets.values()))
    options = config.supernet.optimisation
    yield "supernet", workers, training("supernet", options, full + _drawn(draw, net))
    targets = {
        label: space.fill(space.uniform_within(budget), budget) for label, budget in budgets.items()
    }
    search = config.explore
    looked_at: float = search.calibration_images + search.scoring_images
    mean = sum(net.cost(target).macs for target in targets.values()) / len(targets)
    scorers = config.cluster.explore_workers or workers
    once_more = search.calibration_images + summary.holdout_rows

    def again(steps: int) -> float:
        return once_more + steps * TUNING_BATCH * (1 + _BACKWARD)

    looked_at += search.promote * again(search.tuning_steps)
    finals = search.finalists * len(targets) * again(search.final_steps)
    all_looks = search.generations * search.population * looked_at + finals
    yield "explore", scorers, all_looks * mean
    expansion, finalize = config.finalize.expansion, config.finalize
    for label, target in targets.items():
        macs = net.cost(target).macs + _drawn(ladder(space, target, expansion), net)
        macs += full if expansion.main == "train" else 0
        total = training("finalize", finalize.optimisation, macs)
        if finalize.control:
            total += training("control", config.control_options(), net.cost(target).macs)
        yield f"finalize/{label}", finalize.num_workers, total


def _drawn(draw: Draw, net: Supernet) -> float:
    """MACs of the subnets of a step, averaged over the course of a training."""
    rng = random.Random(0)
    steps: list[Iterable[Subnet]] = [draw(rng, look / _LOOKS) for look in range(_LOOKS)]
    return sum(net.cost(subnet).macs for step in steps for subnet in step) / _LOOKS


def _speed(config: RunConfig, net: Supernet, summary: DataSummary) -> tuple[float, str]:
    """Seconds of one MAC on one worker, and how it was found."""
    if config.cluster.use_gpu and not torch.cuda.is_available():
        text = f"{ASSUMED_FLOPS / 1e12:g} TFLOP/s assumed of each GPU, for there is none here"
        return 2 / ASSUMED_FLOPS, text
    device = torch.device("cuda" if config.cluster.use_gpu else "cpu")
    before, threads = torch.get_num_threads(), latency_threads(config)
    torch.set_num_threads(threads)
    try:
        seconds, count = _training_step(config, net, summary, device)
    finally:
        torch.set_num_threads(before)
    where = "this GPU" if device.type == "cuda" else f"{threads} of this machine's cores"
    return seconds / (net.cost().macs * (1 + _BACKWARD) * count), f"a training step on {where}"


def _training_step(
    config: RunConfig, net: Supernet, summary: DataSummary, device: torch.device
) -> tuple[float, int]:
    """Seconds of one training step of the dense network, and its images; the best of three."""
    batch = config.supernet.optimisation.batch_size // config.cluster.num_workers
    count = max(2, min(batch, 64))
    size = summary.image_size
    images = torch.randn(count, 3, size, size, device=device)
    labels = torch.zeros(count, dtype=torch.long, device=device)
    model = net.model.to(device).train()
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best, count


def costs(plan_: Plan, price: float | None) -> Mapping[str, float] | None:
    """Money for each stage that is still to come; None without a price of a device-hour."""
    if price is None:
        return None
    return {step.stage: price * step.device_hours for step in plan_.steps if not step.done}
