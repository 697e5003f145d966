"""How time grows with subnets, axes, candidates and images."""

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from markdown_table import row

from stp_ray.data import DataOptions, load
from stp_ray.elastic import Budget, SearchSpace, Supernet
from stp_ray.method import Exploration, Explorer
from stp_ray.models import build_model

from .setting import CASES, Line, Setting, clock, clock_option, in_turn
from .streaming import write
from .words import where

BUDGET = Budget(macs=0.15)
#: Networks of ever more axes, and the size of their images.
NETWORKS = {"resnet20": 32, "resnet56": 32, "resnet50": 224, "resnet152": 224}
#: Subnets that are drawn or priced at a time.
DRAWN, PRICED = 20, 1000


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list(CASES), default="resnet20", help="of the steps")
    parser.add_argument("--subnets", type=int, nargs="*", default=[1, 2, 4], help="K")
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--populations", type=int, nargs="*", default=[32, 128, 512])
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 2000, 4000, 8000])
    parser.add_argument("--repeats", type=int, default=2)
    clock_option(parser)


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """Each quantity at all of its sizes in turn; `each` is the time for one unit of size."""
    with tempfile.TemporaryDirectory(prefix="stp-speed-") as folder:
        for quantity, unit, ways in (
            steps(arguments, device),
            *searched(arguments.networks),
            evolved(arguments.populations),
            loaded(arguments.images, Path(folder)),
        ):
            works = {str(size): work for size, (_, work) in ways.items()}
            taken = in_turn(works, arguments.repeats, device, arguments.processor_time)
            for size, (units, _) in ways.items():
                yield {
                    "quantity": quantity, "size": size, "unit": unit, "clock": clock(arguments),
                    "ms": round(1e3 * taken[str(size)], 3),
                    "each_ms": float(f"{1e3 * taken[str(size)] / units:.4g}"),
                }  # fmt: skip


#: Size -> how many units of work that is, and the work.
Ways = dict[int, tuple[float, Callable[[], object]]]


def steps(arguments: argparse.Namespace, device: torch.device) -> tuple[str, str, Ways]:
    """Steps with ever more subnets of half the widths."""
    ways: Ways = {}
    for count in arguments.subnets:
        setting = Setting(arguments.model, device)
        subnet = setting.net.space.uniform(0.5)
        share = setting.net.cost(subnet).macs / setting.net.cost().macs
        ways[count] = (1 + count * share, setting.our_step([subnet] * count))
    return f"a step of {arguments.model} with K subnets", "MACs of the dense step", ways


def searched(networks: list[str]) -> Iterator[tuple[str, str, Ways]]:
    """What the search does with a space of ever more axes, without images."""
    tracing: Ways = {}
    drawing: Ways = {}
    pricing: Ways = {}
    for name in networks:
        size = NETWORKS[name]
        with torch.device("meta"):
            model = build_model(name, num_classes=1000, image_size=size)
            images = torch.empty(1, 3, size, size)
        space = Supernet.trace(model, images).space
        axes = len(space.axes)
        tracing[axes] = (axes, lambda m=model, x=images: Supernet.trace(m, x))
        drawing[axes] = (axes * DRAWN, lambda s=space: draw(s, DRAWN))
        many = [space.sample(random.Random(0))] * PRICED
        pricing[axes] = (axes * PRICED, lambda s=space, m=many: s.costs(m))
    yield f"tracing a network ({', '.join(networks)})", "axis", tracing
    yield f"drawing {DRAWN} subnets within {BUDGET.label} of the MACs, by axes", "axis", drawing
    yield f"pricing {PRICED:,} subnets, by axes", "axis", pricing


def draw(space: SearchSpace, count: int) -> None:
    rng = random.Random(0)
    for _ in range(count):
        space.sample(rng, BUDGET)


def evolved(populations: list[int]) -> tuple[str, str, Ways]:
    """Searches of ever more candidates that get a score for nothing."""
    model = build_model("resnet56", num_classes=10, image_size=32)
    space = Supernet.trace(model, torch.zeros(1, 3, 32, 32)).space
    generations = 4

    def search(population: int) -> None:
        options = Exploration(
            generations=generations, population=population, promote=0.25, finalists=0
        )
        explorer, rng = Explorer(space, [BUDGET], options, 0), random.Random(0)
        while asked := explorer.ask():
            explorer.tell({candidate.key: rng.random() for candidate in asked})

    ways: Ways = {generations * n: (generations * n, lambda n=n: search(n)) for n in populations}
    return "the search around the scoring, four generations of resnet56", "candidate", ways


def loaded(counts: list[int], folder: Path) -> tuple[str, str, Ways]:
    """Data sets of ever more JPEG files of 32 pixels, decoded into memory."""
    ways: Ways = {}
    for count in counts:
        write(folder / str(count), count, 1, 32)
        data = DataOptions(name="parquet", uri=str(folder / str(count)), holdout=1)
        ways[count] = (count, lambda data=data: load(data))
    return "loading images of 32 px", "image", ways


def table(lines: list[Line]) -> list[str]:
    found = [
        "### How time grows",
        "",
        "Time that is in proportion to a size keeps its last column (`python benchmarks/speed.py "
        "growth`); workers and larger data sets are in the tables of data-parallel workers and of "
        "streaming.",
        "",
        row(["what", "size", "device", "ms", "ms for each", "of"]),
        row(["---"] * 6),
    ]
    for line in lines:
        cells = [line["quantity"], f"{line['size']:,}", where(line), f"{line['ms']:,.1f}"]
        found.append(row([*cells, line["each_ms"], line["unit"]]))
    return [*found, ""]
