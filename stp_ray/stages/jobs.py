"""One training of a run, in one worker: the same function in this process and under Ray Train.

It loads the newest checkpoint, trains to the end, evaluates, and writes weights, metrics and
`result.json` (last, so that its presence means done). All state is in the run's storage.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..artifacts import Checkpoints, Store
from ..config import RunConfig, Training
from ..data import steps_per_epoch
from ..data.split import derive_seed
from ..elastic import Subnet, Supernet, importance
from ..errors import DataError, StorageError
from ..method import (
    DenseObjective,
    ExpansionObjective,
    Optimisation,
    StimulativeObjective,
    Teacher,
    Trainer,
    evaluate,
    ladder,
    relative_sparsity,
    sampler,
)
from ..method.modes import inspecting
from ..method.training import Draw
from ..models import redraw, untrained
from .images import Images, SharedImages
from .network import build_supernet, price
from .notices import Notices
from .saver import Saver

Report = Callable[[int, Mapping[str, float]], None]

#: Seconds between two reports of progress.
_REPORT_EVERY_S = 1.0

RESULT = "result.json"
WEIGHTS = "model.safetensors"
#: The shared weights behind a pruned network, kept until it is pruned.
SHARED = "shared.safetensors"
METRICS = "metrics.parquet"


@dataclass(frozen=True)
class Job:
    """What to train.

    Args:
        stage: name of the stage in manifest and tracking, such as "finalize/0.15".
        kind: what is trained.
        folder: where in the run's folder it writes.
        run_uri: the run's folder.
        config: the whole configuration.
        options: how this one is optimised.
        target: the subnet (JSON) that finalize and control are about.
    """

    stage: str
    kind: Training
    folder: str
    run_uri: str
    config: RunConfig
    options: Optimisation
    target: str | None = None

    @property
    def run(self) -> Store:
        return Store(self.run_uri)

    @property
    def store(self) -> Store:
        return self.run.child(*self.folder.split("/"))


@dataclass(frozen=True)
class Place:
    """Where a worker stands among the data-parallel ones.

    Args:
        rank, world_size: its number and how many there are.
        shares: into how many parts a step is divided: the workers that the recipe asks for. Where
            fewer are there, each does several parts.
        device: where it computes.
        threads: CPU threads it may use.
    """

    rank: int = 0
    world_size: int = 1
    shares: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The objective under DistributedDataParallel where there are several workers."""
        if self.world_size == 1:
            return objective
        on_gpu = self.device.type == "cuda"
        return DistributedDataParallel(
            objective,
            device_ids=[self.device] if on_gpu else None,
            find_unused_parameters=not getattr(objective, "uses_all_parameters", True),
            gradient_as_bucket_view=True,
        )

    def require_same_step(self, step: int) -> None:
        """Raise RuntimeError unless all workers go on from the same step: one that did not see the
        newest checkpoint would train other weights, and nobody would notice. The group is then
        started again."""
        if self.world_size == 1:
            return
        mine = torch.tensor([step], device=self.device)
        steps = [torch.empty_like(mine) for _ in range(self.world_size)]
        distributed.all_gather(steps, mine)
        found = sorted({int(each) for each in steps})
        if len(found) > 1:
            raise RuntimeError(f"workers found checkpoints of the steps {found}; expected one step")


def train(job: Job, images: Images | SharedImages, place: Place, report: Report) -> None:
    """Train to the end, from the newest checkpoint if there is one.

    Args:
        job: what to train.
        images: the data.
        place: this worker.
        report: takes (step, metrics) on rank 0, every second or so.

    Raises:
        RunError: the loss is not finite, or the data changed while it was read.
        RuntimeError: the workers see different checkpoints.
        StorageError: this worker does not see the run's storage.
    """
    torch.set_num_threads(place.threads)
    store = job.store
    if not job.run.exists("config.json"):
        raise StorageError(
            f"a worker does not see {job.run_uri}; expected storage that driver and workers "
            "share; use a shared folder or object storage such as s3://"
        )
    if store.exists(RESULT):
        return
    local = images.here()
    net = build_supernet(_initial(job), local.summary)
    price(job.config, job.run, net)
    _start(job, net)
    objective, draw = _objective(job, net)
    options = job.options
    if local.data is None:  # a stream goes back to the start of an epoch
        options = replace(options, checkpoint_every=0)
    trainer = Trainer(
        objective,
        options,
        steps_per_epoch=steps_per_epoch(local.summary.train_rows, options.batch_size),
        seed=derive_seed("train", job.config.seed, job.stage),
        rank=place.rank,
        world_size=place.world_size,
        shares=place.shares,
        device=place.device,
        wrap=place.wrap,
        label=_teacher(job, net, place.device),
    )
    checkpoints = Checkpoints(store)
    history: list[dict[str, float]] = []
    means, spent_s = _Means(), 0.0
    found = checkpoints.latest()
    if found is not None:
        _, tensors, meta = found
        _require_images(meta.get("images"), local.summary.train_rows, store)
        trainer.load(tensors, meta)
        history = list(meta["history"])
        # A checkpoint of an earlier version has none of these.
        means, spent_s = _Means.of(meta.get("means", {})), meta.get("seconds", 0.0)
    place.require_same_step(trainer.step)
    reference = _reference_slice(job, net)

    after = job.config.epochs_before(job.kind)  # no epoch is seen twice
    batches = [
        local.epochs(
            derive_seed("data", job.config.seed), options.batch_size, share, place.shares,
            place.device, after=after,
        )
        for share in trainer.shares
    ]  # fmt: skip
    started, last, leaving = time.monotonic() - spent_s, 0.0, False
    with Saver(checkpoints) as saver, Notices() as notices:
        for progress in trainer.run(batches, draw):
            if place.rank != 0:
                continue
            means.add(progress.parts)
            row: dict[str, float] = {}
            if progress.end_of_epoch:
                row = {"step": progress.step, "epoch": progress.epoch + 1, "lr": progress.lr}
                row |= means.values()
                if reference is not None:
                    row |= relative_sparsity(net, reference)
                history.append(row)
                means = _Means()
            # A stream could not go on from the middle of an epoch.
            leaving |= local.data is not None and notices.taken()
            if progress.checkpoint_due or (leaving and trainer.is_finite()):
                tensors, meta = trainer.state()
                meta |= {"history": list(history), "means": means.state()}
                meta["images"] = local.summary.train_rows
                meta["seconds"] = time.monotonic() - started
                leaving &= not saver.save(progress.step, tensors, meta)
            now = time.monotonic()
            if row or now - last > _REPORT_EVERY_S:
                last = now
                report(progress.step, row or {"lr": progress.lr, **progress.metrics})
    if place.rank == 0:
        _finish(job, store, trainer, local, history, time.monotonic() - started)


def _require_images(before: int | None, now: int, store: Store) -> None:
    """Raise DataError if the checkpoint saw another number of training images: each epoch's order
    would be another, and images would be seen twice or never."""
    if before not in (None, now):
        raise DataError(
            f"the newest checkpoint of {store.uri} was trained on {before} images, and {now} can "
            "be read; expected as many; mend the data, or delete that folder to train anew"
        )


def seconds_spent(store: Store) -> float:
    """How long a job has trained for what its newest checkpoint holds, over all attempts.

    Args:
        store: where the job writes.
    """
    return float(Checkpoints(store).newest_meta().get("seconds", 0.0))


@dataclass
class _Means:
    """The loss and its parts, averaged over the steps of an epoch so far.

    Args:
        count: steps.
        sums: of each part.
    """

    count: int = 0
    sums: dict[str, Tensor | float] = field(default_factory=dict)

    def add(self, parts: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, part in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + part

    def values(self) -> dict[str, float]:
        return {name: float(total) / self.count for name, total in self.sums.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint; sums as text, for JSON has no numbers that are not finite."""
        return {"count": self.count, "sums": {n: str(float(s)) for n, s in self.sums.items()}}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "_Means":
        means = cls(state.get("count", 0))
        means.sums.update({n: float(text) for n, text in state.get("sums", {}).items()})
        return means


def _initial(job: Job) -> RunConfig:
    """The configuration of the network that a job starts from: the control's has no weights given,
    for `redraw` leaves some as they are."""
    if job.kind != "control":
        return job.config
    model = job.config.model
    drawn = {"weights": None, "ranking": None, "kwargs": untrained(model.name, model.kwargs)}
    return job.config.model_copy(update={"model": model.model_copy(update=drawn)})


def _start(job: Job, net: Supernet) -> None:
    """Have the network the weights of the stage that its training goes on from, if there is one."""
    config = job.config
    if job.kind == "finalize":
        net.model.load_state_dict(job.run.child("supernet").load_tensors(WEIGHTS))
    elif job.kind == "supernet" and config.supernet.from_baseline:
        net.model.load_state_dict(job.run.child("baseline").load_tensors(WEIGHTS))
        if config.model.ranking:
            net.rank(importance(net, config.model.ranking))


def _objective(job: Job, net: Supernet) -> tuple[nn.Module, Draw]:
    config, smoothing = job.config, job.options.label_smoothing
    target = Subnet.from_json(job.target) if job.target else net.space.full
    match job.kind:
        case "baseline":
            return DenseObjective(net.model, smoothing), _no_subnets
        case "control":
            return DenseObjective(redraw(net.extract(target)), smoothing), _no_subnets
        case "supernet":
            stimulation = config.supernet.stimulation
            draw = sampler(stimulation, net.space, config.budgets)
            return StimulativeObjective(net, stimulation, smoothing), draw
        case "finalize":
            expansion = config.finalize.expansion
            objective = ExpansionObjective(net, target, expansion, smoothing)
            return objective, ladder(net.space, target, expansion)


def _teacher(job: Job, net: Supernet, device: torch.device) -> Teacher | None:
    """The baseline, where it has a say in the labels."""
    weight = job.config.teacher_weight_in(job.kind)
    if not weight:
        return None
    dense = copy.deepcopy(net.model)
    dense.load_state_dict(job.run.child("baseline").load_tensors(WEIGHTS))
    return Teacher(dense.to(device), weight)


def _no_subnets(rng: Any, progress: float) -> Sequence[Subnet]:
    return ()


def _reference_slice(job: Job, net: Supernet) -> Subnet | None:
    """The slice whose relative sparsity is logged: the target, or before there is one the
    uniform-width subnet of the smallest budget."""
    if job.kind == "finalize" and job.target:
        return Subnet.from_json(job.target)
    if job.kind == "supernet":
        return min(
            (net.space.uniform_within(budget) for budget in job.config.budgets),
            key=lambda subnet: net.cost(subnet).macs,
        )
    return None


def _finish(
    job: Job,
    store: Store,
    trainer: Trainer,
    images: Images,
    history: list[dict[str, float]],
    seconds: float,
) -> None:
    objective = trainer.objective
    network = (
        objective.model
        if isinstance(objective, DenseObjective)
        else cast(Supernet, objective.net).model
    )
    assert isinstance(network, nn.Module)
    weights = SHARED if job.kind == "finalize" else WEIGHTS
    with trainer.averaged(), inspecting(network):
        metrics = evaluate(network, images.batches("test", trainer.device))
        outputs = {weights: store.save_tensors(weights, network.state_dict())}
    if history:  # a baseline that was given has none
        outputs[METRICS] = store.write_table(METRICS, history)
    store.write_json(
        RESULT,
        {
            "metrics": {"top1": metrics["top1"], "test_loss": metrics["loss"]},
            "outputs": outputs,
            "seconds": seconds,
        },
    )
