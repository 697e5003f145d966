"""A small run again and again while something breaks at random moments, on three machines.

    python -m benchmarks.chaos --runs 100

Machines are network namespaces: needs Linux, root and iproute2. Every run suffers one to three
faults, drawn from its number alone; where its driver ends, the same command is given again. Then
its weights are compared with those of a run that nothing disturbed, its artifacts with their
checksums, and what was scored is counted. One line of JSON for each run goes into
benchmarks/results/chaos/runs.jsonl; runs that are there already are left out, so that a hundred
may be spread over several invocations. Two at a time on one computer need namespaces each, and
`--first` and `--out` of their own: `unshare --net --pid --fork --mount-proc sh -c "ip link set lo
up; python -m benchmarks.chaos ..."`. `benchmarks/results.py render` makes the table of
docs/reliability.md.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.surroundings import surroundings
from tests.cluster.cluster import BUCKET, Cluster, bucket, opened
from tests.cluster.network import HOST, Machine, Network
from tests.stages.runs import WEIGHTS, tiny
from tests.unreliable import Unreliable

KEPT = Path(__file__).resolve().parent / "results" / "chaos" / "runs.jsonl"

_LONGER = {"optimisation": {"epochs": 5, "checkpoint_every": 3}}
RECIPE = tiny(
    cluster={"num_workers": 2, "schedule_timeout_s": 120, "max_failures": 10},
    supernet=_LONGER,
    finalize=_LONGER,
    explore={"generations": 6, "population": 32, "parents": 8},
)

#: The processes that work in each stage, by the beginning of their command lines.
WORKERS = {
    "supernet": "ray::RayTrainWorker",
    "explore": "ray::_Trial",
    "finalize": "ray::_finalize_task",
}
#: The files that they write as they go on, by the beginning of their names.
STEPS = {"supernet": "supernet/checkpoint-", "explore": "explore/parts/", "finalize": "budget-"}
#: Seconds after which a run is given up, and times that its command is given.
PATIENCE_S, ATTEMPTS = 900, 10
#: Tells where a tracker would be, if one were asked for: nobody listens there.
TRACKER = {"WANDB_BASE_URL": f"http://{HOST}:9", "WANDB_API_KEY": "0" * 40}
#: Files whose writing shows that a run goes on.
PROGRESS = ("supernet/", "explore/", "budget-")


class Failed(Exception):
    """A run did not end well."""


class Missed(Exception):
    """What a fault was to hit is gone."""


@dataclass(frozen=True)
class Fault:
    """What breaks, and when.

    Attributes:
        kind: a name of `FAULTS`.
        stage: it comes while this stage's workers are at work.
        share: of the files that they write, which are there when it comes.
    """

    kind: str
    stage: str
    share: float


def plan(seed: int, number: int) -> list[Fault]:
    """The faults of a run, in their order."""
    rng = random.Random(f"{seed}-{number}")
    found = []
    for kind in rng.choices(sorted(FAULTS), k=rng.randint(1, 3)):
        stage = FAULTS[kind].stage or rng.choice(sorted(WORKERS))
        found.append(Fault(kind, stage, round(rng.uniform(0, 0.9), 3)))
    return sorted(found, key=lambda fault: (list(WORKERS).index(fault.stage), fault.share))


class Scene:
    """One run of the recipe on the cluster."""

    def __init__(self, cluster: Cluster, server: Unreliable, name: str, number: int) -> None:
        self.cluster, self.server, self.name = cluster, server, name
        self.rng = random.Random(number)
        self.submissions = 0
        self.tracker: tuple[str, ...] = ()
        self._began = time.monotonic()
        self._first_written = len(server.written)
        self.submit()

    def submit(self) -> None:
        """Give the command, for the first time or again."""
        if self.submissions == ATTEMPTS:
            raise Failed(f"it ended {ATTEMPTS} times: {self.driver.output[-2000:]}")
        self.submissions += 1
        self.driver = self.cluster.run(self.name, RECIPE, None, *self.tracker)

    def ended(self) -> bool:
        """Whether the run is complete. A driver that ended otherwise is started again."""
        if self.driver.running():
            if time.monotonic() - self._began > PATIENCE_S:
                raise Failed(f"not done after {PATIENCE_S} s: {self.driver.output[-2000:]}")
            return False
        if self.driver.wait(1) == 0:
            return True
        self.submit()
        return False

    def workers(self, stage: str) -> list[tuple[Machine, int]]:
        """The processes that work in a stage, and the machines that they are on."""
        return [
            (machine, pid)
            for machine in self.cluster.workers
            for pid in machine.pids(WORKERS[stage])
        ]

    def at(self, fault: Fault, files: Mapping[str, int]) -> bool:
        """Wait for the moment of a fault; False if the run is past it.

        Args:
            fault: what is to come.
            files: how many each stage writes where nothing disturbs it.
        """
        later = list(WORKERS)[list(WORKERS).index(fault.stage) + 1 :]
        due = int(fault.share * files[fault.stage])
        while not self.workers(fault.stage) or len(self.steps(fault.stage)) < due:
            if self.ended() or any(self.workers(stage) for stage in later):
                return False
            time.sleep(0.05)
        return True

    def steps(self, stage: str) -> set[str]:
        """Names of the files that a stage has written on its way."""
        return {name for _, name in self.written() if name.startswith(STEPS[stage])}

    def written(self) -> list[tuple[float, str]]:
        """(when, name in the run's folder) of every file that it has written."""
        prefix = f"/{BUCKET}/{self.name}/"
        names = [
            (at, path.removeprefix(prefix).partition("/")[2])
            for at, path in self.server.written[self._first_written :]
            if path.startswith(prefix)
        ]
        return [(at, name) for at, name in names if name]


# -- faults -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    act: Callable[[Scene, str], None]
    #: The only stage that it can come in.
    stage: str | None = None


def _victim(scene: Scene, stage: str) -> tuple[Machine, int]:
    workers = scene.workers(stage)
    if not workers:
        raise Missed
    return scene.rng.choice(workers)


def _kill_worker(scene: Scene, stage: str) -> None:
    _, pid = _victim(scene, stage)
    _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise Missed from None


def _stop_worker(scene: Scene, stage: str) -> None:
    _, pid = _victim(scene, stage)
    _signal(pid, signal.SIGSTOP)
    time.sleep(20)
    with contextlib.suppress(ProcessLookupError):  # Ray may have given it up
        os.kill(pid, signal.SIGCONT)


def _kill_driver(scene: Scene, stage: str) -> None:
    _signal(scene.driver.pid, signal.SIGKILL)
    scene.driver.wait(10)


def _kill_node(scene: Scene, stage: str) -> None:
    machine, _ = _victim(scene, stage)
    machine.kill()
    time.sleep(5)
    scene.cluster.join(machine)


def _kill_head(scene: Scene, stage: str) -> None:
    scene.cluster.renew()


def _storage_away(scene: Scene, stage: str) -> None:
    scene.server.away = True
    time.sleep(10)
    scene.server.away = False


def _storage_spoils(scene: Scene, stage: str) -> None:
    scene.server.share = 0.2  # until the run ends


def _tracker_away(scene: Scene, stage: str) -> None:
    """From the next start of the driver on; here it is started again for that."""
    scene.tracker = ("tracking.wandb=online",)
    _kill_driver(scene, stage)


def _disk_full(scene: Scene, stage: str) -> None:
    machine, _ = _victim(scene, stage)
    path = machine.disk / "full"
    with contextlib.suppress(OSError), path.open("wb") as file:
        while True:
            file.write(bytes(2**20))
    time.sleep(15)
    path.unlink()


#: Names, as `chaos_table.WORDS` explains them.
FAULTS = {
    "training worker": _Kind(_kill_worker, "supernet"),
    "exploration actor": _Kind(_kill_worker, "explore"),
    "finalising task": _Kind(_kill_worker, "finalize"),
    "driver": _Kind(_kill_driver),
    "machine": _Kind(_kill_node),
    "head": _Kind(_kill_head),
    "stopped": _Kind(_stop_worker),
    "storage away": _Kind(_storage_away),
    "storage spoils": _Kind(_storage_spoils),
    "tracker away": _Kind(_tracker_away),
    "disk full": _Kind(_disk_full),
}


# -- one run ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed: what must come out, and how many files each stage writes."""

    checksums: dict[str, str]
    files: dict[str, int]


def disturbed(
    cluster: Cluster, server: Unreliable, seed: int, number: int, reference: Reference
) -> dict[str, Any]:
    """A run with its faults, and what is true at its end."""
    started = time.monotonic()
    scene = Scene(cluster, server, f"run-{seed}-{number}", number)
    faults: list[dict[str, Any]] = []
    try:
        for fault in plan(seed, number):
            line = {"kind": fault.kind, "stage": fault.stage, "came": False}
            faults.append(line)
            if scene.at(fault, reference.files):
                at = time.monotonic() - started
                with contextlib.suppress(Missed):
                    FAULTS[fault.kind].act(scene, fault.stage)
                    line |= {"came": True, "at": at}
        while not scene.ended():
            time.sleep(0.1)
    finally:
        server.share, server.away = 0.0, False
    seconds = time.monotonic() - started
    written = scene.written()
    for fault in faults:
        if fault["came"]:
            fault["recovery_s"] = round(_recovery(written, started, fault["at"], seconds), 1)
            fault["at"] = round(fault["at"], 1)
    return {
        "seed": seed,
        "run": number,
        "faults": faults,
        "submissions": scene.submissions,
        "seconds": round(seconds, 1),
        **verdict(
            lambda name: cluster.read(scene.name, name),
            cluster.files(scene.name),
            reference.checksums,
        ),
        "rewritten_scores": _repeated(written),
    }


def _recovery(written: list[tuple[float, str]], started: float, at: float, end: float) -> float:
    """Seconds from a fault to the first file that shows progress and was not on its way already."""
    later = (
        when - started - at
        for when, name in written
        if when - started > at + 1 and name.startswith(PROGRESS)
    )
    return min(later, default=end - at)


def _repeated(written: list[tuple[float, str]]) -> int:
    """Parts of the search that were written more than once: their candidates were scored again."""
    parts = [name for _, name in written if name.startswith("explore/parts/")]
    return len(parts) - len(set(parts))


def verdict(
    read: Callable[[str], bytes], names: set[str], expected: dict[str, str]
) -> dict[str, Any]:
    """What is true at the end of a run.

    Args:
        read: content of a file.
        names: of all files.
        expected: name -> sha256 of those that must be as in the run that nothing disturbed.
    """
    different = sorted(
        name for name, digest in expected.items() if name not in names or _sha(read(name)) != digest
    )
    scored: list[str] = []
    for name in names:
        if name.startswith("explore/parts/"):
            scored += pq.read_table(BytesIO(read(name))).column("key").to_pylist()
    damaged = sorted(
        name for name, digest in _promised(read, names)
        if name not in names or _sha(read(name)) != digest
    )  # fmt: skip
    return {
        "different": different,
        "scored": len(scored),
        "scored_twice": len(scored) - len(set(scored)),
        "damaged": damaged,
    }


def _promised(read: Callable[[str], bytes], names: set[str]) -> Iterator[tuple[str, str]]:
    """(name, sha256) of each artifact and of each file of a checkpoint."""
    for stage in json.loads(read("manifest.json"))["stages"].values():
        yield from stage["outputs"].items()
    for name in names:
        if name.endswith("/complete.json"):
            for file, digest in json.loads(read(name))["sha256"].items():
                yield f"{name.rpartition('/')[0]}/{file}", digest


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def undisturbed(cluster: Cluster, server: Unreliable) -> Reference:
    """A run without faults."""
    started = time.monotonic()
    scene = Scene(cluster, server, "undisturbed", 0)
    while not scene.ended():
        time.sleep(0.1)
    print(f"undisturbed: {time.monotonic() - started:.1f} s", flush=True)
    return Reference(
        {
            name: _sha(cluster.read("undisturbed", name))
            for name in (*WEIGHTS, "explore/front.json")
        },
        {stage: len(scene.steps(stage)) for stage in STEPS},
    )


def good(line: dict[str, Any]) -> bool:
    """Whether nothing was lost, done twice or damaged."""
    bad = ("different", "scored_twice", "damaged", "rewritten_scores", "failed")
    return not any(line.get(name) for name in bad)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--runs", type=int, default=100, help="up to and with number RUNS - 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="no run is begun later than that")
    parser.add_argument("--out", type=Path, default=KEPT)
    parser.add_argument("--logs", type=Path, help="where the driver's words of bad runs are kept")
    chosen = parser.parse_args()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    before = chosen.out.read_text().splitlines() if chosen.out.exists() else []
    done = {(line["seed"], line["run"]) for line in map(json.loads, before)}
    numbers = [n for n in range(chosen.first, chosen.runs) if (chosen.seed, n) not in done]
    end = time.monotonic() + 60 * chosen.minutes if chosen.minutes else float("inf")
    around = {**surroundings(torch.device("cpu")), "cores": len(os.sched_getaffinity(0))}
    bad = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # take the machines away then, too
    network = Network()
    try:
        with (
            bucket() as (url, client),
            Unreliable(url, HOST).serving() as server,
            opened(network, client, server.url, disk_mb=256, **TRACKER) as cluster,
        ):
            reference = undisturbed(cluster, server)
            for number in numbers:
                if time.monotonic() > end:
                    break
                line = _line(cluster, server, chosen, number, reference)
                bad += not good(line)
                with chosen.out.open("a") as file:
                    file.write(json.dumps({**line, **around}) + "\n")
                print(json.dumps(line), flush=True)
            network.close()  # before its folder goes
    finally:
        network.close()
    sys.exit(bad > 0)


def _line(
    cluster: Cluster, server: Unreliable, chosen: argparse.Namespace, number: int,
    reference: Reference,
) -> dict[str, Any]:  # fmt: skip
    try:
        return disturbed(cluster, server, chosen.seed, number, reference)
    except Failed as error:
        if chosen.logs:
            chosen.logs.mkdir(parents=True, exist_ok=True)
            (chosen.logs / f"{chosen.seed}-{number}.log").write_text(str(error))
        cluster.renew()  # nothing of it may be in the way of the next
        faults = [{"kind": fault.kind, "stage": fault.stage} for fault in plan(chosen.seed, number)]
        return {"seed": chosen.seed, "run": number, "faults": faults, "failed": True}


if __name__ == "__main__":
    main()
