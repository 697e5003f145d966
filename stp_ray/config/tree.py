"""The sections of a run's configuration, and what holds between them."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from ..data.options import DataOptions
from ..elastic.cost import Budget
from ..method.explore import Exploration
from ..method.objective import Expansion, Stimulation
from ..method.training import Optimisation
from ..uris import from_root
from .messages import shown

#: What does not change a run's result, and so is left out of its id: dotted paths.
_NOT_IN_ID = (
    "storage",
    "tracking",
    "explore.batch_of_candidates",
    "cluster.address",
    "cluster.device_price",
    "cluster.explore_workers",
    "cluster.max_failures",
    "cluster.min_workers",  # the order of summation alone depends on it
    "cluster.resize_every_s",
    "cluster.schedule_timeout_s",
    "baseline.checkpoint_every",
    "supernet.optimisation.checkpoint_every",
    "finalize.optimisation.checkpoint_every",
)


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


_BOUNDS = {field.name for field in dataclasses.fields(Budget)}


def _read_budget(value: Any) -> Budget:
    if isinstance(value, Budget):
        return value
    if isinstance(value, float):
        return Budget(macs=value)
    if isinstance(value, int) and not isinstance(value, bool):
        share = f"{value}.0 for all of the full network's MACs, or " if value == 1 else ""
        whole = f"; write {share}{{macs: {value}}} for a number of MACs" if value > 0 else ""
        raise ValueError(f"budget {value}: expected a fraction in (0, 1] such as 0.5{whole}")
    if not isinstance(value, Mapping) or not set(value) <= _BOUNDS:
        raise ValueError(
            f"budget {shown(value)}: expected a fraction of MACs such as 0.5, or a mapping with "
            "macs and/or params, latency or latency_ms"
        )
    for name, bound in value.items():
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float)):
            raise ValueError(
                f"budget {name}={shown(bound)}: expected a fraction or a positive number"
            )
    return Budget(**value)


def _write_budget(budget: Budget) -> float | dict[str, int | float]:
    if isinstance(budget.macs, float) and budget == Budget(macs=budget.macs):
        return budget.macs
    return {name: value for name, value in dataclasses.asdict(budget).items() if value is not None}


BudgetField = Annotated[
    Budget,
    BeforeValidator(_read_budget),
    PlainSerializer(_write_budget, return_type=float | dict[str, int | float]),
]


class ModelOptions(_Section):
    """The dense network that is pruned."""

    name: str = "resnet20"
    """One of our own models, a torchvision classification model, or a function of yours as
    "package.module:function" that returns a torch.nn.Module."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the model's function."""
    weights: str | None = Field(default=None, min_length=1)
    """URI of a state dict to start from (safetensors, or torch.save read with weights_only); null:
    random weights."""
    ranking: Literal["l1", "l2", "norm"] | None = "l2"
    """How the units of weights that were given, or come from the baseline, are put in order, so
    that narrow subnets keep the best ones; null: they stay as they are. Random weights have no
    order."""

    @property
    def trained(self) -> bool:
        """Whether its weights may be trained ones: from a URI, from torchvision, or from a function
        of yours, of which only you know."""
        return self.given or ":" in self.name

    @property
    def given(self) -> bool:
        """Whether trained weights come from a URI or from torchvision."""
        return bool(self.weights or self.kwargs.get("weights"))


#: What is trained: the dense network alone, the supernet, the ladder towards a target, or the
#: target's shape from scratch.
Training = Literal["baseline", "supernet", "finalize", "control"]


class SpaceOptions(_Section):
    """Which widths are admissible."""

    divisor: int | None = Field(default=None, ge=1)
    """Widths are multiples of this; null: chosen by the size of the network."""
    min_ratio: float = Field(default=0.125, gt=0, le=1)
    """No width falls below this fraction of its full size."""
    ignore: tuple[str, ...] = ()
    """Modules that stay whole, as patterns: "layer4", "*.conv1"."""
    only: tuple[str, ...] = ()
    """Modules outside of which everything stays whole, as patterns; empty: all may be pruned."""


class SupernetOptions(_Section):
    """Stage 1: stimulative training of the main network with its subnets."""

    optimisation: Optimisation = Field(default_factory=Optimisation)
    """How the shared weights are trained."""
    stimulation: Stimulation = Field(default_factory=Stimulation)
    """Which subnets are trained beside the main network, and how."""
    from_baseline: bool = False
    """Start as the baseline, its units in the order of `model.ranking`, and go on with the
    epochs that come after its own; false: start as the baseline did [ours]."""


class FinalizeOptions(_Section):
    """Stage 3: distillation with subnet mutating expansion, then pruning, once per budget."""

    optimisation: Optimisation = Field(default_factory=Optimisation)
    """How the shared weights are trained on."""
    expansion: Expansion = Field(default_factory=Expansion)
    """How the expanded subnets between the target and the main network are drawn."""
    taught: bool = True
    """Whether the baseline says its part of the labels (`teacher_weight`) in this stage too, for a
    forward pass of it in each step; its control is taught in any case [ours]."""
    num_workers: int = Field(default=1, ge=1)
    """Data-parallel workers of each budget's training."""
    calibration_images: int = Field(default=2048, ge=1)
    """Training images that the final BatchNorm statistics are taken from."""
    control: bool = False
    """Also train the pruned shape from scratch, for as many epochs as supernet and finalize have
    together (and the baseline, with `supernet.from_baseline`), to compare with."""


class ClusterOptions(_Section):
    """Where the run computes."""

    num_workers: int = Field(default=1, ge=1)
    """Data-parallel workers of the supernet (and of the baseline)."""
    min_workers: int | None = Field(default=None, ge=1)
    """Fewest workers that a training begins or goes on with where machines are missing; null: it
    waits for all. The batch stays what it is: fewer workers do the work of all, in more time."""
    resize_every_s: float = Field(default=60.0, gt=0)
    """Seconds between two looks whether a training that goes on with fewer workers can have more;
    each change begins again at the last checkpoint."""
    use_gpu: bool = False
    """One GPU per worker."""
    threads_per_worker: int = Field(default=1, ge=1, le=4096)
    """CPU threads (and Ray CPUs) per worker."""
    explore_workers: int | None = Field(default=None, ge=1)
    """Processes that score candidates; null: as many as num_workers."""
    max_failures: int = Field(default=3, ge=0)
    """How often a stage is restarted from its last checkpoint after a worker was lost. A machine
    that was drained, as a spot machine is on the cloud's notice, does not count."""
    schedule_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds to wait for the cluster to offer the requested workers, or one of them again where a
    search or the budgets of one worker each have lost all machines. A training of several workers
    that lost some of them waits so long `max_failures` + 1 times, with `min_workers` once."""
    address: str | None = None
    """Ray cluster to join, "auto" for one that was started on this machine; null: the one that
    RAY_ADDRESS or the job names, else a local one."""
    device_price: float | None = Field(default=None, ge=0)
    """Price of one device-hour (a GPU, or a CPU core where use_gpu is off), in any currency; null:
    the report and `--dry-run` show device-hours alone."""
    in_process: bool = False
    """Run every stage in this process, without Ray; for tests and debugging."""

    def fewest(self, workers: int) -> int:
        """The fewest that a training of so many workers goes on with."""
        return min(self.min_workers or workers, workers)


class TrackingOptions(_Section):
    """Where metrics go, besides the JSON lines that every run writes."""

    console: bool = True
    """Progress on the terminal: a live line, or a plain line every ten seconds."""
    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases; "offline" writes files that `wandb sync` uploads later."""
    project: str = Field(default="stp_ray", pattern=r"^[^/\\#?%:]{1,128}$")
    """Weights & Biases project; `WANDB_ENTITY` names the team."""


class ExportOptions(_Section):
    """Formats written beside each pruned network's safetensors."""

    onnx: bool = True
    """model.onnx, where the export packages are installed."""
    pt2: bool = True
    """model.pt2, a torch.export archive."""
    openvino: bool = False
    """model.xml and model.bin, where the package openvino is installed."""
    executorch: bool = False
    """model.pte, where the package executorch is installed."""


class RunConfig(_Section):
    """Everything about one run. Raises pydantic.ValidationError; `load_config` raises
    ConfigError with one line instead."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,79}$")
    """First part of the run id; letters, digits and ._- only."""
    storage: str = "runs"
    """Folder or fsspec URI (s3://, gs://, az://) that run folders are written under."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of everything random."""
    budgets: tuple[BudgetField, ...] = (Budget(macs=0.5),)
    """One pruned network each: a fraction of the full network's MACs such as 0.15, or a mapping
    {macs: ..., params: ...} of fractions (floats) or absolute numbers (integers), with
    latency: ..., a fraction of the full network's, or latency_ms: ... in milliseconds for one image
    on a worker's device."""
    model: ModelOptions = Field(default_factory=ModelOptions)
    """The dense network that is pruned."""
    space: SpaceOptions = Field(default_factory=SpaceOptions)
    """Which widths are admissible."""
    data: DataOptions = Field(default_factory=DataOptions)
    """Images, labels and augmentation."""
    baseline: Optimisation | None = None
    """Train the dense network alone, to compare with; `epochs: 0` takes the weights that
    were given as they are; null: there is none."""
    teacher_weight: float = Field(default=0.0, ge=0, le=1)
    """The part of every label that the baseline says in supernet, in finalize with
    `finalize.taught`, and in finalize's control [ours]; 0: the labels are those of the data."""
    supernet: SupernetOptions = Field(default_factory=SupernetOptions)
    """Stage 1: stimulative training."""
    explore: Exploration = Field(default_factory=Exploration)
    """Stage 2: search for the best subnet of each budget."""
    finalize: FinalizeOptions = Field(default_factory=FinalizeOptions)
    """Stage 3: mutating expansion and pruning."""
    cluster: ClusterOptions = Field(default_factory=ClusterOptions)
    """Where the run computes."""
    tracking: TrackingOptions = Field(default_factory=TrackingOptions)
    """Where metrics go."""
    export: ExportOptions = Field(default_factory=ExportOptions)
    """Formats of the pruned networks."""

    def teacher_weight_in(self, training: Training) -> float:
        """The part of every label that the baseline says in a `training`: 0 in its own, and in
        "finalize" without `finalize.taught`."""
        untaught = training == "baseline" or (training == "finalize" and not self.finalize.taught)
        return 0.0 if untaught else self.teacher_weight

    def epochs_before(self, training: Training) -> int:
        """The epochs that the weights which a `training` starts from have seen, in this run."""
        before = 0
        if training in ("supernet", "finalize") and self.baseline and self.supernet.from_baseline:
            before = self.baseline.epochs
        if training == "finalize":
            before += self.supernet.optimisation.epochs
        return before

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.budgets:
            raise ValueError("budgets is empty; expected at least one, for example [0.5]")
        labels = [budget.label for budget in self.budgets]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"budgets names {twice[0]} twice; expected each budget once")
        if self.teacher_weight and self.baseline is None:
            raise ValueError(
                f"teacher_weight is {self.teacher_weight} and baseline null; expected a baseline, "
                "which is the teacher; give baseline.epochs, 0 for weights that you have, or set "
                "teacher_weight to 0"
            )
        if self.supernet.from_baseline and self.baseline is None:
            raise ValueError(
                "supernet.from_baseline is true and baseline null; expected a baseline to start "
                "from; give baseline.epochs, 0 for weights that you have, or set "
                "supernet.from_baseline to false"
            )
        for path, training in (("supernet", self.supernet), ("finalize", self.finalize)):
            if not training.optimisation.epochs:
                raise ValueError(
                    f"{path}.optimisation.epochs is 0; expected at least 1, because the subnets "
                    "have to learn; raise it"
                )
        if self.baseline and not self.baseline.epochs and not self.model.trained:
            raise ValueError(
                f"baseline.epochs is 0 and the weights of {self.model.name!r} are random; expected "
                "weights that were trained; give them as model.weights, or raise baseline.epochs"
            )
        if self.cluster.in_process and self.cluster.use_gpu:
            raise ValueError(
                "cluster.use_gpu is true and in_process too; expected one of them, because this "
                "process computes on the CPU; set in_process to false"
            )
        trained = self._trained_baseline
        for path, options, key, workers in (
            ("baseline", trained, "cluster.num_workers", self.cluster.num_workers),
            (
                "supernet.optimisation",
                self.supernet.optimisation,
                "cluster.num_workers",
                self.cluster.num_workers,
            ),
            (
                "finalize.optimisation",
                self.finalize.optimisation,
                "finalize.num_workers",
                self.finalize.num_workers,
            ),
            (
                "baseline" if trained else "supernet.optimisation",
                self.control_options() if self.finalize.control else None,
                "finalize.num_workers",
                self.finalize.num_workers,
            ),
        ):
            if options is not None and options.batch_size % workers:
                raise ValueError(
                    f"{path}.batch_size is {options.batch_size}; expected a multiple of "
                    f"{key} ({workers}), because each step's batch is shared out equally"
                )
        if self.explore.population < len(self.budgets):
            raise ValueError(
                f"explore.population is {self.explore.population}; expected at least one candidate "
                f"for each of the {len(self.budgets)} budgets; raise it"
            )
        return self

    @property
    def _trained_baseline(self) -> Optimisation | None:
        """The baseline's training, where there is any."""
        return self.baseline if self.baseline and self.baseline.epochs else None

    def baseline_options(self) -> Optimisation | None:
        """How the baseline is trained: one of no epochs has nothing but the supernet's batches."""
        if self.baseline is None:
            return None
        given = Optimisation(epochs=0, batch_size=self.supernet.optimisation.batch_size)
        return self._trained_baseline or given

    def control_options(self) -> Optimisation:
        """How the control is trained: as the baseline, or where that is not trained as the supernet
        but down to the ladder's last learning rate, for all epochs that the pruned network's
        weights see in this run."""
        epochs = self.epochs_before("finalize") + self.finalize.optimisation.epochs
        options = self._trained_baseline or dataclasses.replace(
            self.supernet.optimisation, min_lr=self.finalize.optimisation.min_lr
        )
        return dataclasses.replace(
            options, epochs=epochs, warmup_epochs=min(options.warmup_epochs, epochs)
        )


def placed(config: RunConfig) -> RunConfig:
    """The same for other processes, with local paths that are absolute and the cluster's address:
    Ray's workers stand in folders of their own, and `ray job submit` tells the driver alone. The
    run id is that of the configuration as it was given."""
    data, model, address = config.data, config.model, config.cluster.address
    return config.model_copy(
        update={
            "data": dataclasses.replace(data, uri=data.uri and from_root(data.uri)),
            "model": model.model_copy(
                update={"weights": model.weights and from_root(model.weights)}
            ),
            "cluster": config.cluster.model_copy(
                update={"address": address or os.environ.get("RAY_ADDRESS")}
            ),
        }
    )


def dump_config(config: RunConfig) -> dict[str, Any]:
    """The resolved tree as JSON-able content; `load_config` reads it back unchanged."""
    return config.model_dump(mode="json")


def run_id(config: RunConfig) -> str:
    """The run's name plus ten hexadecimal digits of its resolved config.

    Left out of the digits is what cannot change the result: where artifacts and metrics go,
    how the cluster is reached, how often checkpoints are written.
    """
    content = dump_config(config)
    for path in _NOT_IN_ID:
        *parents, last = path.split(".")
        section: Any = content
        for key in parents:
            section = section.get(key) or {}
        section.pop(last, None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{config.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
