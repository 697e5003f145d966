"""The images of a run as its workers see them: decoded once and shared, or streamed."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from torch import Tensor

from ..data import (
    DataOptions,
    DataSummary,
    ImageData,
    Split,
    SplitName,
    eval_batches,
    load,
    load_split,
    train_batches,
)
from ..errors import ConfigError
from . import cluster
from .ingest import stream, stream_batches, stream_eval_batches

Epochs = Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]

#: Images in a batch that is only looked at.
EVALUATION_BATCH = 512
#: The most images in a batch that BatchNorm statistics are measured on.
CALIBRATION_BATCH = 128
#: CPUs that a task asks for, by who decodes. One that reads alone asks for none: workers may hold
#: them all, and would wait for it for ever. One that decodes has a cluster start more machines.
_READER_CPUS = {"trainer": 0.0, "tasks": 0.25}


@dataclass(frozen=True)
class Images:
    """The images of a run in one process.

    Args:
        options: normalisation and augmentation.
        summary: classes and sizes; with images in memory, `train_rows` counts those that could be
            decoded.
        data: everything decoded; None where the training images are streamed.
    """

    options: DataOptions
    summary: DataSummary
    data: ImageData | None

    def here(self) -> "Images":
        """These images, in this process."""
        return self

    def epochs(
        self, seed: int, batch_size: int, rank: int, world_size: int, device: torch.device,
        *, after: int = 0,
    ) -> Epochs:  # fmt: skip
        """(epoch, first step) -> the rest of that epoch's batches for one worker. Their order and
        augmentation are those of the epochs that come `after` so many."""

        def batches(epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
            place: dict[str, Any] = {"seed": seed, "epoch": after + epoch, "rank": rank}
            place["world_size"] = world_size
            sizes = {"batch_size": batch_size, "num_classes": self.summary.num_classes}
            if self.data is not None:
                return train_batches(
                    self.data.train, self.options, first_step=first_step, device=device,
                    **place, **sizes,
                )  # fmt: skip
            cpus = _READER_CPUS[self.options.decode]
            shard = stream(self.options, "train", num_cpus=cpus, **place)
            return stream_batches(
                shard, self.options, device=device, summary=self.summary, **place, **sizes
            )

        return batches

    def batches(
        self, name: SplitName, device: torch.device, count: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [B, 3, H, W] and labels [B] of a split, without augmentation: all of
        it in order, or a sample of `count` that is the same for every caller."""
        if self.data is not None:
            whole: Split = getattr(self.data, name)
            split = whole if count is None else whole.sample(count)
        elif count is None and name == "test":
            yield from stream_eval_batches(
                stream(self.options, "test", num_cpus=_READER_CPUS[self.options.decode]),
                self.options,
                batch_size=EVALUATION_BATCH,
                rows=self.summary.test_rows,
                device=device,
                summary=self.summary,
            )
            return
        else:
            split = load_split(self.options, name, count)
        yield from eval_batches(split, self.options, EVALUATION_BATCH, device)

    def calibration(self, seed: int, count: int, device: torch.device) -> Iterator[Tensor]:
        """Batches of training images [B, 3, H, W] to measure BatchNorm statistics on, augmented
        as in training: a network trained on padded crops has other statistics on plain images
        (docs/results.md shows what that costs)."""
        return self.augmented(self.sample(count), seed, device)

    def sample(self, count: int) -> Split:
        """So many training images from all over the split, the same for every caller."""
        if self.data is None:
            return load_split(self.options, "train", count)
        return self.data.train.sample(count)

    def augmented(self, split: Split, seed: int, device: torch.device) -> Iterator[Tensor]:
        """Batches [B, 3, H, W] of a split, augmented as in training, always in the same way; equal
        ones, so that fewer images are left out than there are batches."""
        count = math.ceil(len(split) / CALIBRATION_BATCH)
        batches = train_batches(
            split, self.options, seed=seed, epoch=0, device=device,
            batch_size=len(split) // count, num_classes=self.summary.num_classes,
        )  # fmt: skip
        return (images for images, _ in batches)


@dataclass(frozen=True)
class SharedImages:
    """Images in Ray's object store, of which the workers of a node share one copy."""

    options: DataOptions
    summary: DataSummary
    # In a list, so that Ray passes the reference on and not what it stands for.
    reference: list[Any]

    def here(self) -> Images:
        """The images in this process; arrays are views of the object store."""
        return _resident(self.options, self.summary, ray.get(self.reference[0]))


def _resident(options: DataOptions, summary: DataSummary, data: ImageData) -> Images:
    """Images in memory: steps are counted by those to train on that could be decoded."""
    return Images(options, replace(summary, train_rows=len(data.train)), data)


def share(options: DataOptions, summary: DataSummary, *, in_process: bool) -> Images | SharedImages:
    """Decode a small data set once, in this process or on the driver's machine; a larger one is
    left to be streamed."""
    if summary.streams:
        if in_process:
            raise ConfigError(
                "cluster.in_process is set and the data is streamed, which needs Ray; set "
                "data.loading to resident, raise data.resident_limit_mb, or use a cluster"
            )
        return Images(options, summary, None)
    if in_process:
        return _resident(options, summary, load(options))
    # Not on a worker: Ray lets none go that holds an object, and the task would ask for one more.
    task = ray.remote(load).options(num_cpus=0, scheduling_strategy=cluster.beside_driver())
    return SharedImages(options, summary, [task.remote(options)])
