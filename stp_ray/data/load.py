"""From options to a summary, or to decoded images in memory."""

import difflib
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import DataError
from .decode import decode, fit
from .folders import FolderSource, cifar
from .options import DataOptions
from .parquet import ParquetSource
from .source import Chunk, Layout, Source, Stored, digits
from .split import ImageData, Split, spread_rows

SplitName = Literal["train", "holdout", "test"]
NAMES = ("digits", "parquet", "CIFAR10", "CIFAR100", "ImageFolder")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSummary:
    """What a data set will be, before it is loaded."""

    class_names: list[str]
    """Name of each class, in the order of the labels."""

    train_rows: int
    """Images to train on, without the held-out ones."""

    holdout_rows: int
    """Training images kept out of training."""

    test_rows: int
    """Images that only accuracies are measured on."""

    image_size: int
    """Height and width that the network sees, in pixels."""

    held_size: int
    """Height and width of the images in memory, in pixels; larger for random resized crops."""

    bytes: int
    """Size of all decoded images, in bytes."""

    streams: bool
    """Whether training images are streamed instead of kept in memory."""

    fingerprint: str
    """Tells this data from other data, by what can be seen without reading the images."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def describe(options: DataOptions) -> DataSummary:
    """Look at the data set that `options` name, without decoding it.

    Raises:
        DataError: it is unknown, missing, empty or unreadable, lacks a split or a column, has
            labels outside its classes, is not larger than `holdout`, or can neither be kept in
            memory nor streamed.
    """
    return summarise(options, open_source(options).layout())


def load(options: DataOptions) -> ImageData:
    """Decode the whole data set that `options` name into memory.

    Unreadable images are left out, counted and warned of.

    Raises:
        DataError: what `describe` raises, or more than `max_corrupt` of a split is unreadable.
    """
    source = open_source(options)
    layout = source.layout()
    summary = summarise(options, layout)
    rows = selection(options, layout)
    held = rows["holdout"]
    everything = np.sort(np.concatenate([rows["train"], held]))
    train, holdout = _Filling(len(rows["train"]), summary), _Filling(len(held), summary)
    test = _Filling(len(rows["test"]), summary)
    corrupt = 0
    for chunk_rows, images, labels in _decoded(source, options, summary, "train", everything):
        is_held = np.isin(chunk_rows, held, assume_unique=True)
        holdout.append(images[is_held], labels[is_held])
        train.append(images[~is_held], labels[~is_held])
    if not holdout.count:
        raise DataError(
            f"none of the {len(held)} held-out images can be decoded; expected some to score "
            "subnets with; mend the data or raise data.holdout"
        )
    corrupt += check_corrupt(
        options, "training", len(everything) - train.count - holdout.count, len(everything)
    )
    for _, images, labels in _decoded(source, options, summary, "test", rows["test"]):
        test.append(images, labels)
    corrupt += check_corrupt(options, "test", len(rows["test"]) - test.count, len(rows["test"]))
    return ImageData(
        train.split(), holdout.split(), test.split(), list(layout.class_names), corrupt
    )


def load_split(options: DataOptions, split: SplitName, count: int | None = None) -> Split:
    """Decode one split of what `options` name into memory, or only `count` images from all over it,
    the same ones as `Split.sample` takes.

    For a data set that is streamed: its held-out images, and a few to calibrate with. Each row
    group that holds one of them is read.

    Raises:
        DataError: as `load`.
    """
    source = open_source(options)
    layout = source.layout()
    summary = summarise(options, layout)
    rows = whole = selection(options, layout)[split]
    if count is not None and count < len(whole):
        rows = whole[spread_rows(len(whole), count)]
    stored: Stored = "test" if split == "test" else "train"
    filling = _Filling(len(rows), summary)
    for _, images, labels in _decoded(source, options, summary, stored, rows):
        filling.append(images, labels)
    if not filling.count:
        raise DataError(
            f"none of {len(rows)} images of the {split} split can be decoded; expected encoded "
            "images such as JPEG or PNG; mend the data, or raise data.holdout for a few"
        )
    if rows is whole:  # of a few, chance may have picked more than the share that all may hold
        check_corrupt(options, split, len(rows) - filling.count, len(rows))
    return filling.split()


def open_source(options: DataOptions) -> Source:
    """The data set that the options name.

    Raises:
        DataError: the name is unknown, or the data is missing or unreadable.
    """
    if options.name == "digits":
        return digits()
    if options.name == "parquet":
        if options.uri is None:
            raise DataError(
                "data.name is parquet without a data.uri; expected a folder or an fsspec URI "
                "that holds train.parquet and test.parquet; set data.uri"
            )
        return ParquetSource(options.uri)
    if options.name in ("CIFAR10", "CIFAR100"):
        return cifar(options.name, options.uri)
    if options.name == "ImageFolder":
        return FolderSource(options.uri)
    lowered = {name.lower(): name for name in NAMES}
    near = difflib.get_close_matches(options.name.lower(), lowered, n=1)
    hint = f'did you mean "{lowered[near[0]]}"?' if near else "change data.name"
    raise DataError(f'data.name is "{options.name}"; expected one of {", ".join(NAMES)}; {hint}')


def summarise(options: DataOptions, layout: Layout) -> DataSummary:
    """What the options make of a data set; checks everything that its layout can show.

    Raises:
        DataError: see `describe`.
    """
    stored = _training_rows(options, layout)
    if options.holdout >= stored:
        raise DataError(
            f"data.holdout is {options.holdout} of {stored} training images; expected fewer, so "
            "that some remain to train on; change data.holdout or data.limit"
        )
    if len(layout.class_names) < 2:
        raise DataError(
            f"the data has one class, {layout.class_names[0]!r}; expected two or more to tell "
            "apart; change the data"
        )
    height, width = layout.size
    if options.image_size is None and height != width:
        raise DataError(
            f"images are {width}x{height} pixels; expected square ones; set data.image_size"
        )
    seen = options.image_size or height
    held = seen
    if options.image_size is not None and options.random_resized_crop:
        held = -(-options.image_size * 8 // 7)
    size = (stored + layout.test_rows) * 3 * held * held
    return DataSummary(
        class_names=list(layout.class_names),
        train_rows=stored - options.holdout,
        holdout_rows=options.holdout,
        test_rows=layout.test_rows,
        image_size=seen,
        held_size=held,
        bytes=size,
        streams=_streams(options, size),
        fingerprint=layout.fingerprint,
    )


def selection(options: DataOptions, layout: Layout) -> dict[SplitName, NDArray[np.int64]]:
    """Ascending row numbers of each split; "train" and "holdout" are rows of the stored "train"."""
    stored = _training_rows(options, layout)
    held = spread_rows(stored, options.holdout)
    train = np.delete(np.arange(stored, dtype=np.int64), held)
    return {
        "train": train,
        "holdout": held,
        "test": np.arange(layout.test_rows, dtype=np.int64),
    }


def prepare(
    chunk: Chunk, options: DataOptions, summary: DataSummary
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]:
    """The readable images of a chunk: rows [n], uint8 [n, 3, held_size, held_size], labels [n]."""
    if isinstance(chunk.images, np.ndarray):
        images = fit(torch.from_numpy(chunk.images), summary.held_size).numpy()
        return chunk.rows, images, chunk.labels
    images, mask = decode(chunk.images, summary.held_size, resize=options.image_size is not None)
    return chunk.rows[mask], images, chunk.labels[mask]


def check_corrupt(
    options: DataOptions, split: str, corrupt: int, rows: int, of: int | None = None
) -> int:
    """Warn of unreadable images of a split, or stop if they are too many; returns their number.

    Args:
        options: how many may be unreadable.
        split: as it is called in messages.
        corrupt, rows: how many of how many.
        of: images of the whole split, where the rows are a worker's part of it: what may be
            unreadable may all lie in one part.

    Raises:
        DataError: they are more than the share `max_corrupt`.
    """
    if corrupt > options.max_corrupt * (of or rows):
        raise DataError(
            f"{corrupt} of {rows} images of the {split} split cannot be decoded "
            f"({corrupt / rows:.2%}); expected at most {options.max_corrupt:.2%}; mend the data "
            "or raise data.max_corrupt"
        )
    if corrupt:
        _log.warning(
            "%d of %d images of the %s split cannot be decoded (%.2f%%); skipped",
            corrupt,
            rows,
            split,
            100 * corrupt / rows,
        )
    return corrupt


def _training_rows(options: DataOptions, layout: Layout) -> int:
    return min(layout.train_rows, options.limit or layout.train_rows)


def _streams(options: DataOptions, size: int) -> bool:
    large = size > options.resident_limit_mb * 2**20
    if options.loading == "resident" or (options.loading == "auto" and not large):
        return False
    if options.name == "parquet":
        return True
    if options.loading == "stream":
        raise DataError(
            f'data.loading is "stream" for {options.name}; expected Parquet, the only kind that '
            'streams; set data.loading to "resident" or convert the data to Parquet'
        )
    raise DataError(
        f"{options.name} takes {size / 2**20:.0f} MiB decoded; expected at most "
        f"{options.resident_limit_mb} MiB, or Parquet, which streams; raise data.resident_limit_mb "
        "or convert the data to Parquet"
    )


class _Filling:
    """Room for a split, filled from the front."""

    def __init__(self, rows: int, summary: DataSummary) -> None:
        size = summary.held_size
        self._images = np.empty((rows, 3, size, size), dtype=np.uint8)
        self._labels = np.empty(rows, dtype=np.int64)
        self.count = 0

    def append(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        end = self.count + len(labels)
        self._images[self.count : end] = images
        self._labels[self.count : end] = labels
        self.count = end

    def split(self) -> Split:
        return Split(self._images[: self.count], self._labels[: self.count])


_Decoded = tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]


def _decoded(
    source: Source,
    options: DataOptions,
    summary: DataSummary,
    stored: Stored,
    rows: NDArray[np.int64],
) -> Iterator[_Decoded]:
    """Decoded chunks in the order of the rows, read and decoded by a thread for each core."""

    def work(part: Any) -> list[_Decoded]:
        return [prepare(chunk, options, summary) for chunk in source.read(part)]

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    waiting: deque[Future[list[_Decoded]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for part in source.parts(stored, rows):
                waiting.append(pool.submit(work, part))
                # Bounded, or a slow consumer would hold the whole set twice.
                if len(waiting) > 2 * (workers or 1):
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
