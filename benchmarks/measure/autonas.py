"""A step of supernet training beside that of `nvidia-modelopt`'s search space `autonas`.

It asks for much that nothing else here needs, so it gets an environment of its own:

    python -m venv ENVIRONMENT
    ENVIRONMENT/bin/pip install torch torchvision pyarrow nvidia-modelopt requests huggingface_hub
    PYTHONPATH=. ENVIRONMENT/bin/python benchmarks/speed.py autonas

nvidia-modelopt 0.47.0 imports the last two without asking for them. Elsewhere the action says so
and is skipped.
"""

import argparse
import copy
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from stp_ray.elastic import SearchSpace, Subnet
from stp_ray.method import cross_entropy, kl_divergence

from .group import data_parallel, gathered
from .setting import Line, Setting, clock_option, sgd
from .step import OTHERS, compare, rows


def options(parser: argparse.ArgumentParser) -> None:
    # Those whose stages are sequences of blocks: `autonas` shortens nothing else.
    parser.add_argument("--model", choices=["resnet20", "resnet50"], default="resnet50")
    parser.add_argument("--draws", type=int, default=16, help="random subnets")
    parser.add_argument("--workers", type=int, default=1, help="data-parallel, of one thread each")
    parser.add_argument("--repeats", type=int, default=3)
    clock_option(parser)


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """Ratios of each way's time to that of the dense step and the subnet alone."""
    try:
        import_module("modelopt.torch.nas")
    except ImportError as error:
        print(
            f"skipped: found no nvidia-modelopt ({error}); expected an environment that has it; "
            "make one as benchmarks/measure/autonas.py says"
        )
        sys.exit()
    if arguments.workers > 1:
        yield gathered(_measured, arguments.workers, arguments, device)
    else:
        yield _measured(0, 1, arguments, device)


def _measured(rank: int, workers: int, arguments: argparse.Namespace, device: torch.device) -> Line:
    import modelopt
    import modelopt.torch.nas as mtn

    setting, rng = Setting(arguments.model, device), random.Random(0)
    model = mtn.convert(copy.deepcopy(setting.dense), mode="autonas").train()
    full = mtn.get_subnet_config(model)
    # Its space is the smaller one, so it draws, and all ways have the same subnets.
    drawn = [mtn.sample(model, rng.choice) for _ in range(arguments.draws)]
    configs = {same(setting.net.space, config): config for config in drawn}

    def autonas(setting: Setting, subnets: Sequence[Subnet]) -> Callable[[], object]:
        """A backward pass for each network, chosen before its forward pass."""
        optimizer, config = sgd(model), configs[subnets[0]]
        module = data_parallel(model, parts=True)

        # Without this every forward pass of a training draws a subnet by itself.
        @mtn.no_modelopt_patches()
        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            mtn.select(model, full)
            main = module(setting.images)
            cross_entropy(main, setting.labels).backward()
            mtn.select(model, config)
            kl_divergence(main, module(setting.images)).backward()
            optimizer.step()

        return step

    with mtn.no_modelopt_patches():
        for subnet, config in configs.items():
            mtn.select(model, config)
            check(setting, subnet, model)
    ways = {**OTHERS, "autonas": autonas}
    space = setting.net.space
    macs = [space.cost(subnet).macs / space.cost().macs for subnet in configs]
    return {
        **compare(setting, [[subnet] for subnet in configs], ways, arguments, rank, workers),
        "macs": round(statistics.median(macs), 3),
        "modelopt": modelopt.__version__,
    }


def same(space: SearchSpace, config: Mapping[str, Any]) -> Subnet:
    """The subnet that a configuration of `autonas` is: widths, and how many blocks of a stage."""
    widths = {axis.name: config[f"{axis.name}.out_channels"] for axis in space.axes}
    places = [(block.name, *block.name.rsplit(".", 1)) for block in space.blocks]
    dropped = [name for name, stage, at in places if int(at) >= config[f"{stage}.depth"]]
    return space.canonical(Subnet(widths, dropped))


@torch.no_grad()
def check(setting: Setting, subnet: Subnet, model: nn.Module) -> None:
    """Both networks, of the same weights, have to answer the same."""
    ours, theirs = setting.net.train()(setting.images, subnet), model(setting.images)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(ours.abs().max())):
        raise RuntimeError(f"found other answers of autonas's subnet; expected those of {subnet}")


def table(lines: list[Line]) -> list[str]:
    versions = ", ".join(sorted({line["modelopt"] for line in lines}))
    macs = ", ".join(f"{line['macs']:.2f}" for line in lines)
    return [
        "### A step beside autonas",
        "",
        f"The same ratios beside the search space `autonas` of `nvidia-modelopt` {versions}, all "
        "in one run over the same random subnets, which `autonas` draws (median share of the MACs: "
        f"{macs}). Its step is a backward pass for the main network and one for the subnet, each "
        "chosen before its forward pass (`python benchmarks/speed.py autonas --model MODEL`, in an "
        "environment of its own that `benchmarks/measure/autonas.py` describes).",
        "",
        *rows(lines),
        "",
    ]
