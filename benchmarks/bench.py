"""The bench that every method of `accuracy.py` is trained on: the same images, batches, optimiser
and arithmetic, and one count of what training costs. Needs neither Ray nor pydantic."""

import copy
import fcntl
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from stp_ray.data.batches import Augmentation, augmentation_seed, normalise_batch
from stp_ray.data.load import load
from stp_ray.data.options import DataOptions
from stp_ray.data.split import derive_seed
from stp_ray.elastic import Subnet, Supernet
from stp_ray.elastic.attention import unfused_attention
from stp_ray.method import Exploration, Optimisation, Trainer, evaluate
from stp_ray.method.modes import device_of, inspecting
from stp_ray.method.training import Label
from stp_ray.models import build_model, redraw

#: A backward pass costs two forward passes: one for the inputs' gradients, one for the weights'.
STEP = 3
EVALUATION_BATCH = 500


def layout(device: torch.device) -> torch.memory_format:
    """Channels last on a GPU, where it pays. On a CPU torch 2.15's backward convolution writes past
    its memory for some of the odd widths that subnets have."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What all methods share."""

    model: str
    model_options: dict[str, Any] = field(default_factory=dict)
    """What its constructor gets besides the size of the images and the number of classes."""
    redrawn: bool = False
    """Draw its weights by `redraw`, as those of shapes from scratch are, where its constructor has
    other rules: or the one or the other would start ahead."""
    divisor: int | None = None
    """Widths are multiples of it; None for what the tracer chooses."""
    data: DataOptions
    epochs: int
    """Passes over the images that each method has under equal epochs."""
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    warmup_epochs: float = 1.0
    weight_decay: float = 5e-4
    precision: str = "fp32"
    calibration_images: int = 2048
    exploration: Exploration = field(default_factory=Exploration)
    budgets: tuple[float, ...] = (0.15, 0.05)
    """What the supernet is trained towards and pruned to."""
    also: tuple[float, ...] = ()
    """What the same supernet is pruned to besides, after a search of their own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str = "stp"
    """The method whose expense is what equal MACs are equal to."""


class Images:
    """A data set on the device, each split as one tensor of bytes."""

    def __init__(self, options: DataOptions, device: torch.device) -> None:
        found = load(options)
        self.options, self.device, self.classes = options, device, len(found.class_names)
        splits = {"train": found.train, "holdout": found.holdout, "test": found.test}
        self._splits = {
            name: tuple(torch.from_numpy(part).to(device) for part in (split.images, split.labels))
            for name, split in splits.items()
        }
        self.size = options.image_size or found.train.images.shape[-1]

    def count(self, split: str) -> int:
        return len(self._splits[split][1])

    def epoch(
        self, seed: int, epoch: int, batch_size: int, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented training batches in this epoch's order, without a last, incomplete one."""
        images, labels = self._splits["train"]
        augment = Augmentation(self.options, images.shape[-1], self.classes)
        order = torch.randperm(
            len(labels), generator=torch.Generator().manual_seed(derive_seed("order", seed, epoch))
        ).to(self.device)
        for step in range(first, len(labels) // batch_size):
            rows = order[step * batch_size : (step + 1) * batch_size]
            x, y = augment(images[rows], labels[rows], seed=augmentation_seed(seed, epoch, step, 0))
            yield x.contiguous(memory_format=layout(self.device)), y

    def plain(self, split: str, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a split in order, or of its first images, not augmented."""
        images, labels = (tensor[:count] for tensor in self._splits[split])
        for start in range(0, len(labels), EVALUATION_BATCH):
            rows = slice(start, start + EVALUATION_BATCH)
            x = normalise_batch(images[rows], self.options)
            yield x.contiguous(memory_format=layout(self.device)), labels[rows]

    def calibration(self, seed: int, count: int) -> Iterator[Tensor]:
        """About `count` augmented training images, in batches."""
        batch = min(256, count, self.count("train"))
        for step, (images, _) in enumerate(self.epoch(seed, 0, batch)):
            if step * batch >= count:
                return
            yield images


class Bench:
    """One seed of a protocol.

    Args:
        protocol: what all methods share.
        images: its data.
        seed: of initial weights, batches, augmentation and search.
        work: where weights are kept that several methods need.
    """

    def __init__(self, protocol: Protocol, images: Images, seed: int, work: Path) -> None:
        self.protocol, self.images, self.seed, self.work = protocol, images, seed, work
        self.example = torch.zeros(1, 3, images.size, images.size)
        self.full_macs = macs_of(self.fresh(), self.example)

    def reseeded(self, by: int) -> "Bench":
        """The same, whose seed is so much further."""
        other = copy.copy(self)
        other.seed += by
        return other

    def fresh(self) -> nn.Module:
        """The dense model with this seed's first weights."""
        torch.manual_seed(self.seed)
        model = build_model(
            self.protocol.model, num_classes=self.images.classes, image_size=self.images.size,
            **self.protocol.model_options,
        )  # fmt: skip
        return self.redrawn(model) if self.protocol.redrawn else model

    def redrawn(self, model: nn.Module) -> nn.Module:
        """The model, with this seed's first weights drawn for its own widths."""
        torch.manual_seed(self.seed)
        return redraw(model)

    def supernet(self) -> Supernet:
        """The same, traced."""
        net = Supernet.trace(self.fresh(), self.example, divisor=self.protocol.divisor)
        return self.ready(net)

    def ready(self, module: nn.Module) -> Any:
        """On the device, in its layout."""
        device = self.images.device
        return module.to(device).to(memory_format=layout(device))

    def train(
        self,
        objective: nn.Module,
        epochs: int,
        *,
        macs: int,
        draw: Callable[[random.Random, float], Sequence[Subnet]] = lambda rng, progress: (),
        price: Callable[[Subnet], int] = lambda subnet: 0,
        lr: tuple[float, float] = (1.0, 0.0),
        warm: bool = True,
        decay: float | None = None,
        after: int = 0,
        label: Label | None = None,
        before_step: Callable[[], object] | None = None,
        at_epoch: Callable[[int], object] = lambda epoch: None,
    ) -> int:
        """Train, and return what it cost in MACs, forward and backward.

        Args:
            objective: maps (images, labels, subnets, backward) to losses, as the trainer's do.
            epochs: passes over the training images.
            macs: of one image in one step, but for the drawn subnets.
            draw: the subnets of a step.
            price: MACs of one image in one step for a drawn subnet.
            lr: where the learning rate starts and ends, as shares of the protocol's.
            warm: start with a warm-up.
            decay: weight decay; None for the protocol's.
            after: epochs that the network has seen before, whose order and augmentation do not
                come again.
            label: as the trainer's.
            before_step: called before each step of the optimiser, the gradients being there.
            at_epoch: called with the number of epochs done.
        """
        protocol, spent = self.protocol, 0
        options = replace(
            self.optimisation(epochs, lr=lr[0]), min_lr=lr[1] / lr[0],
            warmup_epochs=min(protocol.warmup_epochs, epochs) if warm else 0,
            weight_decay=protocol.weight_decay if decay is None else decay,
        )  # fmt: skip
        self.ready(objective)
        trainer = Trainer(
            objective, options, steps_per_epoch=self.images.count("train") // protocol.batch_size,
            seed=self.seed, device=self.images.device, label=label,
        )  # fmt: skip

        def counted(rng: random.Random, progress: float) -> Sequence[Subnet]:
            nonlocal spent
            subnets = draw(rng, progress)
            spent += protocol.batch_size * (macs + sum(price(subnet) for subnet in subnets))
            return subnets

        with _hooked(before_step):
            for step in trainer.run(
                lambda epoch, first: self.images.epoch(
                    self.seed, after + epoch, protocol.batch_size, first
                ),
                counted,
            ):
                if step.end_of_epoch:
                    at_epoch(step.epoch + 1)
        return spent

    def optimisation(self, epochs: int, *, lr: float) -> Optimisation:
        """How networks are trained, without a warm-up, from this share of the protocol's learning
        rate down to zero."""
        protocol = self.protocol
        return Optimisation(
            epochs=epochs, batch_size=protocol.batch_size, optimizer=protocol.optimizer,
            lr=protocol.lr * lr, weight_decay=protocol.weight_decay, precision=protocol.precision,
            warmup_epochs=0,
        )  # fmt: skip

    def top1(self, forward: Callable[[Tensor], Tensor]) -> float:
        return evaluate(forward, self.images.plain("test"))["top1"]

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Tensors and numbers that were made before, or are made and kept now. Of several processes
        that want the same, one makes it and the others wait."""
        path = self.work / f"seed{self.seed}-{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{path}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                part = Path(f"{path}.part")
                torch.save(make(), part)
                part.rename(path)
        return torch.load(path, map_location=self.images.device, weights_only=True)


@contextmanager
def _hooked(call: Callable[[], object] | None) -> Iterator[None]:
    if call is None:
        yield
        return
    handle = register_optimizer_step_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        handle.remove()


def macs_of(model: nn.Module, example: Tensor) -> int:
    """MACs of one image, as torch counts them."""
    with inspecting(model), unfused_attention(), FlopCounterMode(display=False) as counter:
        model(example.to(device_of(model)))
    return counter.get_total_flops() // 2
