"""A step of supernet training beside the arithmetic that it cannot do without."""

import argparse
import gc
import random
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from markdown_table import row
from torch import Tensor, nn

from stp_ray.elastic import Subnet
from stp_ray.method import Stimulation, StimulativeObjective, cross_entropy, kl_divergence

from .group import data_parallel, gathered
from .setting import Line, Setting, clock, clock_option, in_turn, model_options, sgd
from .words import where


def at_once(setting: Setting, subnets: Sequence[Subnet]) -> Callable[[], object]:
    """One graph over the main network and all subnets, slices taken by autograd."""
    net, optimizer = setting.net.train(), sgd(setting.net)
    objective = data_parallel(StimulativeObjective(net, Stimulation(subnets=len(subnets))))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(setting.images, setting.labels, subnets)["loss"].backward()
        optimizer.step()

    return step


def one_by_one(setting: Setting, subnets: Sequence[Subnet]) -> Callable[[], object]:
    """A backward pass for the main network and one for each subnet, slices taken by autograd;
    workers reduce the gradients after each."""
    net, optimizer = data_parallel(setting.net.train(), parts=True), sgd(setting.net)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        main = net(setting.images)
        cross_entropy(main, setting.labels).backward()
        for subnet in subnets:
            loss = kl_divergence(main, net(setting.images, subnet))
            (loss / len(subnets)).backward()
        optimizer.step()

    return step


def masking(setting: Setting, subnets: Sequence[Subnet]) -> Callable[[], object]:
    """The whole network for each subnet, the outputs of its layers multiplied by zeros and ones."""
    model, optimizer = data_parallel(setting.dense.train()), sgd(setting.dense)
    masks = [_masks(setting, subnet) for subnet in subnets]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        main = model(setting.images)
        cross_entropy(main, setting.labels).backward()
        for kept in masks:
            hooks = [
                layer.register_forward_hook(lambda _, __, out, mask=mask: out * mask)
                for layer, mask in kept
            ]
            loss = kl_divergence(main, model(setting.images))
            for hook in hooks:
                hook.remove()
            (loss / len(subnets)).backward()
        optimizer.step()

    return step


def _masks(setting: Setting, subnet: Subnet) -> list[tuple[nn.Module, Tensor]]:
    """Zeros and ones for the output channels of every convolution and normalisation."""
    found = []
    for name, cuts in setting.net.slices(subnet).items():
        layer = setting.dense.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and 0 in cuts and not isinstance(layer, nn.Linear):
            mask = torch.zeros(len(layer.weight), device=setting.device)
            for start, stop in cuts[0]:
                mask[start:stop] = 1
            spatial = not isinstance(layer, nn.LayerNorm)
            found.append((layer, mask[:, None, None] if spatial else mask))
    return found


OTHERS = {"all at once": at_once, "one by one": one_by_one, "masking": masking}


def options(parser: argparse.ArgumentParser) -> None:
    model_options(parser)
    parser.add_argument("--draws", type=int, default=16, help="sets of K random subnets")
    parser.add_argument("--workers", type=int, default=1, help="data-parallel, of one thread each")
    clock_option(parser)


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """Ratios of each way's time to that of the dense step and the subnets alone."""
    if arguments.workers > 1:
        yield gathered(_measured, arguments.workers, arguments, device)
    else:
        yield _measured(0, 1, arguments, device)


def _measured(rank: int, workers: int, arguments: argparse.Namespace, device: torch.device) -> Line:
    setting, rng = Setting(arguments.model, device), random.Random(0)
    sets = [
        [setting.net.space.sample(rng) for _ in range(arguments.subnets)]
        for _ in range(arguments.draws)
    ]
    return compare(setting, sets, OTHERS, arguments, rank, workers)


def compare(
    setting: Setting,
    sets: Sequence[Sequence[Subnet]],
    others: dict[str, Callable[[Setting, Sequence[Subnet]], Callable[[], object]]],
    arguments: argparse.Namespace,
    rank: int = 0,
    workers: int = 1,
) -> Line:
    """Our step and other ways over the same sets of subnets, in turn."""
    ratios: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
    settings = dict.fromkeys(["dense", *ratios], setting)
    if workers > 1:  # reductions of several ways would hang on the same parameters
        settings = {name: Setting(arguments.model, setting.device) for name in settings}
    dense = []
    for subnets in sets:
        ways = {
            "dense": settings["dense"].dense_step(data_parallel),
            **{f"alone {i}": setting.alone(subnet) for i, subnet in enumerate(subnets)},
            "ours": settings["ours"].our_step(subnets, data_parallel, rank, workers),
            **{name: make(settings[name], subnets) for name, make in others.items()},
        }
        if workers > 1:
            for way in ways.values():
                way()  # the second step fills the buckets as they stay
        taken = in_turn(ways, arguments.repeats, setting.device, arguments.processor_time)
        floor = taken["dense"] + sum(taken[f"alone {i}"] for i in range(len(subnets)))
        dense.append(taken["dense"])
        for name, ratio in ratios.items():
            ratio.append(taken[name] / floor)
        ways.clear()
        gc.collect()  # reductions hang on parameters until then
    return {
        "model": arguments.model, "size": setting.case.size, "batch": setting.case.batch,
        "subnets": len(sets[0]), "draws": len(sets), "repeats": arguments.repeats,
        "workers": workers, "clock": clock(arguments),
        "dense_s": round(statistics.median(dense), 4),
        "ratio": {name: round(statistics.median(found), 3) for name, found in ratios.items()},
        "quartiles": {
            name: [round(q, 3) for q in statistics.quantiles(found, n=4)[::2]]
            for name, found in ratios.items()
        },
    }  # fmt: skip


def table(lines: list[Line]) -> list[str]:
    return [
        "### A step beside its arithmetic",
        "",
        "Time of a step with the main network and K subnets, over the time of a dense step and of "
        "the extracted subnets alone, forward and backward; median (quartiles) over random sets of "
        "subnets, all sides in turn in one run (`python benchmarks/speed.py step --model MODEL "
        "--subnets K --workers N`). Ours is the whole step of the trainer. Several workers are "
        "data-parallel, of one thread each; their dense step reduces its gradient too. "
        "Convolutions on a CPU are compiled for each shape that is new; here all that occur have "
        "been, on every side.",
        "",
        *rows(lines),
        "",
        "All at once: one graph over all networks, slices taken by autograd. One by one: a "
        "backward pass for each, slices taken by autograd. Masking: the whole network for each "
        "subnet, outputs multiplied by zeros and ones. The last two reduce their gradients after "
        "each backward pass, as DistributedDataParallel does.",
        "",
    ]


def rows(lines: list[Line]) -> list[str]:
    """A row for each line of `compare`, below those of the head."""
    ways = list(lines[0]["ratio"])
    found = [
        row(["model", "px", "batch", "K", "workers", "device", "dense s", *ways]),
        row(["---"] * (7 + len(ways))),
    ]
    for line in lines:
        cells = [line["model"], line["size"], line["batch"], line["subnets"]]
        cells += [line["workers"], where(line), f"{line['dense_s']:.3f}"]
        for way in ways:
            low, high = line["quartiles"][way]
            cells.append(f"{line['ratio'][way]:.2f} ({low:.2f}, {high:.2f})")
        found.append(row(cells))
    return found
