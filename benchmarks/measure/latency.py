"""A latency budget: what its table foretells, and what the network that it leads to takes."""

import argparse
import random
import statistics
import time
from collections.abc import Iterator

import torch
from markdown_table import row

from stp_ray.elastic import Budget, Subnet, Supernet
from stp_ray.elastic.latency import tabulate
from stp_ray.method import Scored
from stp_ray.method.meeting import meet
from stp_ray.models import build_model
from stp_ray.timing import Stopwatch

from .setting import Line
from .words import where

#: Stopwatches of their own that look at the outcome.
LOOKS = 3


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--budget", type=float, default=0.3, help="of the dense latency")
    parser.add_argument("--divisor", type=int, default=8, help="of all widths")
    parser.add_argument("--candidates", type=int, default=1000, help="that the table prices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="PyTorch, not ONNX Runtime")


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """As a run does it, with made-up scores: of random candidates within the budget, the more
    arithmetic the better. That is the hardest case, for it prefers those that the table takes for
    faster than they are. Weights are random: time does not depend on them."""
    torch.manual_seed(0)
    example = torch.zeros(1, 3, arguments.size, arguments.size)
    dense = build_model(arguments.model, num_classes=1000, image_size=arguments.size).eval()
    net = Supernet.trace(dense, example, divisor=arguments.divisor)
    full, budget = net.extract(net.space.full), Budget(latency=arguments.budget)
    watch = Stopwatch(full, example, device, torch.get_num_threads(), not arguments.eager)

    def clock(subnet: Subnet) -> float:
        return watch(net.extract(subnet))

    began = time.perf_counter()
    table = tabulate(net.space, clock, [budget], arguments.seed)
    tabulated, began = time.perf_counter() - began, time.perf_counter()
    space, rng = net.space.timed(table.terms), random.Random(arguments.seed)
    found = dict.fromkeys(space.sample(rng, budget) for _ in range(arguments.candidates))
    costs = dict(zip(found, space.costs(list(found)), strict=True))
    drawn = sorted(found, key=lambda subnet: (-costs[subnet].macs, subnet.id))
    ranked = [Scored(s, -costs[s].macs, 0, 0, costs[s]) for s in drawn]
    met = meet(space, budget, ranked, clock, watch.seconds, arguments.seed)
    chosen = net.extract(met.subnet)
    looks = [
        Stopwatch(full, example, device, torch.get_num_threads(), not arguments.eager).ratio(chosen)
        for _ in range(LOOKS)
    ]
    yield {
        "model": arguments.model, "size": arguments.size, "budget": arguments.budget,
        "divisor": arguments.divisor, "candidates": len(ranked), "seed": arguments.seed,
        "runtime": watch.runtime, "dense_ms": round(1e3 * watch.seconds, 3),
        "networks": len(table.networks), "tabulated_s": round(tabulated, 1),
        "error": round(table.error, 4), "looks": met.looks, "scored": met.scored,
        "met_s": round(time.perf_counter() - began, 1),
        "macs": round(space.cost(met.subnet).macs / space.cost().macs, 4),
        "used": round(met.seconds / met.limit_s, 4),
        "again": [round(look / arguments.budget, 4) for look in looks],
    }  # fmt: skip


def table(lines: list[Line]) -> list[str]:
    found = [
        "### A latency budget",
        "",
        "The table is fitted to whole networks that were measured; its error is that for networks "
        "left out of the fit (root mean square). Then the largest of many random candidates within "
        "the budget by the table is measured, and the next one if it misses. Measured again is the "
        f"chosen one beside the dense network, by {LOOKS} clocks of their own: the median, and in "
        "brackets the lowest and the highest, as a share of the budget (`python "
        "benchmarks/speed.py latency`).",
        "",
        row(
            ["model", "px", "runtime", "device", "dense, ms", "networks", "table, s",
             "its error, %", "budget", "candidates measured", "share of the MACs",
             "measured again / budget"]
        ),
        row(["---"] * 12),
    ]  # fmt: skip
    for line in lines:
        again = line["again"]
        found.append(
            row(
                [line["model"], line["size"], line["runtime"], where(line),
                 f"{line['dense_ms']:.1f}", line["networks"], f"{line['tabulated_s']:.0f}",
                 f"{100 * line['error']:.1f}", line["budget"], line["looks"],
                 f"{line['macs']:.3f}",
                 f"{statistics.median(again):.3f} ({min(again):.3f}–{max(again):.3f})"]
            )
        )  # fmt: skip
    return [*found, ""]
