"""Data-parallel workers: bytes that a step reduces, images a second, efficiency."""

import argparse
import os
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from markdown_table import row
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .group import data_parallel, gathered
from .setting import CASES, Line, Setting, clock, clock_option
from .words import where

#: Subnets of a step that are tried.
COUNTS = (1, 2, 4)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(CASES), default="resnet20")
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 4], help="beside one")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    clock_option(parser)


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """A group of workers for each number of them, all numbers in turn."""
    groups = [1, *arguments.workers]
    found: dict[int, list[Line]] = {workers: [] for workers in groups}
    for _ in range(arguments.repeats):
        for workers in groups:
            found[workers].append(
                run(arguments.model, workers, arguments.steps, arguments.processor_time)
            )
    rates = {
        workers: {
            count: statistics.median(each["rate"][count] for each in several) for count in COUNTS
        }
        for workers, several in found.items()
    }
    for workers in groups:
        yield {
            "model": arguments.model, "workers": workers, "cores": len(os.sched_getaffinity(0)),
            "clock": clock(arguments),
            "images_per_s": {str(k): round(rate, 1) for k, rate in rates[workers].items()},
            "efficiency": {
                str(k): round(rates[workers][k] / rates[1][k] / workers, 3) for k in COUNTS
            },
            "gradient_bytes": found[workers][0]["gradient_bytes"],
            "reduced_bytes": {str(k): size for k, size in found[workers][0]["reduced"].items()},
        }  # fmt: skip


def run(model: str, workers: int, steps: int, processor_time: bool = False) -> dict[str, Any]:
    """Rates of so many workers, and the bytes that they reduce."""
    return dict(gathered(_rates, workers, model, steps, processor_time))


def _rates(rank: int, workers: int, model: str, steps: int, processor_time: bool) -> dict[str, Any]:
    now = time.process_time if processor_time else time.perf_counter
    rates, reduced = {}, {}
    for count in COUNTS:
        setting = Setting(model, torch.device("cpu"))
        rng = random.Random(rank)
        subnets = [setting.net.space.sample(rng) for _ in range(count)]
        sent: list[int] = []
        work = setting.our_step(
            subnets, lambda module, sent=sent: _wrapped(module, workers, sent), rank, workers
        )
        work()  # the first step fills memory pools
        work()  # and the second the buckets as they stay
        sent.clear()
        started = now()
        for _ in range(steps):
            work()
        rates[count] = workers * steps * setting.case.batch / (now() - started)
        reduced[count] = sum(sent) // steps
    gradient = sum(p.nbytes for p in setting.net.parameters())
    return {"rate": rates, "reduced": reduced, "gradient_bytes": gradient}


def _wrapped(module: nn.Module, workers: int, sent: list[int]) -> nn.Module:
    """As the stages wrap it, and noting the bytes of each reduction."""
    wrapped = data_parallel(module)
    if not isinstance(wrapped, DistributedDataParallel):
        return wrapped

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.buffer().nbytes)
        future = dist.all_reduce(bucket.buffer().div_(workers), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    wrapped.register_comm_hook(None, hook)
    return wrapped


def table(lines: list[Line]) -> list[str]:
    found = [
        "### Data-parallel workers",
        "",
        "Workers of one thread each on one machine, as many images each whatever their number, "
        "DistributedDataParallel over gloo (`python benchmarks/speed.py parallel`). Efficiency is "
        "images a second of a worker over those of one alone; by the wall it cannot exceed the "
        "share of a core that each worker has, by processor time it leaves out waiting. Each "
        "worker draws subnets of its own, as in training, so that the work of an image differs "
        "with their number by a few per cent.",
        "",
        row(["model", "device", "cores", "workers", *(f"images/s, K={k}" for k in COUNTS),
             "efficiency", "gradient, bytes", "reduced in a step, by K"]),
        row(["---"] * (7 + len(COUNTS))),
    ]  # fmt: skip
    for line in lines:
        cells = [line["model"], where(line), line["cores"], line["workers"]]
        cells += [f"{rate:.0f}" for rate in line["images_per_s"].values()]
        cells.append(", ".join(f"{share:.2f}" for share in line["efficiency"].values()))
        cells.append(f"{line['gradient_bytes']:,}")
        cells.append(", ".join(f"{size:,}" for size in line["reduced_bytes"].values()))
        found.append(row(cells))
    return [*found, ""]
