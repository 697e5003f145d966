"""Latency budgets: a table for the search, measured once in a run, and measurements at its end.

Both are made where the run computes: by one worker, on its device, through the program that the run
exports. A run without a latency budget does nothing of this.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import ray
import torch

from ..artifacts import Store
from ..config import RunConfig
from ..data import DataSummary
from ..elastic import Subnet, Supernet
from ..elastic.latency import LatencyTable, tabulate
from ..method import Explorer, Scored
from ..method.meeting import meet
from ..timing import Stopwatch
from . import cluster
from .network import LATENCY, TABLE, build_supernet, latency_table

Result = TypeVar("Result")

CHOSEN = "chosen.json"

#: Best candidates of a budget that may be measured.
_CANDIDATES = 64


def measure(config: RunConfig, run: Store, summary: DataSummary) -> dict[str, Any]:
    """Measure networks of the space, fit a table to them, and write it to `latency/table.json`.

    Args:
        config: the run's configuration.
        run: the run's folder.
        summary: what the data holds.

    Returns:
        What the file holds.

    Raises:
        BudgetError: no subnet keeps a latency budget.
    """
    content = _on_a_worker(config, _table, config, summary)
    home = run.child(LATENCY)
    home.delete(CHOSEN)
    home.write_json(TABLE, content)
    return content


def choose(
    config: RunConfig, run: Store, summary: DataSummary, explorer: Explorer
) -> dict[str, dict[str, Any]]:
    """For each latency budget the best candidate whose measured latency keeps it. A second
    measurement would choose otherwise, so what was chosen is kept in `latency/chosen.json`, for as
    long as the search ends alike.

    Args:
        config: the run's configuration.
        run: the run's folder, with its table.
        summary: what the data holds.
        explorer: at the end of its search.

    Returns:
        By the budget's label: `subnet` (JSON), `scored` (false where no candidate kept the budget
        and the best one was cut down), `latency_ms`, `limit_ms`, `estimated_ms`, `dense_ms`, how
        many networks were measured (`looks`) and `where`.

    Raises:
        BudgetError: nothing that was measured keeps a budget.
    """
    ranked = {
        place: explorer.ranked(budget)[:_CANDIDATES]
        for place, budget in enumerate(config.budgets)
        if budget.timed
    }
    home, table = run.child(LATENCY), latency_table(run)
    among = {str(place): [s.subnet.id for s in found] for place, found in ranked.items()}
    if home.exists(CHOSEN) and (kept := home.read_json(CHOSEN))["among"] == among:
        return cast(dict[str, dict[str, Any]], kept["chosen"])
    chosen = _on_a_worker(config, _met, config, summary, table, ranked)
    home.write_json(CHOSEN, {"among": among, "chosen": chosen})
    return chosen


def _table(config: RunConfig, summary: DataSummary) -> dict[str, Any]:
    net = build_supernet(config, summary)
    watch = _stopwatch(config, net, summary)
    table = tabulate(net.space, lambda s: watch(net.extract(s)), config.budgets, config.seed)
    return {**table.to_content(), "where": watch.where, "dense_ms": 1e3 * watch.seconds}


def _met(
    config: RunConfig,
    summary: DataSummary,
    table: LatencyTable,
    ranked: Mapping[int, Sequence[Scored]],
) -> dict[str, dict[str, Any]]:
    net = build_supernet(config, summary)
    space = net.space.timed(table.terms)
    watch = _stopwatch(config, net, summary)

    def clock(subnet: Subnet) -> float:
        return watch(net.extract(subnet))

    found = {}
    for place, candidates in ranked.items():
        budget = config.budgets[place]
        met = meet(space, budget, candidates, clock, watch.seconds, config.seed)
        estimated = space.cost(met.subnet).latency_s
        assert estimated is not None
        found[budget.label] = {
            "subnet": met.subnet.to_json(),
            "scored": met.scored,
            "latency_ms": 1e3 * met.seconds,
            "limit_ms": 1e3 * met.limit_s,
            "estimated_ms": 1e3 * estimated,
            "dense_ms": 1e3 * watch.seconds,
            "looks": met.looks,
            "where": watch.where,
        }
    return found


def _stopwatch(config: RunConfig, net: Supernet, summary: DataSummary) -> Stopwatch:
    options, size = config.cluster, summary.image_size
    gpu = options.use_gpu and torch.cuda.is_available()
    return Stopwatch(
        net.extract(net.space.full),
        torch.zeros(1, 3, size, size),
        torch.device("cuda" if gpu else "cpu"),
        options.threads_per_worker,
        config.export.onnx,
    )


def _on_a_worker(config: RunConfig, work: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function where a worker of the run would be, alone on its device."""
    options = config.cluster
    if options.in_process:
        return work(*arguments)
    cluster.require_resources(options, 1)
    resources = cluster.worker_resources(options)
    task = ray.remote(work).options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        max_retries=options.max_failures,
    )
    found: Result = cluster.result(task.remote(*arguments), "measuring latencies", options)
    return found
