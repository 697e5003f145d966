"""What a step of supernet training costs beside the arithmetic that it cannot do without.

    python benchmarks/speed.py step --model resnet20 --subnets 1
    python benchmarks/speed.py memory --model resnet20
    python benchmarks/speed.py parallel --workers 2

`step`: our step against a dense step and the extracted subnets alone, and against the other ways
to run it. `memory`: the peak of our step against the dense one's. `parallel`: bytes reduced in a
step, and images a second, of data-parallel workers of one thread each.

All sides of a ratio are timed in turn in one run. One line of JSON for each measurement goes into
`benchmarks/results/speed/`; `benchmarks/results.py render` makes the tables of
docs/performance.md. Needs neither Ray nor pydantic.
"""

import argparse
import gc
import json
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from surroundings import surroundings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import VisionTransformer

from stp_ray.elastic import Subnet, Supernet
from stp_ray.method import (
    Optimisation,
    Stimulation,
    StimulativeObjective,
    Trainer,
    cross_entropy,
    kl_divergence,
)
from stp_ray.models import build_model

KEPT = Path(__file__).resolve().parent / "results" / "speed"


@dataclass(frozen=True)
class Case:
    """A model, and the images of a step."""

    size: int
    batch: int
    classes: int = 10
    make: Callable[..., nn.Module] | None = None


def vit_small(num_classes: int, image_size: int) -> nn.Module:
    """The small ViT of DeiT (Touvron et al., 2021) with patches of 4 pixels."""
    return VisionTransformer(
        image_size, 4, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536,
        num_classes=num_classes,
    )  # fmt: skip


CASES = {
    "resnet20": Case(size=32, batch=128),
    "resnet50": Case(size=96, batch=16, classes=1000),
    "mobilenet_v2": Case(size=96, batch=16, classes=1000),
    "vit_small": Case(size=32, batch=64, make=vit_small),
}


class Setting:
    """A supernet, its dense twin, and one batch."""

    def __init__(self, name: str, device: torch.device) -> None:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        self.case = CASES[name]
        self.device = device
        kwargs = {"num_classes": self.case.classes, "image_size": self.case.size}
        make = self.case.make or partial(build_model, name)
        self.dense = make(**kwargs)
        shape = (self.case.batch, 3, self.case.size, self.case.size)
        self.images = torch.randn(shape, device=device)
        self.labels = torch.randint(self.case.classes, shape[:1], device=device)
        self.net = Supernet.trace(self.dense, self.images[:1].cpu()).to(device)
        self.dense.to(device)

    def dense_step(self) -> Callable[[], object]:
        """Plain PyTorch: forward, backward, and the optimiser."""
        model = self.dense.train()
        optimizer = _sgd(model)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(model(self.images), self.labels).backward()
            optimizer.step()

        return step

    def our_step(
        self, subnets: Sequence[Subnet], wrap: Callable[[nn.Module], nn.Module] = lambda m: m
    ) -> Callable[[], object]:
        """A step of the trainer, with everything that it does."""
        trainer = Trainer(
            StimulativeObjective(self.net, Stimulation(subnets=len(subnets))),
            Optimisation(epochs=1, batch_size=self.case.batch, nesterov=False),
            steps_per_epoch=10**6, seed=0, device=self.device, wrap=wrap,
        )  # fmt: skip
        batches = iter(lambda: (self.images, self.labels), None)
        steps = trainer.run(lambda epoch, first: batches, lambda rng, progress: subnets)
        return lambda: next(steps)

    def alone(self, subnet: Subnet) -> Callable[[], object]:
        """The extracted subnet learning from fixed logits, forward and backward."""
        model = self.net.train().extract(subnet)
        logits = torch.randn(self.case.batch, self.case.classes, device=self.device)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            kl_divergence(logits, model(self.images)).backward()

        return step


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


# -- the other ways ---------------------------------------------------------------------


def at_once(setting: Setting, subnets: Sequence[Subnet]) -> Callable[[], object]:
    """One graph over the main network and all subnets, slices taken by autograd."""
    net, optimizer = setting.net.train(), _sgd(setting.net)
    objective = StimulativeObjective(net, Stimulation(subnets=len(subnets)))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(setting.images, setting.labels, subnets)["loss"].backward()
        optimizer.step()

    return step


def one_by_one(setting: Setting, subnets: Sequence[Subnet]) -> Callable[[], object]:
    """A backward pass for the main network and one for each subnet, slices taken by autograd."""
    net, optimizer = setting.net.train(), _sgd(setting.net)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        main = net(setting.images)
        cross_entropy(main, setting.labels).backward()
        for subnet in subnets:
            loss = kl_divergence(main, net(setting.images, subnet))
            (loss / len(subnets)).backward()
        optimizer.step()

    return step


def masking(setting: Setting, subnets: Sequence[Subnet]) -> Callable[[], object]:
    """The whole network for each subnet, the outputs of its layers multiplied by zeros and ones."""
    model, optimizer = setting.dense.train(), _sgd(setting.dense)
    masks = [_masks(setting, subnet) for subnet in subnets]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        main = model(setting.images)
        cross_entropy(main, setting.labels).backward()
        for kept in masks:
            hooks = [
                layer.register_forward_hook(lambda _, __, out, mask=mask: out * mask)
                for layer, mask in kept
            ]
            loss = kl_divergence(main, model(setting.images))
            for hook in hooks:
                hook.remove()
            (loss / len(subnets)).backward()
        optimizer.step()

    return step


def _masks(setting: Setting, subnet: Subnet) -> list[tuple[nn.Module, Tensor]]:
    """Zeros and ones for the output channels of every convolution and normalisation."""
    found = []
    for name, cuts in setting.net.slices(subnet).items():
        layer = setting.dense.get_submodule(name.rpartition(".")[0])
        if name.endswith("weight") and 0 in cuts and not isinstance(layer, nn.Linear):
            mask = torch.zeros(len(layer.weight), device=setting.device)
            for start, stop in cuts[0]:
                mask[start:stop] = 1
            spatial = not isinstance(layer, nn.LayerNorm)
            found.append((layer, mask[:, None, None] if spatial else mask))
    return found


OTHERS = {"all at once": at_once, "one by one": one_by_one, "masking": masking}


# -- measurements ---------------------------------------------------------------------------


def step(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Ratios of each way's time to that of the dense step and the subnets alone."""
    setting = Setting(arguments.model, device)
    rng, count = random.Random(0), arguments.subnets
    ratios: dict[str, list[float]] = {name: [] for name in ("ours", *OTHERS)}
    dense = []
    for _ in range(arguments.draws):
        subnets = [setting.net.space.sample(rng) for _ in range(count)]
        ways = {
            "dense": setting.dense_step(),
            **{f"alone {i}": setting.alone(subnet) for i, subnet in enumerate(subnets)},
            "ours": setting.our_step(subnets),
            **{name: make(setting, subnets) for name, make in OTHERS.items()},
        }
        taken = in_turn(ways, arguments.repeats, device, arguments.processor_time)
        floor = taken["dense"] + sum(taken[f"alone {i}"] for i in range(count))
        dense.append(taken["dense"])
        for name, ratio in ratios.items():
            ratio.append(taken[name] / floor)
    return {
        "model": arguments.model, "size": setting.case.size, "batch": setting.case.batch,
        "subnets": count, "draws": arguments.draws, "repeats": arguments.repeats,
        "clock": "processor" if arguments.processor_time else "wall",
        "dense_s": round(statistics.median(dense), 4),
        "ratio": {name: round(statistics.median(found), 3) for name, found in ratios.items()},
        "quartiles": {
            name: [round(q, 3) for q in statistics.quantiles(found, n=4)[::2]]
            for name, found in ratios.items()
        },
    }  # fmt: skip


def in_turn(
    ways: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    processor_time: bool = False,
) -> dict[str, float]:
    """Median seconds of each, after one call that is not timed."""
    clock = time.process_time if processor_time else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name in random.Random(turn).sample(sorted(ways), len(ways)):
            wait(device)
            started = clock()
            ways[name]()
            wait(device)
            if turn:
                taken[name].append(clock() - started)
    return {name: statistics.median(found) for name, found in taken.items()}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Growth of the peak over three steps, each side in a process of its own."""
    count = arguments.subnets
    peaks = {}
    for name in ("dense", "ours", "all at once"):
        found = [
            _in_process(_peak, arguments.model, name, count, draw, device) for draw in range(5)
        ]
        peaks[name] = statistics.median(found)
    return {
        "model": arguments.model, "subnets": count,
        "peak_mb": {name: round(peak, 1) for name, peak in peaks.items()},
        "ratio": {name: round(peak / peaks["dense"], 3) for name, peak in peaks.items()},
    }  # fmt: skip


def _peak(model: str, name: str, count: int, draw: int, device: torch.device) -> float:
    """MB between a model that has been built and the peak of its steps."""
    setting = Setting(model, device)
    rng = random.Random(draw)
    subnets = [setting.net.space.sample(rng) for _ in range(count)]
    if name == "dense":
        work = setting.dense_step()
    elif name == "ours":
        work = setting.our_step(subnets)
    else:
        work = OTHERS[name](setting, subnets)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _peak_rss()
    for _ in range(3):
        work()
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_rss()
    return (after - before) / 2**20


def _peak_rss() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def _in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(work, arguments)


def parallel(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Images a second of one worker and of several, in turn; bytes that a step reduces."""
    rates: dict[int, list[float]] = {1: [], arguments.workers: []}
    reduced: dict[int, int] = {}
    for _ in range(arguments.repeats):
        for workers in rates:
            for count in (arguments.subnets, 2 * arguments.subnets):
                found = _run_workers(arguments.model, workers, count)
                if count == arguments.subnets:
                    rates[workers].append(found["rate"])
                if workers > 1:
                    reduced[count] = found["bytes"]
    single, several = (statistics.median(rate) for rate in rates.values())
    return {
        "model": arguments.model, "subnets": arguments.subnets, "workers": arguments.workers,
        "images_per_s": {str(n): round(statistics.median(rate), 1) for n, rate in rates.items()},
        "efficiency": round(several / single / arguments.workers, 3),
        "gradient_bytes": found["gradient_bytes"],
        "reduced_bytes": {str(count): size for count, size in reduced.items()},
    }  # fmt: skip


def _run_workers(model: str, workers: int, count: int) -> dict[str, Any]:
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        found = manager.dict()
        port = random.randint(20_000, 60_000)
        torch.multiprocessing.spawn(
            _worker, (workers, model, count, port, found), nprocs=workers, join=True
        )
        return dict(found)


def _worker(rank: int, workers: int, model: str, count: int, port: int, found: Any) -> None:
    torch.set_num_threads(1)
    setting = Setting(model, torch.device("cpu"))
    rng = random.Random(0)
    subnets = [setting.net.space.sample(rng) for _ in range(count)]
    sent = [0]

    def wrap(objective: nn.Module) -> nn.Module:
        if workers == 1:
            return objective
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)
        module = DistributedDataParallel(objective, gradient_as_bucket_view=True)

        def hook(state: object, bucket: Any) -> Any:
            sent[0] += bucket.buffer().nbytes
            return torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(
                None, bucket
            )

        module.register_comm_hook(None, hook)
        return module

    work = setting.our_step(subnets, wrap)
    for _ in range(3):
        work()
    sent[0], steps, started = 0, 0, time.perf_counter()
    while steps < 10:
        work()
        steps += 1
    taken = time.perf_counter() - started
    if rank == 0:
        found["rate"] = workers * steps * setting.case.batch / taken
        found["bytes"] = sent[0] // steps
        found["gradient_bytes"] = sum(p.nbytes for p in setting.net.parameters())
    if workers > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for action, about in (("step", step), ("memory", memory), ("parallel", parallel)):
        each = actions.add_parser(action, help=about.__doc__)
        each.add_argument("--model", choices=list(CASES), default="resnet20")
        each.add_argument("--subnets", type=int, default=1, help="K")
        each.add_argument("--repeats", type=int, default=3)
        each.add_argument("--threads", type=int, help="default: one for each core")
        if action == "step":
            each.add_argument("--draws", type=int, default=16, help="sets of K random subnets")
            each.add_argument(
                "--processor-time",
                action="store_true",
                help="for cores that other programs use too; with one thread",
            )
        if action == "parallel":
            each.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = {"step": step, "memory": memory, "parallel": parallel}[arguments.action]
    around = surroundings(device)
    line = {
        **work(arguments, device),
        **around,
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{arguments.action}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=2))


if __name__ == "__main__":
    main()
