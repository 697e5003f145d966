"""Distillation-guided exploration: Ray Tune scores what the explorer asks for.

A trial scores a batch of candidates and its scores are written to the run's storage at once, in
`explore/parts/`. Generations are closed before the next one is bred, so the outcome depends on
the seed alone; a search that was stopped is told the scores that were kept and goes on.
"""

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper
from torch import Tensor

from ..artifacts import Store
from ..config import RunConfig
from ..data import Split
from ..elastic import Subnet, Supernet
from ..errors import RunError
from ..method import Candidate, Explorer, Scored, reference_logits, score, tuned_score
from ..tracking import Tracker
from . import cluster, latency
from .images import EVALUATION_BATCH, Images, SharedImages
from .jobs import WEIGHTS
from .network import build_supernet, timed

CANDIDATES = "candidates.parquet"
FRONT = "front.json"
_PARTS = "parts"
_AWS_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
)


class Scorer:
    """The supernet with everything that scoring needs, resident on one device.

    Args:
        config: the run's configuration.
        images: the data.
        weights: the trained supernet's state dict.
        device: where to score.
        main_logits: of the main network on all held-out images, [N, C]; computed if absent.
    """

    def __init__(
        self,
        config: RunConfig,
        images: Images,
        weights: Mapping[str, Tensor],
        device: torch.device,
        main_logits: Tensor | None = None,
    ) -> None:
        torch.set_num_threads(config.cluster.threads_per_worker)
        self.net: Supernet = build_supernet(config, images.summary)
        self.net.model.load_state_dict(dict(weights))
        self.net.to(device).eval()
        self.config = config
        self._images, self._device = images, device
        count = config.explore.calibration_images
        self.calibration = list(images.calibration(config.seed, count, device))
        self.held_out = torch.cat([x for x, _ in images.batches("holdout", device)])
        if main_logits is None:
            main_logits = reference_logits(self.net, self.held_out.split(EVALUATION_BATCH))
        self.main_logits = main_logits.to(device)

    @cached_property
    def _tuning(self) -> Split:
        """What tuning learns from, as bytes."""
        return self._images.sample(self.config.explore.tuning_images)

    def _learnt(self) -> Iterator[Tensor]:
        return self._images.augmented(self._tuning, self.config.seed, self._device)

    @cached_property
    def _learnt_logits(self) -> Tensor:
        return reference_logits(self.net, self._learnt())

    def __call__(self, subnet: Subnet, images: int, steps: int) -> float:
        """The distillation loss of a slice on the first `images` held-out ones (0: all), after so
        many steps of distillation."""
        count = images or len(self.held_out)
        batches, logits = self.held_out[:count].split(EVALUATION_BATCH), self.main_logits[:count]
        if not steps:
            return score(self.net, subnet, self.calibration, batches, logits)
        return tuned_score(
            self.net, subnet, self.calibration, self._learnt, self._learnt_logits, batches, logits,
            steps=steps, options=self.config.finalize.optimisation, seed=self.config.seed,
        )  # fmt: skip


def explore(
    config: RunConfig, run: Store, net: Supernet, images: Images | SharedImages, tracker: Tracker
) -> dict[str, Any]:
    """Search until the explorer is done; write `explore/candidates.parquet` and `front.json`.

    Args:
        config: the run's configuration.
        run: the run's folder.
        net: the supernet on the driver; only its space is used. It prices latency where a budget
            bounds that.
        images: the data.
        tracker: takes the best score of each budget after every generation.

    Returns:
        What `front.json` holds.
    """
    store = run.child("explore")
    held_out = images.summary.holdout_rows
    explorer = Explorer(net.space, config.budgets, config.explore, config.seed, held_out=held_out)
    most = config.explore.batch_of_candidates
    search = _Search(explorer, store, most, tracker, _workers(config))
    if search.open():
        weights = run.child("supernet").load_tensors(WEIGHTS)
        if config.cluster.in_process:
            scorer = Scorer(config, images.here(), weights, torch.device("cpu"))
            while batch := search.take():
                search.put(batch, {c.key: scorer(c.subnet, c.images, c.steps) for c in batch})
        else:
            _tune(config, search, images, weights)
    met = latency.choose(config, run, images.summary, explorer) if timed(config) else {}
    return _write(explorer, store, met)


def seconds_searched(run: Store) -> float:
    """How long a run has searched up to the last scores that were kept, over all attempts.

    Args:
        run: the run's folder.
    """
    return _spent(_scored(run.child("explore", _PARTS)))


def _scored(parts: Store) -> list[dict[str, Any]]:
    return [row for name in parts.names() for row in parts.read_table(name).to_pylist()]


def _spent(rows: Iterable[Mapping[str, Any]]) -> float:
    """Scores of an earlier version have no seconds."""
    return max((row.get("seconds", 0.0) for row in rows), default=0.0)


class _Search:
    """Hands out batches of what the explorer asks for, and keeps the scores.

    Args:
        explorer: breeds the candidates.
        store: where the scores are kept.
        most: candidates of a batch, at most.
        tracker: takes the best scores.
        workers: how many score. All get about as much: what follows waits for the slowest.
    """

    def __init__(
        self, explorer: Explorer, store: Store, most: int, tracker: Tracker, workers: int = 1
    ) -> None:
        self._explorer, self._tracker = explorer, tracker
        self._most, self._workers, self._batch = most, workers, most
        self._generation: int | None = None
        self._told = 0
        self._parts = store.child(_PARTS)
        rows = _scored(self._parts)
        self._started = time.monotonic() - _spent(rows)
        #: Scores that the explorer has not heard: it is told a generation as a whole.
        self._scores = {row["key"]: row["score"] for row in rows}
        self._waiting: deque[Candidate] = deque()
        self._missing: set[str] = set()
        self._advance()

    def open(self) -> bool:
        """Whether anything is left to score."""
        return bool(self._missing)

    def take(self) -> list[Candidate]:
        """Up to a batch of candidates of the current generation that nobody has; empty when all
        are handed out."""
        return [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]

    def put(self, batch: Sequence[Candidate], scores: Mapping[str, float]) -> None:
        """Keep the scores of a batch."""
        spent = {"seconds": time.monotonic() - self._started}
        rows = [{"key": c.key, "score": float(scores[c.key]), **spent} for c in batch]
        first = batch[0]
        name = f"{first.generation:03d}-{first.rung}-{first.key}.parquet"
        self._parts.write_table(name, rows)
        self._scores |= {row["key"]: row["score"] for row in rows}
        self._missing -= {row["key"] for row in rows}
        if not self._missing:
            self._advance()

    def give_back(self, batch: Sequence[Candidate]) -> None:
        """A batch that nobody scored may be taken again."""
        self._waiting.extend(batch)

    def _advance(self) -> None:
        """Tell the explorer what is known, a closed generation at a time, up to one of which
        something is missing."""
        while asked := self._explorer.ask():
            self._enter(asked[0].generation)
            missing = [candidate for candidate in asked if candidate.key not in self._scores]
            if missing:
                self._waiting.extend(missing)
                turns = math.ceil(len(missing) / (self._workers * self._most))
                self._batch = math.ceil(len(missing) / (self._workers * turns))
                self._missing = {candidate.key for candidate in missing}
                return
            self._explorer.tell({c.key: self._scores.pop(c.key) for c in asked})
            self._told += len(asked)
        self._enter(None)

    def _enter(self, generation: int | None) -> None:
        """Log the generation that was asked for before, once another one is, or nothing any more:
        some of it is asked for again, after tuning, before its scores are final."""
        explorer, before = self._explorer, self._generation
        if before is not None and generation != before:
            best = {f"best/{b.label}": explorer.best(b).score for b in explorer.budgets}
            self._tracker.log({**best, "candidates": float(self._told)}, before + 1)
        self._generation = generation


# -- Ray Tune ---------------------------------------------------------------------------


class _Trial(tune.Trainable):
    """Scores one batch of candidates; the actor keeps its supernet for the next batch."""

    def setup(self, config: dict[str, Any], **shared: Any) -> None:
        run_config: RunConfig = shared["run_config"]
        gpu = run_config.cluster.use_gpu and torch.cuda.is_available()
        self._scorer = Scorer(
            run_config,
            shared["images"].here(),
            shared["weights"],
            torch.device("cuda" if gpu else "cpu"),
            shared["main_logits"],
        )
        self._candidates = config["candidates"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._candidates = new_config["candidates"]
        return True

    def step(self) -> dict[str, Any]:
        scores = [
            self._scorer(Subnet.from_json(subnet), images, steps)
            for subnet, images, steps in self._candidates
        ]
        return {"scores": scores, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the scores are the result."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""


class _Generations(Searcher):
    """Tune's view of the search: a suggestion is a batch of candidates.

    Args:
        search: hands them out.
        most: batches that may be out at a time.
        failures: times that a candidate may be lost with its worker before the search gives up.
    """

    def __init__(self, search: _Search, most: int, failures: int) -> None:
        super().__init__(metric=None, mode=None)
        self._search, self._most, self._failures = search, most, failures
        self._batches: dict[str, list[Candidate]] = {}
        self._lost: Counter[str] = Counter()
        #: Why scores could not be kept.
        self.failure: Exception | None = None

    def gave_up(self) -> bool:
        """Whether some candidate was lost too often."""
        return max(self._lost.values(), default=0) > self._failures

    def suggest(self, trial_id: str) -> Any:
        if not self._search.open() or self.gave_up() or self.failure:
            return Searcher.FINISHED
        batch = self._search.take() if len(self._batches) < self._most else []
        if not batch:
            return None  # the generation is handed out; wait for its scores
        self._batches[trial_id] = batch
        return {"candidates": [(c.subnet.to_json(), c.images, c.steps) for c in batch]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Scores come with the last result of a trial."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        batch = self._batches.pop(trial_id, None)
        if batch is None:
            return
        if error or not result or "scores" not in result:
            self._lost.update(candidate.key for candidate in batch)
            self._search.give_back(batch)
        else:
            keys = [candidate.key for candidate in batch]
            try:
                self._search.put(batch, dict(zip(keys, result["scores"], strict=True)))
            except Exception as reason:  # Tune would log it and wait for the scores for ever
                self.failure = reason

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher into scratch that is never read; trackers and storage have
        no place there."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search resumes from the parts in the run's storage."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is ever read back from Tune's own state."""


class _Patient(Stopper):
    """Ends a search whose cluster has lost all machines; Tune would wait for ever.

    Args:
        patience: says when.
    """

    def __init__(self, patience: cluster.Patience) -> None:
        self._patience = patience

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._patience.over()


class _Keeping(FIFOScheduler):
    """Keeps every worker for the next batch. Tune would stop all of them but one between two
    generations, and those that are about to be up when another is done first: it gives that one
    the batch that they were started for."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        controller = tune_controller._tune_controller
        controller._actor_cache.increase_max(trial.placement_group_factory)
        if not isinstance(controller._maybe_reuse_cached_actor, _Reuse):
            controller._maybe_reuse_cached_actor = _Reuse(controller)


class _Reuse:
    """Tune's way to give a batch to a worker that is done, but not a batch whose own worker is
    starting: that is up in seconds. One that waits for a machine may lose its batch."""

    def __init__(self, controller: Any) -> None:
        self._controller, self._reuse = controller, controller._maybe_reuse_cached_actor

    def __call__(self, trial: Any) -> bool:
        controller = self._controller
        own = controller._trial_to_actor.get(trial)
        starting = own and controller._actor_manager.is_actor_started(own)
        if starting and trial not in controller._resetting_trials:
            return False
        return bool(self._reuse(trial))


def _workers(config: RunConfig) -> int:
    """How many score at a time."""
    options = config.cluster
    return 1 if options.in_process else options.explore_workers or options.num_workers


def _tune(
    config: RunConfig,
    search: _Search,
    images: Images | SharedImages,
    weights: dict[str, Tensor],
) -> None:
    options = config.cluster
    workers = _workers(config)
    cluster.require_resources(options, 1)
    # Progress and scores have their own ways; Tune's files and tables would only repeat them.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # Tune's own handler would end the search as if it were done, and outlives it: an interruption
    # in a later stage would be swallowed.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    # Tune would copy the driver's keys into the runtime environment of its actors, which Ray keeps
    # as metadata and logs. Workers have the keys of their own node.
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(_AWS_KEYS)
    # All that are wanted are asked for at once: machines that have to start do so side by side.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(workers)
    resources = {name.lower(): amount for name, amount in cluster.worker_resources(options).items()}
    weights_reference = ray.put(weights)
    looking = ray.remote(_main_logits).options(
        num_cpus=resources["cpu"],
        num_gpus=resources.get("gpu", 0),
        max_retries=options.max_failures,
    )
    main_logits = cluster.result(
        looking.remote(config, images, weights_reference),
        "exploration's look at the main network",
        options,
    )
    trial = tune.with_parameters(
        _Trial, run_config=config, images=images, weights=weights, main_logits=main_logits
    )
    patience = cluster.Patience(options)
    generations = _Generations(search, workers, options.max_failures)
    with cluster.scratch() as folder:
        tuner = tune.Tuner(
            tune.with_resources(trial, resources),
            tune_config=tune.TuneConfig(
                search_alg=generations,
                scheduler=_Keeping(),
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="explore",
                storage_path=folder,
                stop=_Patient(patience),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
        tuner.fit()
    if generations.failure:
        raise generations.failure
    if search.open():
        if patience.over():
            raise patience.error()
        raise RunError(
            f"exploration lost workers with the same candidates {options.max_failures + 1} times; "
            "the logs of Ray say what ended them; the scores so far are kept and the same command "
            "goes on from them"
        )


def _main_logits(
    config: RunConfig, images: Images | SharedImages, weights: dict[str, Tensor]
) -> Tensor:
    device = torch.device("cuda" if config.cluster.use_gpu else "cpu")
    return Scorer(config, images.here(), weights, device).main_logits.cpu()


# -- what is left behind ----------------------------------------------------------------


def _write(
    explorer: Explorer, store: Store, met: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    def price(scored: Scored) -> dict[str, float]:
        """What budgets on latency add."""
        seconds = scored.cost.latency_s
        return {} if seconds is None else {"estimated_ms": 1e3 * seconds}

    rows = [
        {
            "subnet_id": scored.subnet.id,
            "subnet": scored.subnet.to_json(),
            "score": scored.score,
            "images": scored.images,
            "steps": scored.steps,
            "generation": scored.generation,
            "macs": scored.cost.macs,
            "params": scored.cost.params,
            **price(scored),
        }
        for scored in explorer.scored
    ]
    store.write_table(CANDIDATES, rows)
    best = {budget.label: explorer.best(budget).subnet.to_json() for budget in explorer.budgets}
    front: dict[str, Any] = {
        "budgets": best | {label: str(chosen["subnet"]) for label, chosen in met.items()},
        "front": [
            {"subnet": s.subnet.to_json(), "score": s.score, "macs": s.cost.macs, **price(s)}
            for s in explorer.front()
        ],
    }
    if met:
        front["latency"] = {
            label: {name: value for name, value in chosen.items() if name != "subnet"}
            for label, chosen in met.items()
        }
    store.write_json(FRONT, front)
    return front
