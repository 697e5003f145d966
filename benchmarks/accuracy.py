"""STP against everything else at equal cost: equal epochs, and equal MACs of training.

    python benchmarks/accuracy.py cifar10_resnet20_cpu --data FOLDER
    python benchmarks/accuracy.py cifar10_resnet56 --data FOLDER --jobs 16
    python benchmarks/accuracy.py --smoke

Each trained network is one line of `benchmarks/results/accuracy/PROTOCOL.jsonl`; what is there
already is not trained again. `benchmarks/results.py render` makes the tables.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import Bench, Images, Protocol, macs_of
from contenders import GIVEN_SHAPE, OURS, OWN_SHAPE, QUARTER, TWICE, WHOLE, Limit, Trained
from filling import Cell, Line, Table, fill
from surroundings import surroundings

from stp_ray.data.options import DataOptions
from stp_ray.elastic import Subnet
from stp_ray.method import Exploration

HERE = Path(__file__).resolve().parent
KEPT = HERE / "results" / "accuracy"

CIFAR10 = DataOptions(
    name="parquet", holdout=512, crop_padding=4, flip=True,
    mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262),
)  # fmt: skip
REDUCED = Exploration(
    generations=6, population=32, parents=16, calibration_images=512, scoring_images=256
)
# reduced, for two cores: 16,000 small images, few epochs
RESNET20 = Protocol(
    model="resnet20", data=replace(CIFAR10, image_size=12, crop_padding=1, limit=16_512),
    epochs=12, batch_size=64, lr=0.1, calibration_images=1024, also=(0.5, 0.3),
    exploration=REDUCED,
)  # fmt: skip
PROTOCOLS = {
    "cifar10_resnet20_cpu": RESNET20,
    # the same on seeds that no option of any method was chosen by
    "cifar10_resnet20_fresh": replace(RESNET20, seeds=(3, 4, 5)),
    # widths in multiples of 8, as its matrix units want them; batches that fill a large GPU
    "cifar10_resnet56": Protocol(
        model="resnet56", divisor=8, data=replace(CIFAR10, holdout=2000), epochs=24,
        batch_size=512, lr=0.4, warmup_epochs=2, precision="bf16", also=(0.5, 0.3),
        exploration=Exploration(generations=10),
    ),
    # as many steps, of few images that are seen often
    "cifar10_resnet20_few": Protocol(
        model="resnet20", data=replace(CIFAR10, image_size=12, crop_padding=1, limit=2_512),
        epochs=96, batch_size=64, lr=0.1, calibration_images=1024, exploration=REDUCED,
        reference=QUARTER,
    ),
    # half as wide, and strides for small images
    "cifar10_mobilenet_v2_cpu": Protocol(
        model="mobilenet_v2", model_options={
            "width_mult": 0.5,
            "inverted_residual_setting": [  # expansion, channels, blocks, stride
                [1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 1], [6, 96, 3, 1],
                [6, 160, 3, 2], [6, 320, 1, 1],
            ],
        },
        data=replace(CIFAR10, image_size=12, crop_padding=1, limit=8_512), epochs=12,
        batch_size=64, lr=0.03, calibration_images=1024, exploration=REDUCED, reference=QUARTER,
    ),
    "cifar10_vit_cpu": Protocol(
        model="torchvision.models:VisionTransformer", model_options={
            "patch_size": 8, "num_layers": 6, "num_heads": 6, "hidden_dim": 96, "mlp_dim": 192,
        },
        redrawn=True,  # from torchvision's weights the dense network ends lower
        data=replace(CIFAR10, limit=16_512), epochs=12, batch_size=64, optimizer="adamw", lr=1e-3,
        weight_decay=0.05, exploration=REDUCED, reference=QUARTER,
    ),
    # no deeper than that a block of each stage can still be dropped
    "smoke": Protocol(
        model="stp_ray.models:CifarResNet", model_options={"depth": 14},
        data=DataOptions(name="digits", holdout=64, limit=320), epochs=4,
        batch_size=32, calibration_images=64, seeds=(0,), budgets=(0.3,),
        exploration=Exploration(
            generations=2, population=4, parents=2, calibration_images=64, scoring_images=32,
            final_steps=30,
        ),
    ),
}  # fmt: skip


ACCOUNTING = ("epochs", "macs")


def cells(budgets: Sequence[float], methods: list[str], accounting: list[str]) -> list[Cell]:
    """Everything to train for these budgets and one seed, in the order of the methods."""
    found = []
    for count in accounting:
        for method in methods:
            if count == "macs" and method.startswith(OURS) and not OWN_SHAPE[method].saves:
                continue  # STP's own expense is what equal MACs means
            if count == "macs" and method in TWICE:
                continue  # what they have twice is epochs
            of = (1.0,) if method in WHOLE and count == "epochs" else budgets
            found += [{"method": method, "budget": b, "equal": count} for b in of]
    return found


def needs(reference: str, cell: Cell) -> list[str]:
    """The methods whose line at the same budget a cell cannot do without."""
    return [reference] if cell["equal"] == "macs" else []


def train(bench: Bench, cell: Cell, done: list[Line]) -> Line | None:
    """One line of the results: the cell, and what came out of it. None where that took more MACs
    than there were, as a search can that is dear beside a short training."""
    protocol, method, budget = bench.protocol, cell["method"], cell["budget"]
    lines = {line["method"]: line for line in done if line["budget"] == budget}
    macs = lines[protocol.reference]["training_macs"] if cell["equal"] == "macs" else None
    limit = Limit(protocol.epochs, macs)
    started = time.perf_counter()
    if method in GIVEN_SHAPE:
        make, finder = GIVEN_SHAPE[method]
        if finder in lines:
            shape = Subnet.from_json(lines[finder]["subnet"])
        else:
            shape = OWN_SHAPE[finder].found(bench, budget)
        trained = make(bench, shape, limit)
    else:
        trained = OWN_SHAPE[method](bench, budget, limit)
    if macs is not None and trained.spent > macs:
        print(
            f"seed {bench.seed}  {method} at {budget} is left out: it took "
            f"{trained.spent / 1e9:.1f} GMACs, and {protocol.reference} {macs / 1e9:.1f}",
            flush=True,
        )
        return None
    return {
        **cell,
        "seed": bench.seed,
        **figures(bench, trained),
        "seconds": round(time.perf_counter() - started, 1),
    }


def figures(bench: Bench, trained: Trained) -> dict[str, Any]:
    network = trained.network.eval()
    return {
        "top1": bench.top1(network),
        "macs": macs_of(network, bench.example),
        "full_macs": bench.full_macs,
        "params": sum(p.numel() for p in network.parameters()),
        "epochs": trained.epochs,
        "training_macs": trained.spent,
        "subnet": trained.subnet.to_json() if trained.subnet else None,
        **trained.notes,
    }


def add_data(parser: argparse.ArgumentParser) -> None:
    """The option that says where the images are."""
    folder = os.environ.get("STP_DATA")
    parser.add_argument(
        "--data",
        default=folder and f"{folder}/cifar10",
        help="folder or URI with train.parquet and test.parquet; default: $STP_DATA/cifar10",
    )


def protocol_of(parser: argparse.ArgumentParser, name: str, data: str | None) -> Protocol:
    """A protocol with its images, which all but the smoke test want."""
    protocol = PROTOCOLS[name]
    if name == "smoke":
        return protocol
    if data is None:
        parser.error("expected --data, the folder of train.parquet and test.parquet, or STP_DATA")
    return replace(protocol, data=replace(protocol.data, uri=data))


class Worker:
    """What a process trains cells with: images that are read once."""

    def __init__(self, protocol: Protocol, work: Path) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._protocol, self._work = protocol, work
        self._images, self._around = Images(protocol.data, device), surroundings(device)

    def __call__(self, seed: int, cell: Cell, done: list[Line]) -> Line | None:
        bench = Bench(self._protocol, self._images, seed, self._work)
        line = train(bench, cell, done)
        return line and {**line, **self._around}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("protocol", nargs="?", choices=[p for p in PROTOCOLS if p != "smoke"])
    add_data(parser)
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument("--seed", type=int, help="default: those of the protocol", **several)
    parser.add_argument(
        "--method", metavar="METHOD", choices=[*OWN_SHAPE, *GIVEN_SHAPE],
        help="names that contenders.py has; default: all", **several,
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, help="default: those that the supernet is trained for", **several
    )
    parser.add_argument("--equal", choices=ACCOUNTING, help="default: both", **several)
    parser.add_argument(
        "--work",
        type=Path,
        help="where weights are kept that several methods need, a folder for this protocol alone; "
        "default: a temporary one",
    )
    parser.add_argument("--out", type=Path, help="the file of results")
    parser.add_argument(
        "--jobs", type=int, default=1,
        help="networks trained side by side, each in a process of its own, on the same device",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="every method for a few steps")
    chosen = parser.parse_args()
    if chosen.smoke == (chosen.protocol is not None):
        parser.error("expected a protocol or --smoke")
    protocol = protocol_of(parser, chosen.protocol or "smoke", chosen.data)
    budgets = chosen.budget or protocol.budgets
    if unknown := set(budgets) - {*protocol.budgets, *protocol.also}:
        parser.error(f"--budget is {unknown}; expected some of {protocol.budgets + protocol.also}")
    methods = chosen.method or [*OWN_SHAPE, *GIVEN_SHAPE]
    with tempfile.TemporaryDirectory() as scratch:
        work = chosen.work or Path(scratch)
        out = chosen.out or (
            Path(scratch) / "smoke.jsonl" if chosen.smoke else KEPT / f"{chosen.protocol}.jsonl"
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        seeds = chosen.seed or protocol.seeds
        each = cells(budgets, methods, chosen.equal or list(ACCOUNTING))
        if chosen.jobs == 1:
            wanted = [(seed, cell) for seed in seeds for cell in each]
        else:  # the first of all seeds, which others wait for, side by side
            wanted = [(seed, cell) for cell in each for seed in seeds]
        table = Table(out, wanted, partial(needs, protocol.reference))
        fill(table, partial(Worker, protocol, work), chosen.jobs)


if __name__ == "__main__":
    main()
