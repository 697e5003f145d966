"""What a search costs its driver, with up to thousands of workers that score nothing.

    python benchmarks/scale.py --workers 1000 --candidates 100000 --dispatch-ms 11

The driver's code is the real one (breeding, pricing, handing out batches, keeping scores, writing
what is left, the manifest), and its processor time moves a clock on which simulated workers take
`--scoring-s` for a candidate, plus or minus a fifth. Ray is not started: what Tune takes for a
batch is given (`speed.py tuning` measures it with one worker). One line of JSON for each command
goes into benchmarks/results/scale/; `benchmarks/results.py render` makes the table of
docs/performance.md.
"""

import argparse
import heapq
import json
import random
import resource
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from markdown_table import row
from speed import keep
from surroundings import surroundings
from torchvision import models

from stp_ray.artifacts import Manifest, Store
from stp_ray.elastic import Budget, SearchSpace, Supernet
from stp_ray.method import Candidate, Exploration, Explorer
from stp_ray.stages.explore import CANDIDATES, FRONT, _Search, _write
from stp_ray.tracking import MultiTracker

KEPT = Path(__file__).resolve().parent / "results" / "scale"
BUDGETS = (Budget(macs=0.5), Budget(macs=0.15))
GENERATIONS = 8
#: The search is looked at in this many parts, to see whether its later candidates cost more.
PARTS = 5


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The simulated workers.

    Args:
        workers: how many.
        scoring_s: seconds that one takes for a candidate.
        batch: candidates that it gets at a time, at most.
        dispatch_s: seconds of the driver for each batch beside our code.
    """

    workers: int
    scoring_s: float = 10.0
    batch: int = 8
    dispatch_s: float = 0.0


def search(space: SearchSpace, candidates: int, fleet: Fleet) -> dict[str, Any]:
    """Figures of the driver and of the whole, for about so many candidates; those that are scored
    again count twice."""
    once = Exploration(batch_of_candidates=fleet.batch, generations=GENERATIONS, finalists=0)
    population = round(candidates / (GENERATIONS * (1 + once.promote)))
    options = replace(once, population=population)
    clock = _Clock()

    def opened(store: Store) -> tuple[Explorer, _Search]:
        explorer = Explorer(space, BUDGETS, options, 0)
        return explorer, _Search(explorer, store, fleet.batch, MultiTracker([]), fleet.workers)

    before_mb = _peak_mb()
    with tempfile.TemporaryDirectory(prefix="stp-scale-") as folder:
        run = Store(folder)
        store = run.child("explore")
        explorer, work = clock.timed(lambda: opened(store))
        parts = _simulate(work, clock, fleet, candidates)
        searched_s, spent_s, searched_mb = clock.now, clock.spent, _peak_mb() - before_mb
        write_s = clock.seconds(lambda: _write(explorer, store, {}))
        manifest_s = clock.seconds(lambda: _record(run))
        scored = len(explorer.scored)
        resume_s = clock.seconds(lambda: opened(store))
    driver_s = (spent_s + clock.waited) / scored
    return {
        "workers": fleet.workers,
        "candidates": scored,
        "population": options.population,
        "generations": GENERATIONS,
        "batch": fleet.batch,
        "scoring_s": fleet.scoring_s,
        "dispatch_ms": round(1e3 * fleet.dispatch_s, 3),
        "search_ms_a_candidate": round(1e3 * spent_s / scored, 3),
        "search_ms_by_part": [round(each, 3) for each in parts],
        "candidates_per_s": round(scored / searched_s, 3),
        "driver_busy": round((spent_s + clock.waited) / searched_s, 4),
        "saturated_at": round(fleet.scoring_s / driver_s),
        "search_mb": round(searched_mb, 1),
        "peak_mb": round(_peak_mb() - before_mb, 1),
        "write_s": round(write_s, 2),
        "manifest_s": round(manifest_s, 3),
        "resume_s": round(resume_s, 2),
    }


class _Clock:
    """The time of the simulation, which passes for the driver as it computes."""

    def __init__(self) -> None:
        self.now = self.spent = self.waited = 0.0

    def timed(self, work: Callable[[], Any]) -> Any:
        """Do the driver's work, and add its processor time."""
        started = time.process_time()
        result = work()
        taken = time.process_time() - started
        self.now += taken
        self.spent += taken
        return result

    def seconds(self, work: Callable[[], Any]) -> float:
        """Processor time of this work."""
        before = self.spent
        self.timed(work)
        return self.spent - before

    def wait(self, seconds: float) -> None:
        """The driver does something that is not computed here."""
        self.now += seconds
        self.waited += seconds


def _simulate(work: _Search, clock: _Clock, fleet: Fleet, candidates: int) -> list[float]:
    """Run to the end; the driver's milliseconds for a candidate, part by part."""
    scoring: list[tuple[float, int, list[Candidate]]] = []
    idle, given, done = fleet.workers, 0, 0
    marks: list[tuple[int, float]] = [(0, 0.0)]
    while True:
        while idle and (batch := clock.timed(work.take)):
            clock.wait(fleet.dispatch_s)
            ends = clock.now + sum(fleet.scoring_s * _about_one(c) for c in batch)
            given += 1
            heapq.heappush(scoring, (ends, given, batch))
            idle -= 1
        if not scoring:
            break
        ends, _, batch = heapq.heappop(scoring)
        clock.now = max(clock.now, ends)
        scores = {c.key: random.Random(c.key).random() for c in batch}
        clock.timed(lambda batch=batch, scores=scores: work.put(batch, scores))
        idle += 1
        done += len(batch)
        if done >= len(marks) * candidates / PARTS:
            marks.append((done, clock.spent))
    marks = [*marks[:PARTS], (done, clock.spent)]
    return [
        1e3 * (late - early) / max(1, more - fewer)
        for (fewer, early), (more, late) in pairwise(marks)
    ]


def _record(run: Store) -> None:
    """The stage is entered into the manifest, and looked up there as the next run does."""
    names = (f"explore/{CANDIDATES}", f"explore/{FRONT}")
    Manifest(run).finish(
        "explore", inputs={}, outputs={name: run.checksum(name) for name in names},
        seconds=0.0, device_seconds=0.0, metrics={},
    )  # fmt: skip
    assert Manifest(run).done("explore")


def _about_one(candidate: Candidate) -> float:
    """Between 0.8 and 1.2, the same for the same candidate."""
    return 0.8 + 0.4 * int(candidate.subnet.id, 16) / 16**12


def _peak_mb() -> float:
    """Most memory that this process has had, in MB; ru_maxrss is in kB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def space_of(name: str) -> SearchSpace:
    """The space of one of torchvision's models, without weights."""
    with torch.device("meta"):
        model = models.get_model(name)
    return Supernet.trace(model, torch.empty(1, 3, 224, 224, device="meta")).space


def table(lines: list[dict[str, Any]]) -> list[str]:
    """The section of docs/performance.md."""
    found = [
        "### How far the driver goes",
        "",
        f"The search's own code on one core, {GENERATIONS} generations, with simulated workers "
        "(`python benchmarks/scale.py`): processor time of the driver moves the clock, and Ray "
        "Tune is a constant for each batch, taken from the table above. Memory is what the peak "
        "grew by. Saturated: the workers at which the driver alone would be busy all the time. "
        "Read again: opening the finished search from its parts, as a driver does that was "
        "stopped; what is written and the manifest are storage on the same machine.",
        "",
        row(["model", "workers", "candidates", "batch, at most", "s a candidate",
             "Tune, ms a batch", "driver, ms a candidate", "candidates/s", "of linear",
             "driver busy", "saturated at", "MB", "written, s", "manifest, s", "read again, s"]),
        row(["---"] * 15),
    ]  # fmt: skip
    for line in sorted(lines, key=lambda each: (each["model"], each["workers"])):
        linear = line["workers"] / line["scoring_s"]
        cells = [line["model"], f"{line['workers']:,}", f"{line['candidates']:,}", line["batch"]]
        cells += [f"{line['scoring_s']:g}", f"{line['dispatch_ms']:g}"]
        cells += [f"{line['search_ms_a_candidate']:.2f}", f"{line['candidates_per_s']:.1f}"]
        cells += [f"{line['candidates_per_s'] / linear:.2f}", f"{line['driver_busy']:.2f}"]
        cells += [f"{line['saturated_at']:,}", f"{line['peak_mb']:.0f}", f"{line['write_s']:.1f}"]
        found.append(row([*cells, f"{line['manifest_s']:.2f}", f"{line['resume_s']:.0f}"]))
    return [*found, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="resnet50", help="one of torchvision's")
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--scoring-s", type=float, default=10.0, help="of one candidate")
    parser.add_argument("--batch", type=int, default=8, help="candidates in a batch, at most")
    parser.add_argument("--dispatch-ms", type=float, default=0.0, help="of Tune, for a batch")
    parser.add_argument("--out", type=Path, default=KEPT, help="folder of the lines")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    around, command = surroundings(torch.device("cpu")), shlex.join(sys.argv[1:])
    fleet = Fleet(
        workers=chosen.workers, scoring_s=chosen.scoring_s, batch=chosen.batch,
        dispatch_s=chosen.dispatch_ms / 1e3,
    )  # fmt: skip
    found = search(space_of(chosen.model), chosen.candidates, fleet)
    line = {"command": command, "model": chosen.model, **found, **around}
    keep(command, [line], chosen.out / "search.jsonl")
    print(json.dumps(line, indent=2))


if __name__ == "__main__":
    main()
