"""A run that is small enough for a test, and drivers of it in processes of their own."""

import contextlib
import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]

BUDGETS = ("0.5", "0.15")
_OPTIMISATION = {"batch_size": 32, "lr": 0.05, "checkpoint_every": 3}

#: Two budgets from one supernet on real digits.
TINY: dict[str, Any] = {
    "name": "tiny",
    "budgets": [0.5, 0.15],
    "model": {"name": "resnet20"},
    "data": {"name": "digits", "limit": 320, "holdout": 32, "crop_padding": 1},
    "supernet": {"optimisation": {**_OPTIMISATION, "epochs": 3}},
    "explore": {
        "generations": 3,
        "population": 8,
        "parents": 4,
        "calibration_images": 32,
        "scoring_images": 16,
        "tuning_steps": 3,
        "tuning_images": 96,
        "finalists": 2,
        "final_steps": 6,
        "batch_of_candidates": 2,
    },
    "finalize": {"optimisation": {**_OPTIMISATION, "epochs": 3}, "calibration_images": 64},
    "tracking": {"wandb": "off"},
    "export": {"onnx": False, "pt2": False},
}

#: What a run leaves, in the order of docs/design.md, without checkpoints.
ARTIFACTS = {
    "config.json",
    "environment.json",
    "inputs.json",
    "manifest.json",
    "supernet/model.safetensors",
    "supernet/metrics.parquet",
    "explore/candidates.parquet",
    "explore/front.json",
    *(
        f"budget-{label}/{name}"
        for label in BUDGETS
        for name in (
            "model.safetensors",
            "model.json",
            "subnet.json",
            "metrics.parquet",
            "predictions.parquet",
            "README.md",
        )
    ),
    "report.html",
    "summary.json",
}
#: What it needs to resume, and its logs.
BOOKKEEPING = {
    "supernet/result.json",
    *(f"budget-{label}/{name}" for label in BUDGETS for name in ("result.json", "pruned.json")),
    "logs/supernet.jsonl",
    "logs/explore.jsonl",
    "logs/report.jsonl",
    *(f"logs/finalize-{label}.jsonl" for label in BUDGETS),
}
#: The weights that a run is about.
WEIGHTS = (
    "supernet/model.safetensors",
    *(f"budget-{label}/model.safetensors" for label in BUDGETS),
)


def tiny(**sections: Mapping[str, Any] | Any) -> dict[str, Any]:
    """The tiny recipe with changed sections; mappings are merged, all else is replaced."""
    return _merged(copy.deepcopy(TINY), sections)


def in_process(**sections: Any) -> dict[str, Any]:
    """The tiny recipe without Ray, silent."""
    quiet = {"cluster": {"in_process": True}, "tracking": {"console": False}}
    return _merged(tiny(**quiet), sections)


def minimal(**sections: Any) -> dict[str, Any]:
    """The least that walks through every stage: one budget, one epoch, one generation."""
    least = {
        "budgets": [0.5],
        "data": {"limit": 128},
        "supernet": {"optimisation": {"epochs": 1}},
        "explore": {"generations": 1, "population": 2, "finalists": 0},
        "finalize": {"optimisation": {"epochs": 1}},
    }
    return _merged(in_process(**least), sections)


def _merged(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(content.get(key), dict):
            _merged(content[key], value)
        else:
            content[key] = value
    return content


def write_recipe(folder: Path, content: Mapping[str, Any]) -> Path:
    """A recipe as a file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(content)))
    return path


def files(folder: Path) -> set[str]:
    """Names of all files below a folder, relative to it; links are not followed."""
    return {
        str(Path(parent, name).relative_to(folder))
        for parent, _, names in os.walk(folder)
        for name in names
    }


def times(folder: Path, names: Iterable[str] | None = None) -> dict[str, int]:
    """When files were last written, in nanoseconds."""
    return {
        name: (folder / name).stat().st_mtime_ns
        for name in (files(folder) if names is None else names)
    }


def kept(names: Iterable[str]) -> set[str]:
    """Artifacts and bookkeeping among names, without checkpoints, part files, what wandb keeps and
    the one file that a released lease leaves."""
    found = set(names)
    leases = {n for n in found if n.startswith("lease/")}
    assert len(leases) <= 1, leases
    elsewhere = ("explore/parts/", "wandb/")
    passing = {n for n in found if "/checkpoint-" in n or n.startswith(elsewhere)}
    return found - passing - leases


def environment(**changes: str) -> dict[str, str]:
    """The environment of a driver: one thread, no cluster to join, nothing sent anywhere."""
    left_out = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_TMPDIR")
    return {
        **{name: value for name, value in os.environ.items() if name not in left_out},
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        # else a worker goes on for a second without its node, by which time a short run is over
        "RAY_raylet_death_check_interval_milliseconds": "100",
        "RAY_worker_niceness": "0",  # else anything beside the test starves its workers
        **changes,
    }


_WORKER = "ray::RayTrainWorker"
#: They look once a minute whether their node is still there.
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


class Process:
    """A command in a session of its own, so that all it starts can be found and ended.

    Args:
        command: program and arguments.
        log: where standard output and error go.
        options: of `subprocess.Popen`.
    """

    def __init__(self, command: Sequence[str], log: Path, **options: Any) -> None:
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                list(command), stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                **{"env": environment(), **options},
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def running(self) -> bool:
        """Whether the process itself has not ended."""
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Its exit code."""
        return self._process.wait(timeout_s)

    def members(self) -> dict[int, str]:
        """Living processes of its session: number -> command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError, ValueError):
                _, _, status = (entry / "stat").read_text().rpartition(")")
                state, _, _, session = status.split()[:4]
                if int(session) == self._process.pid and state not in "ZX":
                    line = (entry / "cmdline").read_bytes()
                    found[int(entry.name)] = line.decode(errors="replace")
        return found

    def workers(self) -> set[int]:
        """Living Ray Train workers of its session."""
        return {pid for pid, line in self.members().items() if line.startswith(_WORKER)}

    def kill(self, timeout_s: float = 60) -> None:
        """SIGKILL to the process alone; returns when nothing that it started is left."""
        self._process.kill()
        self._process.wait(10)
        wait_for(
            lambda: all(line.startswith(_AGENTS) for line in self.members().values()),
            timeout_s,
            "its children to leave",
        )
        self.end()

    def end(self) -> None:
        """Whatever is left of the session goes."""
        deadline = time.monotonic() + 20
        while (left := self.members()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        assert not self.members()


def stp(*arguments: str) -> list[str]:
    """The command line of `stp`."""
    return [sys.executable, "-c", "from stp_ray.cli import main; main()", *arguments]


def wait_for(
    condition: Callable[[], Any],
    timeout_s: float,
    what: str,
    alive: Callable[[], bool] = lambda: True,
) -> Any:
    """The condition's value as soon as it is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert alive(), f"the process ended while waiting for {what}"
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.02)
    return value
