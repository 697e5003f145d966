"""How long the search space takes: tracing, pricing, and drawing under a tight budget.

    python benchmarks/search.py

Medians of repeats on one CPU thread, without weights. Prints JSON.
"""

import json
import random
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torchvision import models

from stp_ray.elastic import Budget, Supernet

PRICED, DRAWN, BUDGET = 100_000, 2_000, 0.15


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    images = torch.empty(1, 3, 224, 224, device="meta")
    figures: dict[str, float] = {}
    for name in ("resnet50", "swin_t"):
        with torch.device("meta"):
            model = models.get_model(name)
        figures[f"trace {name}, s"] = seconds(lambda model=model: Supernet.trace(model, images))
    space = Supernet.trace(models.get_model("resnet50").to("meta"), images).space
    rng, budget = random.Random(0), Budget(macs=BUDGET)
    subnets = [space.sample(rng) for _ in range(1000)] * (PRICED // 1000)
    figures[f"price {PRICED:,} subnets of resnet50, s"] = seconds(lambda: space.costs(subnets))
    drawn = [space.sample(rng, budget) for _ in range(DRAWN)]
    taken = seconds(lambda: [space.sample(rng, budget) for _ in range(DRAWN)])
    figures[f"draw subnets of resnet50 at {BUDGET} of its MACs, 1/s"] = DRAWN / taken
    near = sum(cost.macs >= 0.98 * BUDGET * space.cost().macs for cost in space.costs(drawn))
    figures["of them within 2 % below the budget, %"] = 100 * near / DRAWN
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
