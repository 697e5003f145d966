"""The networks and batches that are timed, and how."""

import argparse
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
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

#: oneDNN, which computes convolutions on a CPU, compiles for each shape and keeps the last 1,024
#: kernels: fewer than five networks in turn need, which would then compile each other's again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")

#: A line of results.
Line = dict[str, Any]


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

    def dense_step(
        self, wrap: Callable[[nn.Module], nn.Module] = lambda m: m
    ) -> Callable[[], object]:
        """Plain PyTorch: forward, backward, and the optimiser."""
        model = wrap(self.dense.train())
        optimizer = sgd(model)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(model(self.images), self.labels).backward()
            optimizer.step()

        return step

    def our_step(
        self,
        subnets: Sequence[Subnet],
        wrap: Callable[[nn.Module], nn.Module] = lambda m: m,
        rank: int = 0,
        world_size: int = 1,
    ) -> Callable[[], object]:
        """A step of the trainer, with everything that it does."""
        trainer = Trainer(
            StimulativeObjective(self.net, Stimulation(subnets=len(subnets))),
            Optimisation(epochs=1, batch_size=self.case.batch, nesterov=False),
            steps_per_epoch=10**6, seed=0, rank=rank, world_size=world_size, device=self.device,
            wrap=wrap,
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


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


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


def model_options(parser: argparse.ArgumentParser, repeats: int = 3) -> None:
    parser.add_argument("--model", choices=list(CASES), default="resnet20")
    parser.add_argument("--subnets", type=int, default=1, help="K")
    parser.add_argument("--repeats", type=int, default=repeats)


def clock_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="for cores that other programs use too; with one thread",
    )


def clock(arguments: argparse.Namespace) -> str:
    return "processor" if arguments.processor_time else "wall"
