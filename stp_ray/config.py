"""One frozen typed tree that says everything about a run.

A recipe (YAML) plus dotted overrides is validated once, on the driver; the resolved tree
is saved beside every artifact and each component gets only its own part. The options of
`method` and `data` are defined beside the code that they steer and embedded here.
"""

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from .data.options import DataOptions
from .elastic.cost import Budget
from .errors import ConfigError
from .method.explore import Exploration
from .method.objective import Expansion, Stimulation
from .method.training import Optimisation
from .recipes import recipe_folder, recipe_names
from .uris import HOW_TO_MEND, credentials_in

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

# -- the tree ---------------------------------------------------------------------------


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
        raise ValueError(
            f"budget {value}: expected a fraction in (0, 1]; write {float(value)} for a fraction "
            f"of the full network's MACs, or {{macs: {value}}} for a number of MACs"
        )
    if not isinstance(value, Mapping) or not set(value) <= _BOUNDS:
        raise ValueError(
            f"budget {_shown(value)}: expected a fraction of MACs such as 0.5, or a mapping with "
            "macs and/or params, latency or latency_ms"
        )
    for name, bound in value.items():
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float)):
            raise ValueError(
                f"budget {name}={_shown(bound)}: expected a fraction or a positive number"
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
    weights: str | None = None
    """URI of a state dict to start from (safetensors, or torch.save read with weights_only); null:
    random weights."""
    ranking: Literal["l1", "l2", "norm"] | None = "l2"
    """How the units of weights that were given, or come from the baseline, are put in order, so
    that narrow subnets keep the best ones; null: they stay as they are. Random weights have no
    order."""


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
    """Start as the trained baseline, its units in the order of `model.ranking`, and go on with the
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
    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads (and Ray CPUs) per worker."""
    explore_workers: int | None = Field(default=None, ge=1)
    """Processes that score candidates; null: as many as num_workers."""
    max_failures: int = Field(default=3, ge=0)
    """How often a stage is restarted from its last checkpoint after a worker was lost."""
    schedule_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds to wait for the cluster to offer the requested workers."""
    address: str | None = None
    """Ray cluster to join; null: the one that RAY_ADDRESS or the job names, else a local one."""
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
    project: str = "stp_ray"
    """Weights & Biases project."""


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
    """Train the dense network alone, to compare with; null: not trained."""
    teacher_weight: float = Field(default=0.0, ge=0, le=1)
    """The part of every label that the trained baseline says in supernet, in finalize with
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
                "which is the teacher; give baseline.epochs or set teacher_weight to 0"
            )
        if self.supernet.from_baseline and self.baseline is None:
            raise ValueError(
                "supernet.from_baseline is true and baseline null; expected a baseline to start "
                "from; give baseline.epochs, or model.weights for weights that you have"
            )
        for path, options, key, workers in (
            ("baseline", self.baseline, "cluster.num_workers", self.cluster.num_workers),
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
                "supernet.optimisation" if self.baseline is None else "baseline",
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

    def control_options(self) -> Optimisation:
        """How the control is trained: as the baseline, or else as the supernet but down to the
        ladder's last learning rate, for all epochs that the pruned network's weights see."""
        epochs = self.epochs_before("finalize") + self.finalize.optimisation.epochs
        options = self.baseline or dataclasses.replace(
            self.supernet.optimisation, min_lr=self.finalize.optimisation.min_lr
        )
        return dataclasses.replace(
            options, epochs=epochs, warmup_epochs=min(options.warmup_epochs, epochs)
        )


def placed(config: RunConfig) -> RunConfig:
    """The same with local paths that are absolute, for other processes: Ray's workers stand in
    folders of their own. The run id is that of the configuration as it was given."""
    data, model = config.data, config.model
    return config.model_copy(
        update={
            "data": dataclasses.replace(data, uri=_absolute(data.uri)),
            "model": model.model_copy(update={"weights": _absolute(model.weights)}),
        }
    )


def _absolute(uri: str | None) -> str | None:
    """A path from the root of the file system; a URI stays as it is."""
    if uri is None or "://" in uri or "::" in uri:
        return uri
    return os.path.abspath(os.path.expanduser(uri))


def dump_config(config: RunConfig) -> dict[str, Any]:
    """The resolved tree as JSON-able content; `load_config` reads it back unchanged."""
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    """The resolved tree as a YAML recipe."""
    return yaml.dump(dump_config(config), Dumper=_Dumper, sort_keys=False)


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


# -- reading ----------------------------------------------------------------------------


def load_config(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Read a recipe and apply overrides.

    Args:
        recipe: the name of a recipe that ships with the project, the path of a YAML file, or
            the content of one.
        overrides: "a.b.c=value" with the value in YAML; they win over the recipe, the last
            one over earlier ones, and a list replaces the whole list.

    Raises:
        ConfigError: naming the dotted path, what was found and what was expected.
    """
    if isinstance(recipe, RunConfig):
        content = dump_config(recipe)
    elif isinstance(recipe, Mapping):
        content = copy.deepcopy(dict(recipe))
    elif isinstance(recipe, (str, os.PathLike)):
        content = _read_recipe(recipe)
    else:
        raise ConfigError(
            f"the recipe is {recipe!r:.60}; expected the name of one, the path of a YAML file, or "
            "a mapping of keys to values"
        )
    if isinstance(overrides, str):
        raise ConfigError(f"overrides are {overrides!r}; expected a list: [{overrides!r}]")
    for override in overrides:
        _override(content, override)
    try:
        for path, value in _leaves(content):
            _check_leaf(path, value)
    except RecursionError:
        raise ConfigError("the recipe holds itself; expected values without anchors") from None
    try:
        return RunConfig.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _read_recipe(recipe: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(recipe)
    if not path.is_file() and os.fspath(recipe) in recipe_names():
        path = recipe_folder() / f"{os.fspath(recipe)}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not a file" if isinstance(error, FileNotFoundError) else f"unreadable: {error}"
        raise ConfigError(
            f"recipe {os.fspath(recipe)!r} {reason}; expected a YAML file or one of "
            f"{', '.join(recipe_names())}{_did_you_mean(os.fspath(recipe), recipe_names())}"
        ) from None
    content = _parse(text, f"recipe {path.name}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"recipe {path.name} holds {_shown(content)}; expected a mapping of keys to values"
        )
    return content


def _override(content: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(
            f"override {override!r} is not of the form key=value; expected for example "
            "seed=1 or supernet.optimisation.lr=0.1"
        )
    section: Any = content
    for depth, key in enumerate(keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(
                f"{'.'.join(keys)} cannot be set: {'.'.join(keys[:depth])} is {_shown(section)}, "
                "not a section"
            )
    section[keys[-1]] = _parse(text, f"override {path.strip()}")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `off` is a string, `1e-3` a number; a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0 if re.match(r"0[xo]", text) else 10)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""]
        )
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where} is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, AttributeError) as error:  # the last two: a tag's own
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def _leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            if not isinstance(key, str):
                raise ConfigError(
                    f"{path or 'the recipe'} has the key {_shown(key)}; expected names as keys"
                )
            yield from _leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, content


def _check_leaf(path: str, value: Any) -> None:
    if isinstance(value, str):
        found = credentials_in(value)
        if found:
            raise ConfigError(f"{path} contains {found}; {HOW_TO_MEND}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {value}; expected a finite number")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ConfigError(
            f"{path} is {_shown(value)}; expected text, a number, true, false or null"
        )


# -- messages ---------------------------------------------------------------------------


def _one_line(error: ValidationError) -> str:
    messages = [_message(details) for details in error.errors(include_url=False)]
    rest = f" (and {len(messages) - 3} more)" if len(messages) > 3 else ""
    return " | ".join(messages[:3]) + rest


def _message(details: Any) -> str:
    kind, path = details["type"], ".".join(str(part) for part in details["loc"])
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {path}{_nearest_key(path)}"
    if kind == "value_error":
        # Our own checks name the field first, so that the path can continue with it.
        text = str(details["ctx"]["error"])
        field, _, _ = text.partition(" ")
        joined = "." if path and field in _children(_type_at(path)) else ": "
        return f"{path}{joined}{text}" if path else text
    if kind == "missing":
        parent, _, last = path.rpartition(".")
        return f"{parent} is {_shown(details['input'])}; expected it to have {last} as well"
    expected = details["msg"]
    for old, new in (
        ("Input should be", "expected"),
        ("String should match pattern", "expected text that matches"),
        ("an object", "a mapping of keys to values"),
        ("a valid array", "a list"),
        ("a valid integer", "an integer"),
        ("a valid number", "a number"),
        ("a valid boolean", "true or false"),
        ("a valid string", "text (quote it if it looks like a number)"),
    ):
        expected = expected.replace(old, new)
    return f"{path} is {_shown(details['input'])}; {expected}"


def _shown(value: Any) -> str:
    """A value and its kind, short, on one line."""
    if value is None:
        return "null"
    kinds: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "true or false"),
        (int, "an integer"),
        (float, "a number"),
        (str, "text"),
        (Mapping, "a mapping"),
        ((list, tuple), "a list"),
    ]
    kind = next((name for types_, name in kinds if isinstance(value, types_)), type(value).__name__)
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _nearest_key(path: str) -> str:
    """The known key nearest to an unknown one: a sibling first, then one anywhere."""
    parent, _, name = path.rpartition(".")
    siblings = list(_children(_type_at(parent)))
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    if near:
        return f"; did you mean {parent + '.' if parent else ''}{near[0]}?"
    everywhere = list(_paths(RunConfig))
    same = [known for known in everywhere if known.rpartition(".")[2] == name]
    if same:
        return f"; did you mean {' or '.join(same)}?"
    names = [known.rpartition(".")[2] for known in everywhere]
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {parent + '.' if parent else ''}{near[0]}?"
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {everywhere[names.index(near[0])]}?"
    return f"; known keys here: {', '.join(siblings)}"


def _bare(kind: Any) -> Any:
    """The section type within Optional[...] or Annotated[...]."""
    if typing.get_origin(kind) is Annotated:
        return _bare(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(kind) if arg is not types.NoneType]
        return _bare(inner[0]) if len(inner) == 1 else kind
    return kind


def _children(kind: Any) -> dict[str, Any]:
    """Field name -> type of a section; empty for anything else."""
    kind = _bare(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind is not Budget:
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {}


def _type_at(path: str) -> Any:
    kind: Any = RunConfig
    for key in filter(None, path.split(".")):
        kind = _children(kind).get(key)
    return kind


def _paths(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, child in _children(kind).items():
        yield f"{prefix}{name}"
        yield from _paths(child, f"{prefix}{name}.")
