"""The stages in order, each skipped when the run's manifest says that it is done."""

import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import export
from ..artifacts import Manifest, Record, Store
from ..config import RunConfig, Training, dump_config, load_config, placed, run_id
from ..data import DataSummary, describe, steps_per_epoch
from ..elastic import Supernet
from ..errors import ConfigError
from ..lease import held
from ..method import Optimisation
from ..models import find_factory
from ..report import (
    Summary,
    accuracy_against_macs,
    architecture_picture,
    unequal_epochs,
    with_space,
    write_report,
)
from ..tracking import Artifact, Tracker, Tracking
from . import cluster, latency
from .explore import CANDIDATES, FRONT, explore, seconds_searched
from .finalize import PRUNED, claim, finalize, folder, spent
from .images import Images, SharedImages, share
from .inputs import INPUTS, inputs, require_same
from .jobs import RESULT, Job, seconds_spent
from .network import LATENCY, TABLE, build_supernet, check_images, price, timed
from .supernet import fit

log = logging.getLogger(__name__)

SUMMARY = "summary.json"
REPORT = "report.html"

#: The least way from a guess to all right that weights which were given have to have gone.
_LEARNT = 0.05

#: What stages leave, where it is not called as they are.
_ARTIFACTS = {"explore": "subnet", "finalize": "export"}

_PACKAGES = ("torch", "torchvision", "ray", "numpy", "pyarrow", "fsspec", "safetensors", "wandb")


def run(
    config: RunConfig | str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    until: str | None = None,
) -> dict[str, Any]:
    """Prune a network: baseline, supernet, explore, finalize, report.

    Stages whose artifacts are in the run's folder are skipped, and one that was stopped goes on
    from its last checkpoint, so the same call finishes a run that was cut off anywhere.

    Args:
        config: a configuration, or anything that `load_config` takes.
        overrides: dotted overrides, "a.b=value".
        until: stop after this stage ("baseline", "supernet" or "explore").

    Returns:
        The run's summary, as in `summary.json`, which a notebook shows as a table; with `until`
        the figures of the stages so far.

    Raises:
        ConfigError: a recipe that cannot be used, or an unknown stage.
        StpError: other bad input (before anything expensive starts), or a stage that had to stop.
    """
    if until not in (None, "baseline", "supernet", "explore"):
        raise ConfigError(
            f"until is {until!r}; expected baseline, supernet or explore, or None for the whole run"
        )
    config = load_config(config, overrides)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        return _run(config, until)


def _run(config: RunConfig, until: str | None) -> dict[str, Any]:
    images_summary, net = preflight(config)
    store = Store(config.storage).child(run_id(config))
    store.probe()
    made_from = inputs(config, images_summary, net)
    require_same(store, made_from)
    done = Manifest(store)
    if finished(done):
        return _figures(done) if until else Summary(store.read_json(SUMMARY))
    with _session(config, _workers(config, done.stages(), until)), held(store) as lease:
        manifest = Manifest(store, guard=lease.require)
        store.write_json(INPUTS, made_from)
        tracking = Tracking(config.tracking, run_id(config), store)
        with contextlib.closing(tracking):
            return _Pipeline(config, store, images_summary, net, manifest, tracking).walk(until)


def preflight(config: RunConfig) -> tuple[DataSummary, Supernet]:
    """Everything that can be known to be wrong before anything expensive starts.

    Returns:
        What the data holds, and the traced network.

    Raises:
        StpError: data, model, budgets or sizes do not fit.
    """
    summary = describe(config.data)
    for options in _trainings(config):
        steps_per_epoch(summary.train_rows, options.batch_size)
    net = build_supernet(config, summary)
    check_images(config, net, summary.image_size)
    for budget in config.budgets:
        if budget.counted is not None:  # a latency has to be measured first
            net.space.require(budget.counted)
    return summary, net


def _require_better_than_chance(top1: float, images: DataSummary) -> None:
    """That weights which were given fit the data, by what they get right of its test images in per
    cent: they would teach.

    Raises:
        ConfigError: they get hardly more right than a guess would.
    """
    guess = 100 / images.num_classes
    if top1 - guess < _LEARNT * (100 - guess):
        raise ConfigError(
            f"the network that was given gets {top1:.1f} % of the test images right, and a guess "
            f"{guess:.1f} %; expected weights that know this data; check model.weights, data.mean "
            "and data.std and the order of the classes, or raise baseline.epochs"
        )


def finished(manifest: Manifest) -> bool:
    """Whether a run is at its end and all of its artifacts are there, undamaged."""
    stages = manifest.stages()
    return "report" in stages and all(manifest.done(stage) for stage in stages)


def _figures(manifest: Manifest) -> dict[str, Any]:
    """What each stage so far has measured."""
    return {stage: record["metrics"] for stage, record in manifest.stages().items()}


def _trainings(config: RunConfig) -> list[Optimisation]:
    dense = config.baseline_options()
    options = [config.supernet.optimisation, config.finalize.optimisation]
    return [*options, dense] if dense else options


@contextlib.contextmanager
def _session(config: RunConfig, workers: int) -> Iterator[None]:
    """A Ray session that can place the workers, unless everything runs in this process."""
    if config.cluster.in_process:
        yield
        return
    with cluster.connected(config.cluster):
        cluster.require_resources(config.cluster, workers)
        yield


def _workers(config: RunConfig, done: Collection[str], until: str | None) -> int:
    """Workers that the stages left to do cannot start without: a run that goes on with its search
    starts no machines for the training that is behind it, nor one that ends there for the last."""
    options = config.cluster
    trained = "supernet" in done and ("baseline" in done or config.baseline is None)
    last = 1 if until else config.finalize.num_workers
    most = max(1 if trained else options.num_workers, last)
    return options.fewest(most)


class _Pipeline:
    def __init__(
        self,
        config: RunConfig,
        store: Store,
        summary: DataSummary,
        net: Supernet,
        manifest: Manifest,
        tracking: Tracking,
    ) -> None:
        self.config, self.store, self.images_summary, self.net = config, store, summary, net
        self.placed = placed(config)
        self.manifest, self.tracking = manifest, tracking
        self._images: Images | SharedImages | None = None

    def walk(self, until: str | None) -> dict[str, Any]:
        _describe(self.config, self.store)
        if timed(self.config):
            self._tabulate()
        dense = self.config.baseline_options()
        if dense is not None:
            self._training("baseline", dense)
        if until != "baseline":
            self._training("supernet", self.config.supernet.optimisation)
        if until not in ("baseline", "supernet"):
            self._explore()
        if until is not None:
            return _figures(self.manifest)
        self._finalize()
        return self._report()

    def _done(self, stage: str) -> bool:
        return self.manifest.done(stage) is not None

    @property
    def images(self) -> Images | SharedImages:
        """Loaded when the first stage that needs them starts."""
        if self._images is None:
            self._images = share(
                self.placed.data, self.images_summary, in_process=self.config.cluster.in_process
            )
        return self._images

    # -- stages ---------------------------------------------------------------------

    def _training(self, kind: Training, options: Optimisation) -> None:
        job = Job(
            stage=kind, kind=kind, folder=kind, run_uri=self.store.uri, config=self.placed,
            options=options,
        )  # fmt: skip
        workers = self.config.cluster.num_workers

        def work(tracker: Tracker) -> tuple[dict[str, str], dict[str, Any]]:
            result = fit(job, self.images, workers, tracker)
            if not options.epochs:
                _require_better_than_chance(result["metrics"]["top1"], self.images_summary)
            outputs = {f"{kind}/{name}": digest for name, digest in result["outputs"].items()}
            return outputs, {**result["metrics"], "macs": self.net.cost().macs}

        inputs = {"data": self.config.data.name, **self._inputs(*self._baseline(kind))}
        home = self.store.child(kind)
        self._stage(
            kind, inputs, work, lambda: self._scale(options), workers, lambda: seconds_spent(home)
        )

    def _tabulate(self) -> None:
        """First of all, so that a budget that cannot be met is known before anything is trained."""

        def work(tracker: Tracker) -> tuple[dict[str, str], dict[str, Any]]:
            table = latency.measure(self.placed, self.store, self.images_summary)
            name = f"{LATENCY}/{TABLE}"
            metrics = {"dense_ms": table["dense_ms"], "error": table["error"]}
            return {name: self.store.checksum(name)}, metrics

        self._stage(LATENCY, {}, work, dict, 1)
        price(self.config, self.store, self.net)

    def _explore(self) -> None:
        def work(tracker: Tracker) -> tuple[dict[str, str], dict[str, Any]]:
            front = explore(self.placed, self.store, self.net, self.images, tracker)
            candidates = self.store.read_table(f"explore/{CANDIDATES}")
            modules = [name for name, _ in self.net.model.named_modules()]
            described = with_space(candidates, self.net.space, modules)
            self.store.write_table(f"explore/{CANDIDATES}", described)
            rows = candidates.drop_columns(["subnet"]).to_pylist()
            tracker.table("scored", rows, axes=("macs", "score"))
            outputs = {
                f"explore/{name}": self.store.checksum(f"explore/{name}")
                for name in (CANDIDATES, FRONT)
            }
            return outputs, {"candidates": candidates.num_rows, "front": len(front["front"])}

        workers = self.config.cluster.explore_workers or self.config.cluster.num_workers
        options = self.config.explore
        generations = options.generations + (options.finalists > 0)  # they are logged as one
        scale = {"total_steps": generations, "counts": "generation"}
        inputs = self._inputs("supernet", LATENCY)
        self._stage(
            "explore", inputs, work, lambda: scale, workers, lambda: seconds_searched(self.store)
        )

    def _finalize(self) -> None:
        targets = self.store.read_json(f"explore/{FRONT}")["budgets"]
        for label, target in targets.items():
            claim(self.store, label, target)
        missing = {
            label: target
            for label, target in targets.items()
            if not self._done(f"finalize/{label}")
        }
        if not missing:
            return
        for label in missing:
            self._forget(f"finalize/{label}", folder(label))
        kinds: dict[Training, Optimisation] = {"finalize": self.config.finalize.optimisation}
        if self.config.finalize.control:
            kinds["control"] = self.config.control_options()
        before = self._seconds_before(missing)
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            trackers = {
                f"{kind}/{label}": stack.enter_context(
                    self._tracked(f"{kind}/{label}", self._scale(options))
                )
                for label in missing
                for kind, options in kinds.items()
            }
            # closed when this one may not go on: its tasks would
            outcomes = stack.enter_context(
                contextlib.closing(
                    finalize(self.placed, self.store, missing, self.images, trackers)
                )
            )
            for label, pruned, held_s in outcomes:
                home = folder(label)
                tracker = trackers[f"finalize/{label}"]
                metrics = {"top1": pruned["top1"], "macs": pruned["macs"]}
                tracker.summary({**metrics, "params": pruned["params"]})
                if "control_top1" in pruned:
                    control = {**metrics, "top1": pruned["control_top1"]}
                    trackers[f"control/{label}"].summary(control)
                seconds = before[label] + time.monotonic() - started
                self.manifest.finish(
                    f"finalize/{label}",
                    inputs=self._inputs("supernet", "explore", *self._baseline(*kinds)),
                    outputs={
                        f"{home}/{PRUNED}": self.store.checksum(f"{home}/{PRUNED}"),
                        **{f"{home}/{name}": d for name, d in pruned["outputs"].items()},
                    },
                    seconds=seconds,
                    # without the time that it waited for the devices of another budget
                    device_seconds=held_s * self._devices(self.config.finalize.num_workers),
                    metrics=metrics,
                )
                tracker.artifact(self._artifact(f"finalize/{label}"))

    def _seconds_before(self, missing: Iterable[str]) -> dict[str, float]:
        """How long earlier attempts at the last stage took before each budget goes on. Budgets that
        are done count from its beginning; in one process each waits for the one before."""
        stages = self.manifest.stages()
        done = [r["seconds"] for stage, r in stages.items() if stage.startswith("finalize/")]
        until = max(done, default=0.0)
        before = {}
        for label in missing:
            seconds = spent(self.store.child(folder(label)))
            if self.config.cluster.in_process:
                until += seconds
                before[label] = until
            else:
                before[label] = max(until, seconds)
        return before

    def _report(self) -> dict[str, Any]:
        started = time.monotonic()
        self.store.write_json(SUMMARY, self._summary())
        summary = Summary(self.store.read_json(SUMMARY))
        for label in summary["budgets"]:
            home = self.store.child(folder(label))
            pruned, description = home.read_json(PRUNED), home.read_json(export.DESCRIPTION)
            notes = [*pruned["notes"], *unequal_epochs(dump_config(self.config))]
            threads = latency_threads(self.config)
            notes.append(f"Latency is the median on a CPU, threads: {threads}.")
            card = export.model_card(
                summary, label, description, notes, list(pruned.get("programs", ()))
            )
            home.write_bytes("README.md", card.encode())
        write_report(self.store)
        seconds = time.monotonic() - started
        self.manifest.finish(
            "report",
            inputs=self._inputs("explore", *(f"finalize/{b}" for b in summary["budgets"])),
            outputs={name: self.store.checksum(name) for name in (SUMMARY, REPORT)},
            seconds=seconds,
            device_seconds=seconds,
            metrics={},
        )
        self._link_latest()
        self._show(summary)
        return summary

    def _show(self, summary: dict[str, Any]) -> None:
        """What came out, for those who follow the run elsewhere than in its folder."""
        budgets = summary["budgets"]
        with self._tracked("report", {}) as tracker:
            tracker.summary({name: v for name, v in summary.items() if name != "budgets"})
            rows = [
                # what was measured is nested, and of budgets on latency alone
                {"budget": b, **{name: v for name, v in entry.items() if name != "measured"}}
                for b, entry in budgets.items()
            ]
            tracker.table("budgets", rows)
            tracker.picture("architecture", lambda: architecture_picture(self.store))
            tracker.picture("accuracy", lambda: accuracy_against_macs(summary, "png"))
            tracker.artifact(self._artifact("report"))
        self.tracking.complete(list(budgets))

    # -- figures --------------------------------------------------------------------

    def _summary(self) -> dict[str, Any]:
        stages = self.manifest.stages()
        dense = stages["baseline"]["metrics"]["top1"] if "baseline" in stages else None
        main = stages["supernet"]["metrics"]["top1"]
        cost, size = self.net.cost(), self.images_summary.image_size
        image, threads = torch.randn(1, 3, size, size), latency_threads(self.config)
        dense_ms = 1e3 * export.latency(self.net.model, image, threads=threads)
        met = self.store.read_json(f"explore/{FRONT}").get("latency", {})
        budgets = {}
        for budget in self.config.budgets:
            home = self.store.child(folder(budget.label))
            pruned = home.read_json(PRUNED)
            entry = {
                "top1": pruned["top1"],
                "retention_dense": 100 * pruned["top1"] / dense if dense else None,
                "retention_main": 100 * pruned["top1"] / main if main else None,
                "macs": pruned["macs"],
                "params": pruned["params"],
                "latency_ms": 1e3 * self._latency(home.uri, image, threads),
                "dense_latency_ms": dense_ms,
                "subnet_id": pruned["subnet_id"],
                "uri": home.uri,
            }
            if "control_top1" in pruned:
                entry["control_top1"] = pruned["control_top1"]
            if budget.label in met:
                entry["measured"] = met[budget.label]
            budgets[budget.label] = entry
        together = [r["seconds"] for stage, r in stages.items() if stage.startswith("finalize/")]
        before = [r["seconds"] for s, r in stages.items() if not s.startswith(("finalize/", "rep"))]
        return {
            "run_id": self.store.uri.rpartition("/")[2],
            "storage": self.config.storage,
            "dense_top1": dense,
            "main_top1": main,
            "macs": cost.macs,
            "params": cost.params,
            "budgets": budgets,
            "seconds": sum(before) + max(together, default=0.0),
        }

    def _latency(self, uri: str, image: torch.Tensor, threads: int) -> float:
        """Seconds of one image through the artifact, as a person would load it."""
        name = self.config.model.name
        # The configuration names the factory of a model of the user's own; storage never does.
        factory = find_factory(name) if ":" in name else None
        return export.latency(export.load(uri, factory), image, threads=threads)

    # -- bookkeeping ----------------------------------------------------------------

    def _stage(
        self,
        stage: str,
        inputs: dict[str, Any],
        work: Callable[[Tracker], tuple[dict[str, str], dict[str, Any]]],
        scale: Callable[[], dict[str, Any]],
        workers: int,
        spent: Callable[[], float] = float,
    ) -> None:
        if self._done(stage):
            return
        self._forget(stage, stage)
        started = time.monotonic() - spent()
        with self._tracked(stage, scale()) as tracker:
            outputs, metrics = work(tracker)
            seconds = time.monotonic() - started
            self.manifest.finish(
                stage,
                inputs=inputs,
                outputs=outputs,
                seconds=seconds,
                device_seconds=seconds * self._devices(workers),
                metrics=metrics,
            )
            tracker.summary(metrics)
            tracker.artifact(self._artifact(stage))

    def _forget(self, stage: str, home: str) -> None:
        """Where a stage was done and its outputs are lost or damaged, it has to believe that it
        is not, and so has who asks for the run's status."""
        if stage in self.manifest.stages():
            for name in (PRUNED, RESULT):
                self.store.child(home).delete(name)
            self.manifest.forget(stage)

    @contextlib.contextmanager
    def _tracked(self, stage: str, scale: dict[str, Any]) -> Iterator[Tracker]:
        tracker = self.tracking.of(stage)
        tracker.start(stage, {**scale, "config": dump_config(self.config)})
        try:
            yield tracker
        finally:
            tracker.finish()

    def _artifact(self, stage: str) -> Artifact:
        """What a finished stage left, and what that was made from."""
        stages = self.manifest.stages()
        kind, _, label = stage.partition("/")
        home = folder(label) if label else "" if kind == "report" else kind
        place = self.store.child(home) if home else self.store
        return Artifact(
            name=f"{_ARTIFACTS.get(kind, kind)}-{label}" if label else _ARTIFACTS.get(kind, kind),
            kind=_ARTIFACTS.get(kind, kind),
            uri=place.uri,
            files={
                name.removeprefix(f"{home}/"): digest
                for name, digest in stages[stage]["outputs"].items()
            },
            made_from=tuple(self._artifact(s) for s in stages[stage]["inputs"] if s in stages),
        )

    def _scale(self, options: Optimisation) -> dict[str, Any]:
        rows = self.images.summary.train_rows
        steps = steps_per_epoch(rows, options.batch_size)
        return {"total_steps": steps * options.epochs, "batch_size": options.batch_size}

    def _devices(self, workers: int) -> int:
        options = self.config.cluster
        return workers if options.use_gpu else workers * options.threads_per_worker

    def _inputs(self, *stages: str) -> dict[str, Any]:
        done: dict[str, Record] = self.manifest.stages()
        return {stage: done[stage]["outputs"] for stage in stages if stage in done}

    def _baseline(self, *trainings: Training) -> tuple[str, ...]:
        """The stage whose network one of the trainings starts as, or has a say in the labels of, if
        any."""
        begun = "supernet" in trainings and self.config.supernet.from_baseline
        taught = any(self.config.teacher_weight_in(training) for training in trainings)
        return ("baseline",) if begun or taught else ()

    def _link_latest(self) -> None:
        """On local storage `latest` points to the run that finished last."""
        path: Path | None = self.store.local_path
        if path is None:
            return
        link, temporary = path.parent / "latest", path.parent / f".latest-{os.getpid()}"
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(path.name, target_is_directory=True)
            os.replace(temporary, link)
        except OSError as error:  # a folder of that name, or a file system without links
            log.warning("%s does not point to this run: %s", link, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def latency_threads(config: RunConfig) -> int:
    """With which a summary's latencies and a plan's step are measured: a worker's, if this machine
    has them."""
    return min(config.cluster.threads_per_worker, os.cpu_count() or 1)


def _describe(config: RunConfig, store: Store) -> None:
    """Leave the resolved configuration and the environment beside the artifacts."""
    store.write_json("config.json", dump_config(config))
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    store.write_json(
        "environment.json",
        {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "latency_threads": latency_threads(config),
            "packages": versions,
            "machine": platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    )
