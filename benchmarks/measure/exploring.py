"""Scoring candidates beside plain forward passes of the extracted networks (needs Ray)."""

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from markdown_table import row
from torch import nn

from stp_ray.elastic import Subnet

from .setting import Line, clock, clock_option, in_turn
from .words import where

if TYPE_CHECKING:
    from stp_ray.config import RunConfig
    from stp_ray.stages.explore import Scorer

BUDGETS = (0.5, 0.3, 0.15)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet20", help="one that a recipe may name")
    parser.add_argument("--size", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--calibration", type=int, default=512, help="images")
    parser.add_argument("--scoring", type=int, default=256, help="images")
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    clock_option(parser)


def settings(model: str, size: int, calibration: int, scoring: int, **explore: int) -> "RunConfig":
    """A run on scikit-learn's digits, resized: speed does not ask what images show."""
    from stp_ray.config import load_config

    return load_config({
        "name": "speed", "budgets": list(BUDGETS), "model": {"name": model},
        "data": {"name": "digits", "image_size": size, "holdout": scoring},
        "explore": {  # slices as they are: tuning is training, which `step` measures
            "calibration_images": calibration, "scoring_images": scoring, "tuning_steps": 0,
            "finalists": 0, **explore,
        },
        "tracking": {"wandb": "off", "console": False},
    })  # fmt: skip


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """Candidates of a first generation, each scored and each run as a network of its own."""
    from stp_ray.data import describe
    from stp_ray.method import Explorer
    from stp_ray.stages.explore import Scorer
    from stp_ray.stages.images import share
    from stp_ray.stages.network import build_supernet

    config = settings(arguments.model, arguments.size, arguments.calibration, arguments.scoring)
    summary = describe(config.data)
    weights = build_supernet(config, summary).model.state_dict()
    images = share(config.data, summary, in_process=True)
    scorer = Scorer(config, images.here(), weights, device)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    explorer = Explorer(scorer.net.space, config.budgets, config.explore, 0)
    asked = random.Random(0).sample(explorer.ask(), arguments.candidates)
    ratios, seconds, first = [], [], []
    for candidate in asked:
        subnet, count = candidate.subnet, candidate.images
        plain = alone(scorer, subnet, count)
        taken = in_turn(
            {"ours": lambda s=subnet, n=count: scorer(s, n, False), "plain": plain},
            arguments.repeats, device, arguments.processor_time,
        )  # fmt: skip
        ratios.append(taken["plain"] / taken["ours"])
        seconds.append(taken["ours"])
        first.append(scorer.net.cost(subnet).macs / scorer.net.cost().macs)
    yield {
        "model": arguments.model, "size": arguments.size, "candidates": arguments.candidates,
        "calibration": arguments.calibration, "scoring": arguments.scoring,
        "repeats": arguments.repeats, "clock": clock(arguments),
        "macs": round(statistics.mean(first), 3),
        "candidates_per_s": round(len(seconds) / sum(seconds), 3),
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
    }  # fmt: skip


def alone(scorer: "Scorer", subnet: Subnet, count: int) -> Callable[[], object]:
    """The extracted network over the same batches: those of calibration with the statistics of
    each batch, those of scoring with running ones."""
    from stp_ray.stages.images import EVALUATION_BATCH

    network = scorer.net.extract(subnet)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # an average over all batches, as calibration takes it
    batches = scorer.held_out[: count or None].split(EVALUATION_BATCH)

    def run() -> None:
        with torch.no_grad():
            network.train()
            for batch in scorer.calibration:
                network(batch)
            network.eval()
            for batch in batches:
                network(batch)

    return run


def table(lines: list[Line]) -> list[str]:
    found = [
        "### Scoring a candidate",
        "",
        "Rate of the worker's scoring, calibration included, over that of plain forward passes of "
        "the extracted network over the same images; median (quartiles) over candidates of a "
        "first generation, each side in turn (`python benchmarks/speed.py exploring`).",
        "",
        row(["model", "px", "images (calibration + scoring)", "mean MACs", "device",
             "candidates/s", "of plain passes"]),
        row(["---"] * 7),
    ]  # fmt: skip
    for line in lines:
        low, high = line["quartiles"]
        cells = [line["model"], line["size"], f"{line['calibration']} + {line['scoring']}"]
        cells += [f"{line['macs']:.2f}", where(line), f"{line['candidates_per_s']:.2f}"]
        found.append(row([*cells, f"{line['ratio']:.2f} ({low:.2f}, {high:.2f})"]))
    return [*found, ""]
