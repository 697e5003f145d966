"""Where a run stands, from its folder alone: what is done, what is under way, who drives it."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .artifacts import Manifest, Record, Store
from .config import RunConfig, load_config, run_id
from .errors import ConfigError, StorageError
from .lease import DURATION, Holder, holder
from .tracking import file_name
from .uris import local_path


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str
    record: Record | None
    """What the manifest says once it is done."""
    step: int | None = None
    """The last step that was logged, of one that has begun."""
    total_steps: int | None = None


@dataclass(frozen=True)
class Status:
    """Where a run stands."""

    run: str
    stages: list[Stage]
    driver: Holder | None
    """Who drives it, or did last."""

    @property
    def finished(self) -> bool:
        """Whether its last stage is done."""
        return all(stage.record is not None for stage in self.stages)

    @property
    def state(self) -> str:
        """One line for a person."""
        if self.finished:
            return "finished"
        if self.driver is None or self.driver.released:
            return "stopped; `stp resume` goes on"
        seen = datetime.fromisoformat(self.driver.renewed)
        age = (datetime.now(UTC) - seen).total_seconds()
        if age > 3 * DURATION:  # generous, for this compares the clocks of two machines
            return f"{self.driver.name} died {age:,.0f} s ago; `stp resume` goes on"
        return f"driven by {self.driver.name}"


def status(run: Store) -> Status:
    """Look at a run, which may be under way.

    Raises:
        StorageError: the folder holds no run.
    """
    config = configuration(run)
    done = Manifest(run).stages()
    names = [
        *(["latency"] if any(budget.timed for budget in config.budgets) else []),
        *(["baseline"] if config.baseline else []), "supernet", "explore",
        *(f"{kind}/{each.label}" for each in config.budgets for kind in ("finalize", "control")),
        "report",
    ]  # fmt: skip
    logs = set(run.child("logs").names())
    stages = []
    for name in names:
        step = total = None
        log = f"{file_name(name)}.jsonl"
        kind, _, label = name.partition("/")
        if kind == "control" and (log not in logs or f"finalize/{label}" in done):
            continue  # a training of that stage, shown beside it while it lasts
        if name not in done and log in logs:
            step, total = _progress(run.child("logs").read_bytes(log).decode(errors="replace"))
        stages.append(Stage(name, done.get(name), step, total))
    return Status(run.uri.rpartition("/")[2], stages, holder(run))


def configuration(run: Store) -> RunConfig:
    """The configuration that a run was started with, set to the storage that it lies in now.

    Raises:
        StorageError: the folder holds no run, or one that was started with other settings than
            its name says.
    """
    if not run.exists("config.json"):
        raise StorageError(
            f"{run.uri} has no config.json; expected the folder of a run, <storage>/<run id>"
        )
    storage, _, name = run.uri.rpartition("/")
    content = run.read_json("config.json")
    if not isinstance(content, dict):
        raise StorageError(
            f"{run.uri}/config.json holds no settings; it is damaged: start the run anew from its "
            "recipe"
        )
    try:
        config = load_config({**content, "storage": storage})
    except ConfigError as error:
        raise StorageError(
            f"{run.uri}/config.json cannot be used ({error}); it is damaged or of another version "
            "of stp_ray; start the run anew from its recipe"
        ) from error
    if run_id(config) != name:
        raise StorageError(
            f"{run.uri} holds the settings of {run_id(config)}; expected those of {name}; the "
            "folder was renamed, or begun by another version of stp_ray: give it its name back or "
            "start the run anew from its recipe"
        )
    return config


def resumable(run: Store, factory: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration to go on with. Code of yours that a run needs has to be named again: the
    folder may have been written by somebody else, and building the model would run what it names.

    Args:
        run: the run's folder.
        factory: the function that builds the dense model, as "package.module:name".
        overrides: dotted overrides of what leaves the run's results as they are, such as
            "cluster.address=auto".

    Raises:
        StorageError: as `configuration`, or the storage of an override cannot be used.
        ConfigError: the overrides make another run, the model is somebody's own, and is not the
            one that was named, or local data or weights are not there.
    """
    begun = configuration(run)
    config = load_config(begun, overrides) if overrides else begun
    if run_id(config) != run_id(begun) or Store(config.storage) != Store(begun.storage):
        raise ConfigError(
            f"{' '.join(overrides)} would make another run of {run.uri}; expected what leaves its "
            "results as they are, such as cluster.address or tracking.wandb; start another one "
            "with `stp run`"
        )
    named = config.model.name
    if ":" in named and factory != named:
        raise ConfigError(
            f"{run.uri} builds its model with {named!r}, which is not ours; expected the same name "
            f"from you{f', found {factory!r}' if factory else ''}; if you trust that code, add "
            f"--factory {shlex.quote(named)}"
        )
    for name, path in (("data.uri", config.data.uri), ("model.weights", config.model.weights)):
        here = None if path is None else local_path(path)
        if here is not None and not os.path.exists(here):
            raise ConfigError(
                f"{name} of {run.uri} is {path}, which is not there; expected it where the run was "
                "started; go to the folder that it is relative to, and resume from there"
            )
    return config


def _progress(log: str) -> tuple[int | None, int | None]:
    """The last step of a stage's log, and the steps that it was to have."""
    step = total = None
    for line in log.splitlines():
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # half a line of a process that was killed
        if event.get("event") == "start":
            step, total = None, event["config"].get("total_steps")
        elif event.get("event") == "log":
            step = event["step"]
    return step, total
