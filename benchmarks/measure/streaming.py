"""Images from Parquet through Ray Data beside the JPEG decoder alone; memory (starts Ray)."""

import argparse
import io
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from markdown_table import row
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from stp_ray.data import DataOptions, describe

from .processes import peak_memory, processor_seconds
from .setting import Line
from .words import where

#: Images of a batch, and of a list that the decoder takes at once.
BATCH = 256
#: Images that differ; a file repeats them.
DISTINCT = 500


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pixels", type=int, default=256, help="height and width as stored")
    parser.add_argument("--images", type=int, default=25_000, help="of the small data set")
    parser.add_argument("--times", type=int, default=8, help="the large one is so much larger")
    parser.add_argument("--store-mb", type=int, default=2048, help="of Ray's object store")
    parser.add_argument("--repeats", type=int, default=2)


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """Both ways to decode in turn, on all cores; then the trainer's batches from a data set and
    from one that is larger."""
    import ray

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="stp-speed-") as home:
        small, large = Path(home, "small"), Path(home, "large")
        encoded = write(small, arguments.images, 1, arguments.pixels)
        write(large, arguments.images, arguments.times, arguments.pixels)
        ray.init(
            num_cpus=cores(), include_dashboard=False, logging_level="warning",
            object_store_memory=arguments.store_mb * 2**20,
        )  # fmt: skip
        sizes = {"1": small, str(arguments.times): large}
        try:
            streamed(small)  # Ray's workers start, and import
            ways: dict[str, Callable[[], int]] = {"raw": lambda: raw(encoded, cores())}
            ways |= {name: partial(streamed, folder) for name, folder in sizes.items()}
            rates, work = in_turn(ways, arguments.repeats)
            peaks, seconds = {}, {}
            for name, folder in sizes.items():
                started = time.perf_counter()
                with peak_memory() as peak:
                    count = trained_on(folder)
                seconds[name] = (time.perf_counter() - started) / count
                peaks[name] = peak.mb
        finally:
            ray.shutdown()
    yield {
        "pixels": arguments.pixels, "images": arguments.images, "cores": cores(),
        "jpeg_kb": round(statistics.mean(map(len, encoded)) / 1e3, 1),
        "store_mb": arguments.store_mb,
        "images_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": {name: round(rates[name] / rates["raw"], 3) for name in sizes},
        "processor_ratio": {name: round(work["raw"] / work[name], 3) for name in sizes},
        "peak_mb": {name: round(mb) for name, mb in peaks.items()},
        "ms_an_image": {name: round(1e3 * s, 3) for name, s in seconds.items()},
    }  # fmt: skip


def cores() -> int:
    """Those that this program may use."""
    return len(os.sched_getaffinity(0))


def write(folder: Path, images: int, times: int, pixels: int) -> list[bytes]:
    """Parquet files of smooth random pictures; returns the contents of one training file."""
    random = np.random.default_rng(0)
    distinct = []
    for _ in range(min(DISTINCT, images)):
        coarse = random.integers(0, 256, (pixels // 8, pixels // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        distinct.append(buffer.getvalue())
    encoded = [distinct[index % len(distinct)] for index in range(images)]
    (folder / "train").mkdir(parents=True)
    first = folder / "train" / "part-0.parquet"
    _table(encoded, first)
    for part in range(1, times):
        os.link(first, first.with_name(f"part-{part}.parquet"))
    _table(distinct[:16], folder / "test.parquet")
    return encoded


def _table(encoded: list[bytes], path: Path) -> None:
    labels = [index % 10 for index in range(len(encoded))]
    pictures = [{"bytes": data, "path": None} for data in encoded]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(pictures, kind), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=1000, compression="none", use_dictionary=False)


def in_turn(
    ways: dict[str, Callable[[], int]], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Images a second, and processor seconds of an image over all processes: medians."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            spent, started = processor_seconds(), time.perf_counter()
            count = way()
            rates[name].append(count / (time.perf_counter() - started))
            work[name].append((processor_seconds() - spent) / count)
    return (
        {name: statistics.median(found) for name, found in rates.items()},
        {name: statistics.median(found) for name, found in work.items()},
    )


def raw(encoded: list[bytes], threads: int) -> int:
    """The decoder alone, on bytes in memory."""

    def decode(start: int) -> int:
        buffers = [
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            for data in encoded[start : start + BATCH]
        ]
        return len(decode_jpeg(buffers, mode=ImageReadMode.RGB))

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(decode, range(0, len(encoded), BATCH)))


def _options(folder: Path) -> DataOptions:
    return DataOptions(name="parquet", uri=str(folder), holdout=1, loading="stream")


def streamed(folder: Path) -> int:
    """Decoded batches in the order of the file, without the trainer's buffer and augmentation."""
    from stp_ray.stages.ingest import _arriving, _Decoding, _rebatched, stream

    data = _options(folder)
    summary = describe(data)
    decoding = _Decoding(data, summary, "training", summary.train_rows, cores())
    files = _rebatched(_arriving(stream(data, "train", epoch=0)), BATCH)
    return sum(len(labels) for _, labels in decoding.run(files))


def trained_on(folder: Path) -> int:
    """An epoch of the trainer's batches, shuffled in its buffer and normalised."""
    from stp_ray.stages.ingest import stream, stream_batches

    data = _options(folder)
    batches = stream_batches(
        stream(data, "train", epoch=0), data, seed=0, epoch=0, batch_size=BATCH, num_classes=10,
        summary=describe(data), threads=cores(),
    )  # fmt: skip
    return sum(len(labels) for _, labels in batches)


def table(lines: list[Line]) -> list[str]:
    found = [
        "### Streaming",
        "",
        "Decoded images a second out of Parquet through Ray Data, over those of the JPEG decoder "
        "alone, both on as many threads as cores and in turn; the start of an epoch is in it, "
        "which larger data sets hide. By processor time of all processes, Ray's own included, in "
        "the next column. Memory is the peak over all processes, what they share counted once, of "
        "an epoch of the trainer's batches, augmentation and a shuffling buffer of 512 MB of files "
        "included; images are random pictures (`python benchmarks/speed.py streaming`).",
        "",
        row(["px", "JPEG, kB", "cores", "device", "images", "decoder, images/s",
             "streamed, images/s", "ratio", "ratio by processor time", "object store, MB",
             "peak, MB", "ms an image of a batch"]),
        row(["---"] * 12),
    ]  # fmt: skip
    for line in lines:
        rates = line["images_per_s"]
        for times, peak in line["peak_mb"].items():
            cells = [line["pixels"], line["jpeg_kb"], line["cores"], where(line)]
            cells += [f"{int(times) * line['images']:,}", f"{rates['raw']:.0f}"]
            cells += [f"{rates[times]:.0f}", f"{line['ratio'][times]:.2f}"]
            cells += [f"{line['processor_ratio'][times]:.2f}", line["store_mb"]]
            found.append(row([*cells, peak, line["ms_an_image"][times]]))
    return [*found, ""]
