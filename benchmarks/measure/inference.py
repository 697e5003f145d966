"""A dense network beside pruned ones where they are used: ONNX Runtime and eager PyTorch."""

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from bench import macs_of
from markdown_table import row
from torch import Tensor, nn

from stp_ray.elastic import Budget, SearchSpace, Subnet, Supernet
from stp_ray.elastic.latency import tabulate
from stp_ray.export import ONNX, to_onnx
from stp_ray.models import build_model

from .setting import Line, clock, clock_option, in_turn
from .words import where

#: Halvings of the interval in which Torch-Pruning's ratio is looked for.
HALVINGS = 7
#: Random networks that a table of latencies is asked about, and the share of the budget that those
#: use which count.
DRAWS, FILLED = 2000, 0.97


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--budget", type=float, default=0.15, help="of the dense network's MACs")
    parser.add_argument("--divisor", type=int, default=8, help="of all widths")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--repeats", type=int, nargs="*", default=[10, 1], help="one for each")
    clock_option(parser)


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """All networks in turn, on the CPU. Weights are random: time does not depend on them."""
    torch.manual_seed(0)
    example = torch.randn(1, 3, arguments.size, arguments.size)
    dense = build_model(arguments.model, num_classes=1000, image_size=arguments.size).eval()
    net = Supernet.trace(dense, example, divisor=arguments.divisor)
    bound = Budget(macs=arguments.budget)
    networks = {"dense": dense, **pruned(net, dense, example, bound, arguments.divisor)}
    full = macs_of(dense, example)
    # Exporting takes seconds, and one program does for every batch.
    program = cache(lambda network: _program(network, example))
    drawn = cache(lambda subnet: _program(net.extract(subnet), example))
    for batch, repeats in zip(arguments.batches, arguments.repeats, strict=True):
        images = torch.randn(batch, *example.shape[1:])
        networks["fast shape"] = net.extract(fastest(net.space, bound, images, drawn))
        runtimes = {"eager": _eager, "ONNX Runtime": lambda network: _onnx(program(network))}
        for runtime, made in runtimes.items():
            programs = {name: made(network) for name, network in networks.items()}
            ways = {
                name: lambda run=run, images=images: run(images) for name, run in programs.items()
            }
            taken = in_turn(ways, repeats, torch.device("cpu"), arguments.processor_time)
            yield {
                "model": arguments.model, "size": arguments.size, "budget": arguments.budget,
                "divisor": arguments.divisor, "batch": batch, "repeats": repeats,
                "runtime": runtime, "clock": clock(arguments),
                "dense_ms": round(1e3 * taken["dense"], 2),
                "macs": {n: round(macs_of(m, example) / full, 4) for n, m in networks.items()},
                "faster": {
                    name: round(taken["dense"] / seconds, 3)
                    for name, seconds in taken.items() if name != "dense"
                },
            }  # fmt: skip


def pruned(
    net: Supernet, dense: nn.Module, example: Tensor, bound: Budget, divisor: int
) -> dict[str, nn.Module]:
    """Our networks and those of Torch-Pruning, all within the budget."""
    found = {
        "uniform widths": net.extract(net.space.uniform_within(bound)),
        "random shape": net.extract(net.space.sample(random.Random(0), bound)),
    }
    assert isinstance(bound.macs, float)
    for name, everywhere in (("Torch-Pruning, even", False), ("Torch-Pruning, global", True)):
        network = torch_pruned(dense, example, bound.macs, divisor, everywhere)
        if network is not None:
            found[name] = network
    return found


def fastest(
    space: SearchSpace, bound: Budget, images: Tensor, program: Callable[[Subnet], bytes]
) -> Subnet:
    """The one of many random subnets which use up the budget that takes least in ONNX Runtime for
    such a batch, by a table that is fitted to a few.

    Args:
        program: the exported network of a subnet.
    """

    def clock(subnet: Subnet) -> float:
        run = _onnx(program(subnet))
        run(images)
        began = time.perf_counter()
        run(images)
        return time.perf_counter() - began

    # Any latency will do: it is the budget's networks that are to be looked at closely.
    near = Budget(macs=bound.macs, latency=1.0)
    space = space.timed(tabulate(space, clock, [near], seed=0).terms)
    rng, (most, _, _) = random.Random(1), bound.limits(space.cost())
    drawn = [space.sample(rng, bound) for _ in range(DRAWS)]
    costs = dict(zip(drawn, space.costs(drawn), strict=True))
    ample = [subnet for subnet in drawn if costs[subnet].macs >= FILLED * most] or drawn
    return min(ample, key=lambda subnet: costs[subnet].latency_s or 0.0)


def torch_pruned(
    dense: nn.Module, example: Tensor, budget: float, divisor: int, everywhere: bool
) -> nn.Module | None:
    """The largest network that Torch-Pruning's group magnitudes leave within the budget; None
    where no share that was tried leaves one.

    Args:
        everywhere: whether channels of all layers compete; else each layer loses the same share.
    """
    import torch_pruning as tp

    most, best = budget * macs_of(dense, example), None
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        ratio, model = (low + high) / 2, copy.deepcopy(dense)
        tp.pruner.GroupNormPruner(
            model, example, importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=everywhere, pruning_ratio=ratio, max_pruning_ratio=0.95,
            round_to=divisor,
            ignored_layers=[part for part in model.modules() if isinstance(part, nn.Linear)],
        ).step()  # fmt: skip
        if macs_of(model, example) <= most:
            best, high = model, ratio
        else:
            low = ratio
    return best


def _eager(network: nn.Module) -> Callable[[Tensor], object]:
    network.eval()

    def run(images: Tensor) -> object:
        with torch.inference_mode():
            return network(images)

    return run


def _program(network: nn.Module, example: Tensor) -> bytes:
    """The program that the product writes."""
    return to_onnx(network, example).files[ONNX]


def _onnx(program: bytes) -> Callable[[Tensor], object]:
    """Such a program at work, on as many threads as PyTorch has."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(program, settings, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[np.ndarray[Any, Any]]:
        return session.run(None, {"images": images.numpy()})

    return run


def table(lines: list[Line]) -> list[str]:
    shapes = list(dict.fromkeys(shape for line in lines for shape in line["faster"]))
    fast = (
        f" The fast shape is the one of {DRAWS:,} random ones that a table of latencies, fitted to "
        "networks which ONNX Runtime was timed on with that batch, takes for the fastest."
        if "fast shape" in shapes
        else ""
    )
    found = [
        "### Pruned networks at work",
        "",
        "How many times as fast as the dense network, all networks in turn in one run (`python "
        "benchmarks/speed.py inference`); in brackets the share of the dense network's MACs. "
        "Weights are random: a search starts from shapes like uniform widths and the random one, "
        "and Torch-Pruning's are those of its group magnitudes, every layer for itself (even) or "
        "all together (global). Widths of all are multiples of the divisor; a dash where that "
        "leaves no network so small." + fast,
        "",
        row(["model", "px", "divisor", "runtime", "batch", "device", "dense, ms", *shapes]),
        row(["---"] * (7 + len(shapes))),
    ]
    for line in lines:
        cells = [line["model"], line["size"], line["divisor"], line["runtime"], line["batch"]]
        cells += [where(line), f"{line['dense_ms']:.0f}"]
        faster, macs = line["faster"], line["macs"]
        cells += [f"{faster[s]:.2f} ({macs[s]:.3f})" if s in faster else "–" for s in shapes]
        found.append(row(cells))
    return [*found, ""]
