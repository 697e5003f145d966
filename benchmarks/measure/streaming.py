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
    parser.add_argument("--images", type=int, default=5000, help="of the small data set")
    parser.add_argument("--times", type=int, default=8, help="the large one is so much larger")
    parser.add_argument("--store-mb", type=int, default=2048, help="of Ray's object store")
    parser.add_argument("--repeats", type=int, default=2)


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """Both ways to decode in turn, on all cores; then the trainer's batches from a data set and
    from one that is larger."""
    import ray

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="stp-speed-") as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        encoded = write(small, arguments.images, 1, arguments.pixels)
        write(large, arguments.images, arguments.times, arguments.pixels)
        ray.init(
            num_cpus=cores, include_dashboard=False, logging_level="warning",
            object_store_memory=arguments.store_mb * 2**20,
        )  # fmt: skip
        try:
            streamed(small, arguments.images)  # Ray's workers start, and import
            ways = {
                "raw": lambda: raw(encoded, cores),
                "streamed": lambda: streamed(small, arguments.images),
            }
            rates, work = in_turn(ways, arguments.repeats)
            peaks, seconds = {}, {}
            for name, uri in (("1", small), (str(arguments.times), large)):
                started = time.perf_counter()
                with peak_memory() as peak:
                    count = trained_on(uri)
                seconds[name] = (time.perf_counter() - started) / count
                peaks[name] = peak.mb
        finally:
            ray.shutdown()
    yield {
        "pixels": arguments.pixels, "images": arguments.images, "cores": cores,
        "jpeg_kb": round(statistics.mean(map(len, encoded)) / 1e3, 1),
        "store_mb": arguments.store_mb,
        "images_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["streamed"] / rates["raw"], 3),
        "processor_ratio": round(work["raw"] / work["streamed"], 3),
        "peak_mb": {name: round(mb) for name, mb in peaks.items()},
        "ms_an_image": {name: round(1e3 * s, 3) for name, s in seconds.items()},
    }  # fmt: skip


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


def raw(encoded: list[bytes], cores: int) -> int:
    """The decoder alone, in a thread for each core, on bytes in memory."""

    def decode(start: int) -> int:
        buffers = [
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            for data in encoded[start : start + BATCH]
        ]
        return len(decode_jpeg(buffers, mode=ImageReadMode.RGB))

    with ThreadPoolExecutor(cores) as pool:
        return sum(pool.map(decode, range(0, len(encoded), BATCH)))


def _options(folder: Path) -> DataOptions:
    return DataOptions(name="parquet", uri=str(folder), holdout=1, loading="stream")


def streamed(folder: Path, images: int) -> int:
    """Decoded batches as they arrive at the trainer, before its buffer."""
    from stp_ray.stages.ingest import _arriving, stream

    data = _options(folder)
    arriving = _arriving(stream(data, "train", epoch=0), data, "training", BATCH, images)
    return sum(len(labels) for _, labels in arriving)


def trained_on(folder: Path) -> int:
    """An epoch of the trainer's batches, shuffled in its buffer and normalised."""
    from stp_ray.stages.ingest import stream, stream_batches

    data = _options(folder)
    batches = stream_batches(
        stream(data, "train", epoch=0), data, seed=0, epoch=0, batch_size=BATCH, num_classes=10,
        summary=describe(data),
    )  # fmt: skip
    return sum(len(labels) for _, labels in batches)


def table(lines: list[Line]) -> list[str]:
    found = [
        "### Streaming",
        "",
        "Decoded images a second out of Parquet through Ray Data, over those of the JPEG decoder "
        "alone on as many threads as cores; by processor time of all processes, Ray's own "
        "included, in the next column. Memory is the peak over all processes, what they share "
        "counted once, of an epoch of the trainer's batches, whose shuffling buffer holds 512 MB; "
        "images are random pictures (`python benchmarks/speed.py streaming`).",
        "",
        row(["px", "JPEG, kB", "cores", "device", "decoder, images/s", "streamed, images/s",
             "ratio", "ratio by processor time", "object store, MB", "images", "peak, MB",
             "ms an image"]),
        row(["---"] * 12),
    ]  # fmt: skip
    for line in lines:
        rates = line["images_per_s"]
        for times, peak in line["peak_mb"].items():
            cells = [line["pixels"], line["jpeg_kb"], line["cores"], where(line)]
            cells += [f"{rates['raw']:.0f}", f"{rates['streamed']:.0f}", f"{line['ratio']:.2f}"]
            cells += [f"{line['processor_ratio']:.2f}", line["store_mb"]]
            cells += [f"{int(times) * line['images']:,}", peak, line["ms_an_image"][times]]
            found.append(row(cells))
    return [*found, ""]
