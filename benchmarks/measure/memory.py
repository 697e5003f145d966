"""The peak of a step's memory against that of a dense step."""

import argparse
import gc
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from markdown_table import row

from .setting import Line, Setting, model_options
from .step import OTHERS
from .words import where


def options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """Growth of the peak over three steps, each side in a process of its own."""
    count = arguments.subnets
    peaks = {}
    for name in ("dense", "ours", "all at once"):
        found = [
            _in_process(_peak, arguments.model, name, count, draw, device) for draw in range(5)
        ]
        peaks[name] = statistics.median(found)
    yield {
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


def table(lines: list[Line]) -> list[str]:
    ways = list(lines[0]["ratio"])
    found = [
        "### Memory of a step",
        "",
        "Growth of the peak over three steps, median of five random sets of subnets "
        "(`python benchmarks/speed.py memory --model MODEL`).",
        "",
        row(["model", "K", "device", "dense MB", *(f"{way}, of dense" for way in ways[1:])]),
        row(["---"] * (3 + len(ways))),
    ]
    for line in lines:
        cells = [line["model"], line["subnets"], where(line), f"{line['peak_mb']['dense']:.0f}"]
        found.append(row(cells + [f"{line['ratio'][way]:.2f}" for way in ways[1:]]))
    return [*found, ""]
