"""What Ray Tune adds to the scoring of a candidate, in a small search (starts Ray)."""

import argparse
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from markdown_table import row

from .exploring import settings
from .setting import Line
from .words import where


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet20", help="one that a recipe may name")
    parser.add_argument("--size", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--calibration", type=int, default=512, help="images")
    parser.add_argument("--scoring", type=int, default=256, help="images")
    parser.add_argument("--population", type=int, default=48)
    parser.add_argument("--room", type=int, default=1, help="workers that Ray has room for; uses 1")
    parser.add_argument("--batch", type=int, help="candidates of a trial; default: the product's")


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """The stage as it is, with one worker: seconds that it does not score, from its first batch
    on, over those that it does."""
    import ray

    from stp_ray.artifacts import Store
    from stp_ray.data import describe
    from stp_ray.stages import explore
    from stp_ray.stages.images import share
    from stp_ray.stages.jobs import WEIGHTS
    from stp_ray.stages.network import build_supernet
    from stp_ray.tracking import MultiTracker

    batch = {"batch_of_candidates": arguments.batch} if arguments.batch else {}
    config = settings(
        arguments.model, arguments.size, arguments.calibration, arguments.scoring,
        generations=2, population=arguments.population, **batch,
    )  # fmt: skip
    net = build_supernet(config, summary := describe(config.data))
    trials: list[tuple[float, float, int]] = []

    class Watched(explore._Generations):
        """Notes when each trial ended, the seconds of its scoring, and its candidates."""

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            count = len((result or {}).get("scores", ()))
            super().on_trial_complete(trial_id, result, error)
            if result:
                trials.append((time.perf_counter(), result["time_this_iter_s"], count))

    ray.init(num_cpus=arguments.room, include_dashboard=False, logging_level="warning")
    with tempfile.TemporaryDirectory(prefix="stp-speed-") as folder:
        run = Store(folder)
        run.child("supernet").save_tensors(WEIGHTS, net.model.state_dict())
        images = share(config.data, summary, in_process=False)
        with mock.patch.object(explore, "_Generations", Watched):
            explore.explore(config, run, net, images, MultiTracker([]))
    ray.shutdown()
    # What precedes the end of the first trial is the start of the worker, once for a search.
    (first, _, _), *others = trials
    scoring, candidates = sum(t[1] for t in others), sum(t[2] for t in others)
    added = others[-1][0] - first - scoring
    yield {
        "model": arguments.model, "size": arguments.size,
        "calibration": arguments.calibration, "scoring": arguments.scoring,
        "room": arguments.room, "batch": config.explore.batch_of_candidates, "trials": len(others),
        "candidates": candidates, "clock": "wall",
        "scoring_s": round(scoring / candidates, 4), "added_s": round(added / candidates, 4),
        "share": round(added / scoring, 4),
    }  # fmt: skip


def table(lines: list[Line]) -> list[str]:
    found = [
        "### What Ray Tune adds",
        "",
        "A search of two generations with one worker: seconds between trials, of bookkeeping and "
        "of writing scores, over seconds of scoring, from the end of the first trial on (`python "
        "benchmarks/speed.py tuning`).",
        "",
        row(["model", "px", "images (calibration + scoring)", "candidates in a trial",
             "room for workers", "device",
             "scoring, s a candidate", "added, s a candidate", "added, %"]),
        row(["---"] * 9),
    ]  # fmt: skip
    for line in lines:
        cells = [line["model"], line["size"], f"{line['calibration']} + {line['scoring']}"]
        cells += [line["batch"], line["room"], where(line), f"{line['scoring_s']:.3f}"]
        found.append(row([*cells, f"{line['added_s']:.3f}", f"{100 * line['share']:.1f}"]))
    return [*found, ""]
