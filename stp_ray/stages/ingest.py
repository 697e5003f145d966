"""Data sets too large to be kept decoded in memory: Parquet streamed through Ray Data.

Every rank opens a stream of its own for every epoch:

    shard = stream(options, "train", seed=seed, epoch=epoch, rank=rank, world_size=world_size)
    for images, labels in stream_batches(shard, options, seed=seed, epoch=epoch, ...):

Row groups are put in an order drawn from (seed, epoch) and divided evenly between the ranks;
Ray tasks anywhere in the cluster read and decode them, and each rank mixes what arrives in a
buffer. So the batches of an epoch depend on (seed, epoch, rank, world size) alone, and an epoch
that was interrupted begins again with the same ones.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray.data
import ray.train
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError
from torch import Tensor

from ..data import DataOptions, DataSummary, SplitName, describe, local_batch_size, steps_per_epoch
from ..data.batches import Augmentation, augmentation_seed, normalise_batch, to_device
from ..data.load import check_corrupt, open_source, prepare, selection, summarise
from ..data.parquet import CHUNK_ROWS, Columns, ParquetPart, ParquetSource, read_part
from ..data.split import derive_seed
from ..data.storage import open_filesystem, reading
from ..errors import DataError, StpError

_UNIT_BYTES = 32 * 2**20
_UNIT_ROWS = 1024
_BUFFER_BYTES = 512 * 2**20
_log = logging.getLogger(__name__)

_Unit = list[ParquetPart]
_Pair = tuple[NDArray[np.uint8], NDArray[np.int64]]


def stream(
    options: DataOptions,
    split: SplitName,
    *,
    seed: int = 0,
    epoch: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_cpus: float = 1.0,
) -> ray.data.Dataset:
    """A lazy Ray Dataset of decoded images: one rank's share of a split.

    Its columns are `image` (uint8 RGB [3, H, W]), `label` (int64) and `skipped` (int64: how many
    unreadable images were left out just before or after this row; 0 for nearly all rows). The
    row order does not depend on timing. Storage is read through fsspec by the tasks, which take
    endpoint and credentials from their own environment.

    Args:
        options: the data; `name` must be "parquet".
        split: "train", "holdout" or "test".
        seed: the run's seed.
        epoch: puts the row groups in the random order of this epoch; None keeps their order.
        rank: which share of the rows; the shares are disjoint and differ by at most one row.
        world_size: number of shares.
        num_cpus: CPUs that each reading task asks Ray for.

    Raises:
        DataError: as `stp_ray.data.describe`, or the data is not Parquet.
    """
    source = open_source(options)
    if not isinstance(source, ParquetSource):
        raise DataError(
            f"data.name is {options.name}; expected parquet, the only kind that streams; "
            'set data.loading to "resident"'
        )
    layout = source.layout()
    rows = selection(options, layout)[split]
    units = _units(source.parts("test" if split == "test" else "train", rows))
    if epoch is not None:
        order = np.random.default_rng(derive_seed("units", seed, epoch)).permutation(len(units))
        units = [units[index] for index in order]
    units = _share(units, rank, world_size)
    plan = _Plan(
        uri=source.full_uri,
        columns=source.columns,
        options=options,
        summary=summarise(options, layout),
        units=units,
        allowed=options.max_corrupt * len(rows),
    )
    dataset = ray.data.range(len(units), override_num_blocks=max(len(units), 1)).map_batches(
        partial(_read_units, plan), batch_size=None, num_cpus=num_cpus
    )
    dataset.context.execution_options.preserve_order = True
    # A chunk of large images is a block as it is; Ray would copy several into one of 128 MiB.
    chunk = CHUNK_ROWS * 3 * plan.summary.held_size**2
    dataset.context.target_max_block_size = max(chunk, _UNIT_BYTES)
    if world_size > 1:
        # Each rank's stream takes half of the object store for its own, unless it is told.
        memory = ray.cluster_resources().get("object_store_memory", 0) / 2 / world_size
        dataset.context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
            object_store_memory=memory
        )
    dataset.context.enable_progress_bars = False
    return dataset


def stream_batches(
    shard: ray.data.Dataset | ray.data.DataIterator,
    options: DataOptions,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    num_classes: int,
    summary: DataSummary | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of this rank's training batches from a stream.

    Every rank makes the same number of steps, `steps_per_epoch(train_rows, batch_size)`: where
    images were skipped, others of the same shard take their place.

    Args:
        shard: `stream(options, "train", seed=..., epoch=..., rank=..., world_size=...)`. A shard
            of Ray Train serves too; its order is then Ray's and only mixed by (seed, epoch).
        options: normalisation and augmentation.
        seed: the run's seed.
        epoch: number of the epoch.
        batch_size: images in a global batch, over all ranks.
        rank: this rank.
        world_size: number of ranks.
        device: where the batches are augmented and go to.
        num_classes: number of classes, for mixup's soft labels.
        summary: `describe(options)` where it is known already; it takes a look at the storage.

    Yields:
        The same as `stp_ray.data.train_batches`: images float32 [B / world_size, 3, H, W] and
        labels int64 [B / world_size], or float32 [B / world_size, num_classes] with mixup.

    Raises:
        DataError: more than `max_corrupt` of the share cannot be decoded, or nothing arrives.
    """
    summary = summary or describe(options)
    local = local_batch_size(batch_size, world_size)
    steps = steps_per_epoch(summary.train_rows, batch_size)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        augment = Augmentation(options, summary.held_size, num_classes)
        random = np.random.default_rng(derive_seed("buffer", seed, epoch, rank))
        image_bytes = 3 * summary.held_size**2
        capacity = max(_BUFFER_BYTES // image_bytes, 4 * local)
        share = -(-summary.train_rows // world_size)
        arriving = _arriving(shard, options, "training", local, share)
        mixed = _rebatched(_mixed(arriving, capacity, random), local)
        for step, (images, labels) in zip(range(steps), mixed, strict=False):
            pair = to_device(images, labels, device)
            yield augment(*pair, seed=augmentation_seed(seed, epoch, step, rank))

    return batches()


def stream_eval_batches(
    shard: ray.data.Dataset | ray.data.DataIterator,
    options: DataOptions,
    *,
    batch_size: int,
    rows: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of `stream(options, "test")` in order, normalised and not augmented.

    Args:
        shard: the stream.
        options: normalisation.
        batch_size: images in a batch; the last one may be smaller.
        rows: number of images that the shard should hold, to judge the unreadable ones by.
        device: where the batches go to.

    Yields:
        The same as `stp_ray.data.eval_batches`.

    Raises:
        DataError: more than `max_corrupt` of `rows` cannot be decoded.
    """
    for images, labels in _arriving(shard, options, "test", batch_size, rows):
        on_device, labels_there = to_device(images, labels, device)
        yield normalise_batch(on_device, options), labels_there


def ingest_config() -> ray.train.DataConfig:
    """Ray Train's own ingest with a row order that does not depend on timing.

    For `TorchTrainer(datasets={"train": stream(options, "train")}, dataset_config=...)`.
    """
    execution = ray.data.ExecutionOptions(preserve_order=True)
    return ray.train.DataConfig(execution_options=execution, enable_shard_locality=False)


def _units(parts: list[ParquetPart]) -> list[_Unit]:
    """Row groups of a file that one task reads: up to 1,024 rows or 32 MiB, but at least one."""
    units: list[_Unit] = []
    size = rows = 0
    for part in parts:
        new = not units or units[-1][-1].path != part.path
        if new or size + part.size > _UNIT_BYTES or rows + len(part.rows) > _UNIT_ROWS:
            units.append([])
            size = rows = 0
        units[-1].append(part)
        size += part.size
        rows += len(part.rows)
    return units


def _share(units: list[_Unit], rank: int, world_size: int) -> list[_Unit]:
    """The rows of one rank: an equal stretch of all rows in order, cutting a unit where need be."""
    total = sum(len(part.rows) for unit in units for part in unit)
    begin, end = total * rank // world_size, total * (rank + 1) // world_size
    shared: list[_Unit] = []
    first = 0
    for unit in units:
        kept = []
        for part in unit:
            low, high = max(begin - first, 0), min(end - first, len(part.rows))
            if low < high:
                kept.append(replace(part, rows=part.rows[low:high]))
            first += len(part.rows)
        if kept:
            shared.append(kept)
    return shared


@dataclass(frozen=True)
class _Plan:
    """What the reading tasks of one stream know."""

    uri: str
    """Absolute, so that it means the same in every process."""

    columns: Columns
    options: DataOptions
    summary: DataSummary
    units: list[_Unit]
    allowed: float
    """Number of unreadable images that the whole split may have."""


def _read_units(plan: _Plan, batch: Any) -> Iterator[dict[str, NDArray[Any]]]:
    """Read and decode some units: the work of one Ray task."""
    filesystem, _ = open_filesystem(plan.uri)
    for index in batch["id"]:
        yield from _read_unit(plan, filesystem, plan.units[index])


def _read_unit(plan: _Plan, filesystem: Any, unit: _Unit) -> Iterator[dict[str, NDArray[Any]]]:
    # One block is held back, so that the count of what was skipped after it finds a row.
    block: dict[str, NDArray[Any]] | None = None
    skipped = 0
    for part in unit:
        with reading(plan.uri):
            for chunk in read_part(filesystem, part, plan.columns):
                _, images, labels = prepare(chunk, plan.options, plan.summary)
                skipped += len(chunk.labels) - len(labels)
                if not len(labels):
                    continue
                if block is not None:
                    yield block
                block = {"image": images, "label": labels, "skipped": np.zeros_like(labels)}
                block["skipped"][0] = skipped
                skipped = 0
    if block is not None:
        block["skipped"][-1] += skipped
        yield block
    elif skipped > plan.allowed:
        raise DataError(
            f"none of {skipped} images in {unit[0].path} can be decoded; expected encoded images "
            "such as JPEG or PNG; mend the file or raise data.max_corrupt"
        )
    else:
        _log.warning("none of %d images in %s can be decoded; skipped", skipped, unit[0].path)


def _arriving(
    shard: ray.data.Dataset | ray.data.DataIterator,
    options: DataOptions,
    split: str,
    batch_size: int,
    rows: int,
) -> Iterator[_Pair]:
    """Decoded batches of a shard; stops as soon as too many of its `rows` were skipped."""
    skipped = 0

    def blocks() -> Iterator[_Pair]:
        # Whole blocks are views of the object store; batches of Ray's would be copied twice.
        nonlocal skipped
        for block in shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
            skipped += int(block["skipped"].sum())
            if skipped > options.max_corrupt * rows:
                return
            yield block["image"], block["label"]

    try:
        yield from _rebatched(blocks(), batch_size)
    except RayError as error:
        cause = _data_error(error)
        if cause is None:
            raise
        raise cause from error
    check_corrupt(options, split, skipped, rows)


def _data_error(error: BaseException | None) -> StpError | None:
    """The user's mistake inside what Ray wraps around an exception of a task."""
    while error is not None:
        if isinstance(error, StpError) and not isinstance(error, RayError):
            return error
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__
    return None


def _mixed(
    arriving: Iterable[_Pair], capacity: int, random: np.random.Generator
) -> Iterator[_Pair]:
    """Images in random order out of a buffer; without end, for a short shard repeats its last."""
    waiting: list[_Pair] = []
    count = 0
    images = labels = None
    for new_images, new_labels in arriving:
        if images is None or labels is None:
            waiting.append((new_images, new_labels))
            count += len(new_labels)
            if count >= capacity:
                images, labels = _joined(waiting)
            continue
        places = random.choice(len(labels), len(new_labels), replace=False)
        leaving = images[places], labels[places]
        images[places], labels[places] = new_images, new_labels
        yield leaving
    if images is None or labels is None:
        if not waiting:
            raise DataError(
                "a worker's share of the training images is empty; expected at least one image "
                "for each worker; use fewer workers or mend the data"
            )
        images, labels = _joined(waiting)
    while True:
        order = random.permutation(len(labels))
        yield images[order], labels[order]


def _joined(pairs: list[_Pair]) -> _Pair:
    joined = np.concatenate([pair[0] for pair in pairs]), np.concatenate([p[1] for p in pairs])
    pairs.clear()
    return joined


def _rebatched(pairs: Iterable[_Pair], size: int) -> Iterator[_Pair]:
    """Copies of the same images in batches of exactly `size`; the last one may be smaller."""
    pieces: list[_Pair] = []
    missing = size
    for images, labels in pairs:
        start = 0
        while start < len(labels):
            stop = min(start + missing, len(labels))
            pieces.append((images[start:stop], labels[start:stop]))
            missing -= stop - start
            start = stop
            if not missing:
                yield _joined(pieces)
                missing = size
    if pieces:
        yield _joined(pieces)
