"""Data sets too large to be kept decoded in memory: Parquet streamed through Ray Data.

Every rank opens a stream of its own for every epoch:

    shard = stream(options, "train", seed=seed, epoch=epoch, rank=rank, world_size=world_size)
    for images, labels in stream_batches(shard, options, seed=seed, epoch=epoch, ...):

Row groups are put in an order drawn from (seed, epoch) and divided evenly between the ranks. Ray
tasks anywhere in the cluster read them, and each rank mixes the files that arrive in a buffer and
decodes them with threads of its own: encoded they are a tenth as large on the way, and as many
more of them are mixed. So the batches of an epoch depend on (seed, epoch, rank, world size) alone,
and an epoch that was interrupted begins again with the same ones. With `data.decode=tasks` the
tasks decode as well, for machines whose GPUs have few CPUs beside them.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
import torch
from numpy.typing import NDArray
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import RayError
from torch import Tensor

from ..data import DataOptions, DataSummary, SplitName, describe, local_batch_size, steps_per_epoch
from ..data.batches import Augmentation, augmentation_seed, normalise_batch, to_device
from ..data.decode import blank, decode
from ..data.load import check_corrupt, open_source, selection, summarise
from ..data.parquet import CHUNK_ROWS, Columns, ParquetPart, ParquetSource, read_encoded
from ..data.split import derive_seed
from ..data.storage import open_filesystem, reading
from ..errors import DataError, StpError

_UNIT_BYTES = 32 * 2**20
_UNIT_ROWS = 1024
_BUFFER_BYTES = 512 * 2**20
#: Between two looks at tasks that each take about a second, at least and at most.
_PAUSE_S = 0.02, 0.1
#: And this many times as long as the processor needed for the last one.
_PAUSE_SHARE = 6

_Unit = list[ParquetPart]
#: Images and their labels int64 [n]: decoded, uint8 [n, 3, H, W], or encoded files, object [n].
_Pair = tuple[NDArray[Any], NDArray[np.int64]]


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
    """A lazy Ray Dataset of images: one rank's share of a split.

    Its columns are `image` and `label` (int64). Images are the contents of files, or with
    `options.decode` "tasks" uint8 RGB [3, H, W], where the label of an unreadable one is -1. The
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
    )
    # not `range`, which is read by a task that asks for a CPU, where training may hold all of them
    places = [{"id": place} for place in range(len(units))]
    numbered = ray.data.from_items(places, override_num_blocks=max(len(units), 1))
    dataset = numbered.map_batches(partial(_read_units, plan), batch_size=None, num_cpus=num_cpus)
    dataset.context.execution_options.preserve_order = True
    if options.decode == "tasks":
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
    callbacks = dataset.context.custom_execution_callback_classes
    dataset.context.custom_execution_callback_classes = [*callbacks, _Pause]
    return dataset


def stream_batches(
    shard: ray.data.Dataset,
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
    threads: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of this rank's training batches from a stream.

    Every rank makes the same number of steps, `steps_per_epoch(train_rows, batch_size)`: where
    images were skipped, others of the same shard take their place.

    Args:
        shard: `stream(options, "train", seed=..., epoch=..., rank=..., world_size=...)`.
        options: normalisation and augmentation.
        seed: the run's seed.
        epoch: number of the epoch.
        batch_size: images in a global batch, over all ranks.
        rank: this rank.
        world_size: number of ranks.
        device: where the batches are augmented and go to.
        num_classes: number of classes, for mixup's soft labels.
        summary: `describe(options)` where it is known already; it takes a look at the storage.
        threads: how many decode; None: as many as torch computes with in this process.

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
        share = -(-summary.train_rows // world_size)
        files = _rebatched(_mixed(_arriving(shard), 4 * local, _BUFFER_BYTES, random), local)
        decoding = _Decoding(options, summary, "training", share, threads)
        decoded = _rebatched(decoding.run(files, wanted=steps * local), local)
        for step, (images, labels) in zip(range(steps), decoded, strict=False):
            on_device, labels_there = to_device(images, labels, device)
            where = augmentation_seed(seed, epoch, step, rank)
            yield augment(on_device.contiguous(), labels_there, seed=where)

    return batches()


def stream_eval_batches(
    shard: ray.data.Dataset,
    options: DataOptions,
    *,
    batch_size: int,
    rows: int,
    device: torch.device | str = "cpu",
    summary: DataSummary | None = None,
    threads: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of `stream(options, "test")` in order, normalised and not augmented.

    Args:
        shard: the stream.
        options: normalisation.
        batch_size: images in a batch; the last one may be smaller.
        rows: number of images that the shard should hold, to judge the unreadable ones by.
        device: where the batches go to.
        summary, threads: as for `stream_batches`.

    Yields:
        The same as `stp_ray.data.eval_batches`.

    Raises:
        DataError: more than `max_corrupt` of `rows` cannot be decoded.
    """
    decoding = _Decoding(options, summary or describe(options), "test", rows, threads)
    files = _rebatched(_arriving(shard), batch_size)
    for images, labels in _rebatched(decoding.run(files), batch_size):
        on_device, labels_there = to_device(images, labels, device)
        yield normalise_batch(on_device.contiguous(), options), labels_there


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


class _Pause(ExecutionCallback):
    """Ray's executor, a thread of the process that trains, asks without pause whether there is room
    for more once what was read ahead fills its share of the object store; it would take half of the
    interpreter from the threads that decode. A slow processor gets longer pauses."""

    _seen = 0.0

    def on_execution_step(self, executor: object) -> None:
        least, most = _PAUSE_S
        spent = time.thread_time() - self._seen
        time.sleep(min(max(least, _PAUSE_SHARE * spent), most))
        self._seen = time.thread_time()


@dataclass(frozen=True)
class _Plan:
    """What the reading tasks of one stream know."""

    uri: str
    """Absolute, so that it means the same in every process."""

    columns: Columns
    options: DataOptions
    summary: DataSummary
    units: list[_Unit]


def _read_units(plan: _Plan, batch: Any) -> Iterator[Any]:
    """Read some units, and decode them where tasks do: the work of one Ray task."""
    filesystem, _ = open_filesystem(plan.uri)
    for index in batch["id"]:
        for part in plan.units[index]:
            with reading(plan.uri):
                for _, files, labels in read_encoded(filesystem, part, plan.columns):
                    if plan.options.decode == "tasks":
                        yield _decoded_block(plan, files.to_pylist(), labels)
                    else:
                        yield pa.table({"image": files, "label": labels})


def _decoded_block(
    plan: _Plan, files: list[bytes | None], labels: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """A row for each file, so that the trainer can count those that are unreadable."""
    size = plan.summary.held_size
    images, readable = decode(files, size, resize=plan.options.image_size is not None)
    rows = images
    if not readable.all():
        rows = np.zeros((len(files), 3, size, size), dtype=np.uint8)
        rows[readable] = images
    return {"image": rows, "label": np.where(readable, labels, -1)}


def _arriving(shard: ray.data.Dataset) -> Iterator[_Pair]:
    """The blocks of a shard, as views of the object store where they can be."""
    try:
        # Whole blocks; batches of Ray's would be copied twice.
        for block in shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
            yield block["image"], block["label"]
    except RayError as error:
        cause = _data_error(error)
        if cause is None:
            raise
        raise cause from error


class _Decoded(NamedTuple):
    """The readable images of a batch."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    readable: NDArray[np.bool_]
    """Which of the files they are, bool [N]."""

    memory: NDArray[np.uint8] | None = None
    """What the images are in, where it may be used again."""


class _Decoding:
    """Turns batches of files into batches of images, some of them at once.

    Args:
        options: what is done to an image, and how many may be unreadable.
        summary: the size of an image.
        split: as it is called in messages.
        rows: images of the shard; those that a buffer repeats are not counted again.
        threads: how many decode; None: as many as torch computes with in this process.
    """

    def __init__(
        self, options: DataOptions, summary: DataSummary, split: str, rows: int,
        threads: int | None,
    ) -> None:  # fmt: skip
        self._options, self._size = options, summary.held_size
        self._split, self._rows = split, rows
        whole = summary.train_rows if split == "training" else summary.test_rows
        self._whole = max(rows, whole)
        self._threads = threads or torch.get_num_threads()
        self._seen = self._skipped = 0
        self._free: list[NDArray[np.uint8]] = []

    def run(self, files: Iterator[_Pair], wanted: int | None = None) -> Iterator[_Pair]:
        """The readable images of each batch, in order; ends after `wanted` images or more. A
        batch lasts until the next one is asked for: its memory is used again.

        Raises:
            DataError: too many of the rows are unreadable.
        """
        waiting: deque[Future[_Decoded]] = deque()
        expected = 0  # images that were made, and those under way if all are readable

        def ask() -> None:
            nonlocal expected
            while len(waiting) <= self._threads and (wanted is None or expected < wanted):
                batch = next(files, None)
                if batch is None:
                    return
                waiting.append(pool.submit(self._decoded, *batch))
                expected += len(batch[1])

        with ThreadPoolExecutor(self._threads) as pool:
            try:
                ask()
                while waiting:
                    batch = waiting.popleft().result()
                    expected -= int((~batch.readable).sum())
                    self._count(batch.readable)
                    ask()
                    if not waiting:
                        self._check()
                    yield batch.images, batch.labels
                    if batch.memory is not None:
                        self._free.append(batch.memory)
            finally:
                for future in waiting:
                    future.cancel()

    def _decoded(self, images: NDArray[Any], labels: NDArray[np.int64]) -> "_Decoded":
        if images.dtype != object:  # a task has done it
            readable = labels >= 0
            kept = images if readable.all() else images[readable]
            return _Decoded(kept, labels[readable], readable)
        memory = self._free.pop() if self._free else blank(0, self._size)
        if len(memory) < len(labels):
            memory = blank(len(labels), self._size)
        resize = self._options.image_size is not None
        kept, readable = decode(images.tolist(), self._size, resize=resize, out=memory)
        return _Decoded(kept, labels[readable], readable, memory)

    def _check(self) -> None:
        check_corrupt(self._options, self._split, self._skipped, self._rows, of=self._whole)

    def _count(self, readable: NDArray[np.bool_]) -> None:
        self._skipped += int((~readable[: max(0, self._rows - self._seen)]).sum())
        self._seen += len(readable)
        if self._skipped > self._options.max_corrupt * self._whole:
            self._check()
        if self._skipped == self._rows:
            raise DataError(
                f"none of {self._rows} images of the {self._split} split can be decoded; expected "
                "encoded images such as JPEG or PNG; mend the data or change data.uri"
            )


def _data_error(error: BaseException | None) -> StpError | None:
    """The user's mistake inside what Ray wraps around an exception of a task."""
    while error is not None:
        if isinstance(error, StpError) and not isinstance(error, RayError):
            return error
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__
    return None


def _mixed(
    arriving: Iterable[_Pair], least: int, enough_bytes: int, random: np.random.Generator
) -> Iterator[_Pair]:
    """Images in random order out of a buffer; without end, for a short shard repeats its last.

    Args:
        arriving: in any portions.
        least: images that the buffer holds at least.
        enough_bytes: what it holds at least, before the first one leaves.
        random: the order.
    """
    waiting: list[_Pair] = []
    count = size = 0
    images = labels = None
    for new_images, new_labels in arriving:
        if images is None or labels is None:
            waiting.append((new_images, new_labels))
            count += len(new_labels)
            size += _bytes(new_images)
            if count >= least and size >= enough_bytes:
                images, labels = _joined(waiting)
            continue
        for start in range(0, len(new_labels), len(labels)):
            portion = slice(start, start + len(labels))
            places = random.choice(len(labels), len(new_labels[portion]), replace=False)
            leaving = images[places], labels[places]
            images[places], labels[places] = new_images[portion], new_labels[portion]
            yield leaving
    if images is None or labels is None:
        if not count:
            raise DataError(
                "a worker's share of the training images is empty; expected at least one image "
                "for each worker; use fewer workers or mend the data"
            )
        images, labels = _joined(waiting)
    while True:
        order = random.permutation(len(labels))
        yield images[order], labels[order]


def _bytes(images: NDArray[Any]) -> int:
    return sum(len(file or b"") for file in images) if images.dtype == object else images.nbytes


def _joined(pairs: list[_Pair]) -> _Pair:
    joined = np.concatenate([pair[0] for pair in pairs]), np.concatenate([p[1] for p in pairs])
    pairs.clear()
    return joined


def _rebatched(pairs: Iterable[_Pair], size: int) -> Iterator[_Pair]:
    """The same images in batches of exactly `size`; the last one may be smaller. What has that
    size already is passed on, unless it is Ray's, which cannot be written; all else is copied."""
    batch: _Pair | None = None
    filled = 0
    for images, labels in pairs:
        if not filled and len(labels) == size and images.flags.writeable:
            yield images, labels
            continue
        start = 0
        while start < len(labels):
            if batch is None:
                batch = _room(images, size), _room(labels, size)
            stop = min(start + size - filled, len(labels))
            end = filled + stop - start
            batch[0][filled:end], batch[1][filled:end] = images[start:stop], labels[start:stop]
            filled, start = end, stop
            if filled == size:
                yield batch
                batch, filled = None, 0
    if batch is not None:
        yield batch[0][:filled], batch[1][:filled]


def _room(like: NDArray[Any], count: int) -> NDArray[Any]:
    """For so many of them, in the same order of axes in memory."""
    return np.empty_like(like, shape=(count, *like.shape[1:]))
