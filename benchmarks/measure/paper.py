"""ImageNet on 1, 8 and 64 GPUs: calculated from public figures, not measured (needs pydantic)."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from markdown_table import row

from .setting import Line

if TYPE_CHECKING:
    from stp_ray.config import RunConfig

#: Images a second that one A100 trains ResNet-50 on in mixed precision, data included: NVIDIA,
#: DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5 (container 21.03, A100 80GB).
IMAGES_PER_S = 2470
#: Bytes a second that a GPU sends to its neighbour: NVLink 3 within a machine of eight (NVIDIA,
#: A100: 600 GB/s both ways together), and 400 Gbit/s of network for each machine beyond (AWS, p4d).
WITHIN, BETWEEN = 300e9, 50e9
MACHINE = 8
#: Dollars for an hour of one GPU: p4d.24xlarge on demand, 32.77 for eight (AWS, us-east-1, 2024).
PRICE = 4.10
#: ImageNet-1k (Russakovsky et al., 2015).
TRAIN, TEST = 1_281_167, 50_000

#: GPUs -> workers of each budget in the last stage, which has three budgets side by side if they
#: fit. Both divide the batches of the recipe.
GPUS = {1: 1, 8: 2, 64: 16}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="imagenet_resnet50")


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """The recipe's MACs, counted as `--dry-run` does, at the public rate; gradients in a ring."""
    from stp_ray.config import load_config

    for gpus, each in GPUS.items():
        config = load_config(
            arguments.recipe,
            [f"cluster.num_workers={gpus}", f"finalize.num_workers={each}", "data.uri=unused"],
        )
        yield {"recipe": arguments.recipe, "gpus": gpus, **planned(config, gpus)}


def planned(config: "RunConfig", gpus: int) -> Line:
    """Hours of every stage, and the share of them that gradients are on their way."""
    from stp_ray.data import DataSummary
    from stp_ray.elastic import Supernet
    from stp_ray.models import build_model
    from stp_ray.stages.plan import _work

    size, held = config.data.image_size or 224, config.data.holdout
    summary = DataSummary(
        class_names=[str(label) for label in range(1000)], train_rows=TRAIN - held,
        holdout_rows=held, test_rows=TEST, image_size=size, held_size=size * 8 // 7, bytes=0,
        streams=True, fingerprint="",
    )  # fmt: skip
    with torch.device("meta"):
        model = build_model(config.model.name, num_classes=1000, image_size=size)
        images = torch.empty(1, 3, size, size)
    net = Supernet.trace(model, images, divisor=config.space.divisor)
    rate = IMAGES_PER_S * 3 * net.cost().macs  # MACs a second, forward and backward
    gradient = 4 * net.cost().params
    steps = {
        "baseline": config.baseline, "supernet": config.supernet.optimisation,
        "finalize": config.finalize.optimisation,
    }  # fmt: skip
    computing: dict[str, float] = {}
    sending: dict[str, float] = {}
    budgets = {budget.label: budget for budget in config.budgets}
    for name, workers, macs in _work(config, net, summary, budgets):
        stage = name.partition("/")[0]
        optimisation = steps.get(stage)
        sent = 0.0
        if optimisation is not None:
            count = optimisation.epochs * (summary.train_rows // optimisation.batch_size)
            sent = count * ring(gradient, workers)
        beside = min(len(config.budgets), gpus // workers) if stage == "finalize" else 1
        computing[stage] = computing.get(stage, 0) + macs / rate / workers / beside
        sending[stage] = sending.get(stage, 0) + sent / beside
    hours = {stage: (computing[stage] + sending[stage]) / 3600 for stage in computing}
    total = sum(hours.values())
    return {
        "hours": {stage: round(taken, 2) for stage, taken in hours.items()},
        "total_hours": round(total, 1),
        "network_share": round(sum(sending.values()) / 3600 / total, 4),
        "gpu_hours": round(gpus * total), "dollars": round(gpus * total * PRICE),
    }  # fmt: skip


def ring(size: float, workers: int) -> float:
    """Seconds of a ring all-reduce of so many bytes, which waits for its slowest link."""
    return 2 * (workers - 1) / workers * size / (WITHIN if workers <= MACHINE else BETWEEN)


def table(lines: list[Line]) -> list[str]:
    stages = list(lines[0]["hours"])
    found = [
        f"### On paper: {lines[0]['recipe']}",
        "",
        "**Calculated, not measured** (`python benchmarks/speed.py paper`): the MACs of the recipe "
        f"as `--dry-run` counts them, each at the rate at which an A100 trains the dense network, "
        f"{IMAGES_PER_S:,} images a second ([NVIDIA, mixed precision]"
        "(https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/"
        "ConvNets/resnet50v1.5)); small networks keep a GPU less busy, so take it for a lower "
        "bound. One gradient in single precision is reduced in a ring at the end of each step, "
        f"overlapping nothing, at {WITHIN / 1e9:.0f} GB/s within a machine of {MACHINE} GPUs "
        f"(NVLink) and {BETWEEN / 1e9:.0f} GB/s between them (400 Gbit/s). All GPUs are paid for "
        f"to the end, at {PRICE:.2f} dollars an hour (p4d.24xlarge on demand, 32.77 dollars for "
        "eight). Three budgets; their trainings run side by side on "
        f"{', '.join(str(GPUS[line['gpus']]) for line in lines)} GPUs each, one after the other "
        "where there is one GPU.",
        "",
        row(["GPUs", *(f"{stage}, h" for stage in stages), "together, h", "network, %",
             "GPU-hours", "dollars"]),
        row(["---"] * (5 + len(stages))),
    ]  # fmt: skip
    for line in lines:
        cells = [line["gpus"], *line["hours"].values(), line["total_hours"]]
        cells += [f"{100 * line['network_share']:.1f}", f"{line['gpu_hours']:,}"]
        found.append(row([*cells, f"{line['dollars']:,}"]))
    return [*found, ""]
