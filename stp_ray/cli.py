"""The `stp` command. Nothing heavy is imported before a command needs it."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from .errors import ConfigError, StpError
from .recipes import recipe_names


@contextlib.contextmanager
def one_line_errors(
    stopped: str = "stopped; the same command goes on where it was",
) -> Iterator[None]:
    """Turn a StpError into one line on standard error and its exit code, without traceback; an
    interruption into what is said of it."""
    try:
        yield
    except StpError as error:
        # Ray hands a remote error on wrapped, with the remote traceback as its text.
        cause = getattr(error, "cause", None)
        told = cause if isinstance(cause, StpError) else error
        print(f"error: {' '.join(str(told).split())}", file=sys.stderr, flush=True)
        raise SystemExit(told.exit_code) from None
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr, flush=True)
        raise SystemExit(130) from None


#: What the library below typer, which is its own since 0.16, raises for a command line.
_USAGE_ERROR: Any = typer.BadParameter.__base__


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with one_line_errors():
            try:
                return super().invoke(ctx)
            except _USAGE_ERROR as error:
                if error.ctx is None or type(error).__name__ == "NoArgsIsHelpError":
                    raise  # shows the help
                said = error.format_message().rstrip(".")
                raise ConfigError(f"{said}; see `{error.ctx.command_path} --help`") from None


_HELP = """Prune an image classifier to a fraction of its cost, without fine-tuning afterwards.

\b
A first round, each step on its own:
  stp inspect resnet18            what can be pruned in a model
  stp data convert photos s3://bucket/set    images to Parquet, anywhere
  stp run demo --dry-run          what would be done, and its cost
  stp run demo                    do it, or what is missing of it
  stp report runs/latest          write its report.html again
  stp wandb-sync runs/latest      how to upload what it kept offline
  stp export runs/latest/budget-0.15 --to openvino

\b
RECIPE is a name (demo) or a YAML file of yours. Settings follow it:
  stp run mine.yaml seed=1 supernet.optimisation.epochs=30
  stp run mine.yaml --print-config    all settings and their values

The same command after a crash goes on where it stopped. An error is one line: what was found,
what was expected, what to change.
"""

app = typer.Typer(
    cls=_Commands,
    help=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at data sets, and convert them.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point: runs a command and exits; user mistakes are one line and an exit code."""
    app(prog_name="stp")


Recipe = Annotated[
    str | None,
    typer.Argument(
        help="A recipe that ships with the project, or the path of a YAML file.",
        autocompletion=lambda incomplete: [n for n in recipe_names() if n.startswith(incomplete)],
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides, for example seed=1 baseline.lr=0.05.")
]


# -- commands ---------------------------------------------------------------------------


@app.command()
def run(
    recipe: Recipe = None,
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe and stop.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check settings, data, model and budgets, show what would be done and what it "
            "would cost, and stop. "
            "cluster.device_price=2.5 (of a device-hour) adds the money.",
        ),
    ] = False,
) -> None:
    """Run the whole pipeline, or what is missing of it.

    The run's folder is its name and a hash of its settings: the same command finds it again.
    """
    run_recipe(recipe, overrides or [], print_config=print_config, dry_run=dry_run)


@app.command()
def status(
    uri: Annotated[str, typer.Argument(help="A run's folder or URI.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where a run stands: what is done, what is under way, and who drives it."""
    from .status import status as look

    found = look(_folder(uri))
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "state": found.state}, indent=2))
        return
    print(f"{found.run}: {found.state}")
    table = Table()
    for heading in ("stage", "state", "seconds", "top-1 %"):
        table.add_column(heading, justify="left" if heading in ("stage", "state") else "right")
    for stage in found.stages:
        if stage.record is not None:
            top1 = stage.record["metrics"].get("top1")
            seconds = f"{stage.record['seconds']:,.0f}"
            table.add_row(stage.name, "done", seconds, _cell(top1, ".2f"))
        elif stage.total_steps is not None:
            table.add_row(stage.name, f"step {stage.step or 0:,} of {stage.total_steps:,}", "", "")
        else:
            table.add_row(stage.name, "to do", "", "")
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


@app.command()
def resume(
    uri: Annotated[str, typer.Argument(help="A run's folder or URI.")],
    factory: Annotated[
        str | None,
        typer.Option(help='For a dense model of yours: its function as "package.module:name".'),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that leave the results alone, such as cluster.address=auto."),
    ] = None,
) -> None:
    """Go on with a run from its folder alone, whoever started it."""
    _see_current_folder()
    from .stages import pipeline
    from .status import resumable

    run = _folder(uri)
    print_summary(pipeline.run(resumable(run, factory, overrides or [])), f"{run.uri}/report.html")


@app.command()
def report(
    uri: Annotated[str, typer.Argument(help="A run's folder or URI.")],
) -> None:
    """Write a run's report.html again from its artifacts."""
    from .artifacts import Manifest
    from .lease import held
    from .report import write_report

    run = _run_store(uri)
    with held(run) as lease:
        print(write_report(run))
        Manifest(run, guard=lease.require).rewritten("report", "report.html")


@app.command("wandb-sync")
def wandb_sync(
    uri: Annotated[str, typer.Argument(help="A run's folder or URI.")],
) -> None:
    """Say how to upload what a run kept for Weights & Biases and no server has yet."""
    from .tracking import sync_command, wandb_folder, wandb_id

    store = _run_store(uri, "config.json")
    run_id = store.uri.rstrip("/").rpartition("/")[2]
    folder, place = wandb_folder(store, run_id) / "wandb", wandb_id(run_id)
    kept = [
        path
        for path in folder.glob(f"offline-run-*-{place}-*")
        if not list(path.glob("*.wandb.synced"))
    ]
    if not kept:
        print(f"nothing to upload: no offline run of {run_id} in {folder}")
        return
    print(f"{len(kept)} stages of {run_id} were kept offline; after `wandb login` upload them:")
    print(f"  {sync_command(folder.parent, place)}")


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(help='A model of ours, of torchvision, or yours as "package.module:name".'),
    ],
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Height and width in pixels; 32 for our models, else 224.", min=1, max=8192
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Number of classes; 10 for our models, else 1000.", min=1)
    ] = None,
    divisor: Annotated[
        int | None, typer.Option(help="Widths are multiples of this.", min=1)
    ] = None,
    min_ratio: Annotated[
        float, typer.Option(help="No width falls below this share of its full size.")
    ] = 0.125,
    ignore: Annotated[
        list[str] | None, typer.Option(help='Modules that stay whole: "layer4", "*.conv1".')
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Modules outside of which all stays whole.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what can be pruned in a model: its axes, blocks, cost, and what is frozen."""
    options = {"divisor": divisor, "min_ratio": min_ratio, "ignore": ignore, "only": only}
    content = _inspection(model, image_size, num_classes, options)
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        _print_inspection(content)


@data_app.command("describe")
def describe_data(
    source: Annotated[
        str,
        typer.Argument(help="A folder or URI of Parquet files, or the name of a data set."),
    ],
    root: Annotated[
        str | None, typer.Option(help="Folder of a named data set that is not built in.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Height and width in pixels; as they are stored by default.", min=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the classes and the size of a data set."""
    from .data import describe

    summary = dataclasses.asdict(describe(_data_options(source, root, image_size)))
    summary["train_rows"] += summary.pop("holdout_rows")
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    for name, value in summary.items():
        print(f"{name}: {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}")


@data_app.command("convert")
def convert_data(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or URI with train/CLASS/ and test/CLASS/ or val/CLASS/; or what "
            "DatasetDict.save_to_disk wrote; or, with --hub, a data set's name."
        ),
    ],
    target: Annotated[
        str, typer.Argument(help="New or empty folder or URI for the Parquet files.")
    ],
    hub: Annotated[
        bool, typer.Option("--hub", help="SOURCE is a name for datasets.load_dataset.")
    ] = False,
) -> None:
    """Write images as Parquet, which streams and lives in object storage.

    Then data.name=parquet data.uri=TARGET in a recipe.
    """
    from .data import dataset_to_parquet, folder_to_parquet
    from .data.convert import is_saved_dataset

    told = "stopped, and what was written is deleted; the same command begins anew"
    with one_line_errors(told), _progress("converting") as on_progress:
        if hub or is_saved_dataset(source):
            counts = dataset_to_parquet(_hugging_face(source, hub), target, on_progress)
        else:
            counts = folder_to_parquet(source, target, on_progress)
    print(f"{target}: {', '.join(f'{count:,} {split}' for split, count in counts.items())}")


def _hugging_face(source: str, hub: bool) -> Any:
    from .errors import DataError

    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source} needs the package {error.name}, which is not installed; "
            'pip install "stp_ray[huggingface]"'
        ) from error
    try:
        return datasets.load_dataset(source) if hub else datasets.load_from_disk(source)
    except Exception as error:  # the hub, the disk and every builder raise errors of their own
        raise DataError(
            f"{source} cannot be loaded ({' '.join(str(error).split())[:200]}); expected a data "
            "set of images; check the name"
        ) from error


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Any]:
    """A bar with the time that is left, on a terminal; nothing in a log."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Format(StrEnum):
    """A format that `stp export` writes."""

    onnx = "onnx"
    pt2 = "pt2"
    openvino = "openvino"
    executorch = "executorch"


@app.command()
def export(
    uri: Annotated[str, typer.Argument(help="The folder or URI of a pruned network.")],
    to: Annotated[
        list[Format] | None,
        typer.Option(help="The format to write, onnx by default; may be given several times."),
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option(help='For a dense model of yours: its function as "package.module:name".'),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder or URI to write to; beside the weights by default.")
    ] = None,
) -> None:
    """Write a pruned network in another format.

    The program is compared with the network first and timed; neither stp_ray nor the code of your
    model is needed to run it.
    """
    import torch

    from . import export as formats
    from .artifacts import Store
    from .models import find_factory

    _see_current_folder()
    store = Store(uri)
    goal = Store(output or uri)
    wanted = []
    for kind in to or [Format.onnx]:
        # A finished run knows its files by their checksums: they are not written anew.
        name = formats.FILES[kind]
        if goal.exists(name):
            print(f"{kind}: it is there already; --output writes another one", file=sys.stderr)
            print(f"{goal.uri}/{name}")
        else:
            wanted.append(kind)
    if not wanted:
        return
    module = formats.load(store.uri, factory=find_factory(factory) if factory else None)
    size = store.read_json(formats.DESCRIPTION)["image_size"]
    for kind in wanted:
        program = formats.FORMATS[kind](module, torch.zeros(1, 3, size, size))
        for name, data in program.files.items():
            goal.write_bytes(name, data)
            print(f"{goal.uri}/{name}")
        print(
            f"{kind}: {1e3 * program.latency_s:.2f} ms an image on one thread, differs by "
            f"{program.difference:.1e} (relative), made in {program.seconds:.1f} s",
            file=sys.stderr,
        )


# -- run --------------------------------------------------------------------------------


def run_recipe(
    recipe: str | None,
    overrides: list[str],
    *,
    print_config: bool = False,
    dry_run: bool = False,
    until: str | None = None,
) -> None:
    """What `stp run` and the scripts in pipelines/ do: load, run, print the table, or only the
    run's folder where the run is to end before its last stage."""
    from .config import load_config, run_id, to_yaml

    if recipe is not None and "=" in recipe and not os.path.exists(recipe):
        overrides = [recipe, *overrides]
        recipe = None
    if recipe is None and not print_config:
        raise ConfigError(
            "no recipe was named before the overrides; expected a YAML file or one of "
            f"{', '.join(recipe_names())}"
        )
    config = load_config({} if recipe is None else recipe, overrides)
    if print_config:
        print(to_yaml(config), end="")
        return
    _see_current_folder()
    if dry_run:
        _print_plan(config)
        return
    from .artifacts import Store
    from .stages import pipeline

    folder = Store(config.storage).child(run_id(config)).uri
    if until is None:
        print_summary(pipeline.run(config), f"{folder}/report.html")
    else:
        pipeline.run(config, until=until)
        print(f"{until} is done: {folder}", flush=True)


def _print_plan(config: Any) -> None:
    from .stages.plan import costs, plan

    planned = plan(config)
    money = costs(planned, config.cluster.device_price)
    device = "GPU" if config.cluster.use_gpu else "CPU core"
    table = Table()
    table.add_column("stage")
    for heading in ("state", f"{device}s", f"{device}-hours", *(["money"] if money else [])):
        table.add_column(heading, justify="right")
    for step in planned.steps:
        state, about = ("done", "") if step.done else ("to do", "about ")
        price = [_money(money.get(step.stage, 0.0))] if money else []
        hours = f"{about}{step.device_hours:.3g}"
        table.add_row(step.stage, state, str(step.devices), hours, *price)
    total = [_money(sum(money.values()))] if money else []
    table.add_row("still to do", "", "", f"about {planned.left:.3g}", *total)
    print(f"not started: {planned.run}")
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
    print(f"estimated from {planned.basis}; without starting processes and reading data")


def _money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.2g}"


def run_script(until: str | None = None) -> None:
    """The body of the scripts in pipelines/: `RECIPE [key=value ...]` from the command line.

    Args:
        until: the last stage to run ("baseline", "supernet" or "explore"); what comes before it
            and is missing is made too. None: the whole pipeline.
    """
    with one_line_errors():
        arguments = sys.argv[1:]
        if not arguments or arguments[0] in ("-h", "--help"):
            print(f"usage: {sys.argv[0]} RECIPE [key=value ...]", file=sys.stderr)
            raise SystemExit(0 if arguments else 2)
        run_recipe(arguments[0], arguments[1:], until=until)


def print_summary(summary: Mapping[str, Any], report_uri: str) -> None:
    """The table that a run ends with, on standard output."""
    table = Table(title=f"{summary['run_id']}, {_cell(summary.get('seconds'), ',.0f')} s")
    table.add_column("network")
    for heading in ("top-1 %", "of dense %", "of main %", "MACs", "params", "latency ms"):
        table.add_column(heading, justify="right")
    budgets = summary["budgets"]
    dense_latency = next((b.get("dense_latency_ms") for b in budgets.values()), None)
    full = (_cell(summary["macs"], ","), _cell(summary["params"], ","), _cell(dense_latency, ".2f"))
    table.add_row("dense", _cell(summary.get("dense_top1"), ".2f"), "-", "-", *full)
    table.add_row("main", _cell(summary["main_top1"], ".2f"), "-", "-", *full)
    for label, budget in budgets.items():
        table.add_row(
            f"pruned {label}",
            _cell(budget["top1"], ".2f"),
            _cell(budget.get("retention_dense"), ".2f"),
            _cell(budget.get("retention_main"), ".2f"),
            f"{budget['macs']:,} ({100 * budget['macs'] / summary['macs']:.1f} %)",
            _cell(budget["params"], ","),
            _cell(budget.get("latency_ms"), ".2f"),
        )
        if budget.get("control_top1") is not None:
            table.add_row(f"same shape from scratch {label}", f"{budget['control_top1']:.2f}")
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 120, highlight=False)
    console.print(table)
    for label, budget in budgets.items():
        if met := budget.get("measured"):
            print(
                f"{label}: {met['latency_ms']:.3g} ms measured of at most {met['limit_ms']:.3g} ms "
                f"({met['where']})"
            )
    print(f"report: {report_uri}", flush=True)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _see_current_folder() -> None:
    """Let "package.module:function" name a module in the current folder, as python -m does."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _folder(uri: str) -> Any:
    """A run's folder; `runs/latest` stands for the one that it links to."""
    from .artifacts import Store

    store = Store(uri)
    return store if store.local_path is None else Store(store.local_path.resolve())


def _run_store(uri: str, wanted: str = "summary.json") -> Any:
    """A run's folder, which holds a file that every run leaves, or every finished one."""
    from .errors import StorageError

    store = _folder(uri)
    if not store.exists(wanted):
        finished = "finished " if wanted == "summary.json" else ""
        raise StorageError(
            f"{store.uri} has no {wanted}; expected the folder of a {finished}run, "
            "<storage>/<run id>"
        )
    return store


# -- inspect ----------------------------------------------------------------------------


def _inspection(
    name: str,
    image_size: int | None,
    num_classes: int | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    import torch

    from .elastic import Supernet
    from .method.modes import inspecting
    from .models import OWN, build_model

    _see_current_folder()
    size = image_size or (32 if name in OWN else 224)
    classes = num_classes or (10 if name in OWN else 1000)
    model = build_model(name, num_classes=classes, image_size=size)
    given = {name: value for name, value in options.items() if value is not None}
    example = torch.zeros(1, 3, size, size)
    net = Supernet.trace(model, example, **given)
    with inspecting(net):
        logits = net(example)
    if isinstance(logits, torch.Tensor) and logits.dim() == 2:  # a factory may take no number
        classes = logits.shape[1]
    full, least = net.cost(), net.cost(net.space.smallest)
    return {
        "model": name,
        "image_size": size,
        "num_classes": classes,
        "cost": {"macs": full.macs, "params": full.params},
        "smallest": {"macs": least.macs, "params": least.params},
        "elastic_share": net.space.elastic_share,
        "axes": [dataclasses.asdict(axis) for axis in net.space.axes],
        "blocks": [dataclasses.asdict(block) for block in net.space.blocks],
        "frozen": [dataclasses.asdict(frozen) for frozen in net.frozen],
    }


def _print_inspection(content: Mapping[str, Any]) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    full, least = content["cost"], content["smallest"]
    size = content["image_size"]
    console.print(f"{content['model']}, {size} x {size} px, {content['num_classes']} classes")
    console.print(
        f"cost of the full network: {full['macs']:,} MACs, {full['params']:,} params; of the "
        f"smallest subnet: {least['macs']:,} MACs "
        f"({100 * least['macs'] / max(1, full['macs']):.2f} %), "
        f"{least['params']:,} params"
    )
    console.print(f"elastic: {100 * content['elastic_share']:.1f} % of the MACs")
    console.print(f"\naxes: {len(content['axes'])}")
    for axis in content["axes"]:
        choices = axis["choices"]
        tied = f", {len(axis['layers'])} layers" if len(axis["layers"]) > 1 else ""
        console.print(
            f"  {axis['name']}: {choices[0]} to {axis['size']} {axis['unit']} in "
            f"{len(choices)} widths{tied}"
        )
    console.print(f"\nblocks that can be dropped: {len(content['blocks'])}")
    for block in content["blocks"]:
        console.print(f"  {block['name']}: {len(block['layers'])} layers")
    console.print(f"\nfrozen: {len(content['frozen'])}")
    for frozen in content["frozen"]:
        console.print(f"  {frozen['name']} ({frozen['size']}): {frozen['reason']}")


# -- data -------------------------------------------------------------------------------


def _data_options(source: str, root: str | None, image_size: int | None) -> Any:
    from .config import load_config

    content: dict[str, Any]
    if "://" in source or os.sep in source or os.path.isdir(source):
        if root is not None:
            raise ConfigError(
                f"--root is {root} beside the folder {source}; expected it with the name of a data "
                "set; leave out one of them"
            )
        content = {"name": "parquet", "uri": source}
    else:
        content = {"name": source, "uri": root}
    if content["name"] != "parquet":
        content["loading"] = "resident"  # it cannot stream, and a description needs no memory
    # the least: what is held out is a recipe's business, and may be more than a small set has
    return load_config({"data": {**content, "holdout": 1, "image_size": image_size}}).data
