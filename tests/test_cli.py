import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

import stp_ray.stages
from stp_ray.artifacts import Store
from stp_ray.cli import app, one_line_errors, print_summary
from stp_ray.config import dump_config, load_config, run_id
from stp_ray.errors import DataError, RunError, StpError

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).resolve().parent.parent

SUMMARY = {
    "run_id": "demo-0123456789",
    "storage": "file:///runs",
    "dense_top1": 98.0,
    "main_top1": 97.5,
    "macs": 2_000_000,
    "params": 272_474,
    "budgets": {
        "0.15": {
            "top1": 96.04,
            "retention_dense": 98.0,
            "retention_main": 98.503,
            "macs": 299_000,
            "params": 40_000,
            "latency_ms": 0.512,
            "dense_latency_ms": 1.25,
            "subnet_id": "0123456789ab",
            "uri": "file:///runs/budget-0.15",
        }
    },
    "seconds": 251.3,
}


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that does what the test says; it remembers its configurations."""
    module = ModuleType("stp_ray.stages.pipeline")
    module.configs = []
    module.error = None

    def run(config, until=None):
        module.configs.append(config)
        module.until = until
        if module.error is not None:
            raise module.error
        return SUMMARY

    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(stp_ray.stages, "pipeline", module, raising=False)
    return module


def stp(*arguments):
    return CliRunner().invoke(app, list(arguments), prog_name="stp")


def refused(result, code=2):
    """The one line of a refusal."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def script(name, *arguments, code=None, **kwargs):
    """Run a script of pipelines/, or `code`, in a process of its own."""
    command = [sys.executable, "-c", code] if code else [sys.executable, f"pipelines/{name}.py"]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["foo"], "No such command 'foo'; see `stp --help`"),
        (["run", "--foo"], "No such option: --foo; see `stp run --help`"),
        (["inspect"], "; see `stp inspect --help`"),
        (["data", "describe", "digits", "--image-size", "0"], "; see `stp data describe --help`"),
    ],
)
def test_a_command_that_is_not_understood_is_told_in_one_line(arguments, told):
    assert refused(stp(*arguments)).endswith(told)


# -- run ------------------------------------------------------------------------------


def test_run_ends_with_a_table_and_the_report(pipeline, tmp_path):
    result = stp("run", "demo", f"storage={tmp_path}", "seed=3")
    assert result.exit_code == 0, result.output
    (config,) = pipeline.configs
    assert (config.name, config.seed) == ("demo", 3)
    for text in ("dense", "main", "pruned 0.15", "96.04", "98.50", "299,000 (14.9 %)", "1.25"):
        assert text in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"report: file://{tmp_path}/demo-")
    assert result.stdout.splitlines()[-1].endswith("/report.html")


def test_the_table_leaves_out_what_was_not_measured(capsys):
    budget = {**SUMMARY["budgets"]["0.15"], "retention_dense": None, "latency_ms": None}
    print_summary(
        {**SUMMARY, "dense_top1": None, "seconds": None, "budgets": {"0.15": budget}}, "x"
    )
    row = next(line for line in capsys.readouterr().out.splitlines() if "dense" in line)
    assert row
    assert "None" not in row


def test_the_table_shows_the_control_where_there_is_one(capsys):
    budget = {**SUMMARY["budgets"]["0.15"], "control_top1": 94.5}
    print_summary({**SUMMARY, "budgets": {"0.15": budget}}, "x")
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "from scratch" in line)
    assert "94.50" in row


def test_the_table_is_followed_by_what_a_latency_budget_takes(capsys):
    met = {"latency_ms": 1.234, "limit_ms": 1.25, "where": "1 CPU thread, PyTorch"}
    budget = {**SUMMARY["budgets"]["0.15"], "measured": met}
    print_summary({**SUMMARY, "budgets": {"latency-0.5": budget}}, "x")
    assert "latency-0.5: 1.23 ms measured of at most 1.25 ms (1 CPU" in capsys.readouterr().out


def test_print_config_prints_a_recipe_and_runs_nothing(pipeline):
    result = stp("run", "demo", "seed=3", "--print-config")
    assert result.exit_code == 0
    assert yaml.safe_load(result.stdout)["seed"] == 3
    result = stp("run", "--print-config", "seed=4")
    assert yaml.safe_load(result.stdout)["seed"] == 4
    assert yaml.safe_load(stp("run", "--print-config").stdout)["name"] == "run"
    assert pipeline.configs == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo", "sed=1"], "did you mean seed?"),
        (["demo", "seed=x"], "expected an integer"),
        (["demmo"], "did you mean demo?"),
        ([], "no recipe was named"),
        (["seed=1"], "no recipe was named"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(pipeline, arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused(stp("run", *arguments))
    assert pipeline.configs == []
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_run_is_exit_code_1(pipeline):
    pipeline.error = RunError("the loss is nan\nat step 3")
    assert refused(stp("run", "demo"), code=1) == "error: the loss is nan at step 3"


def test_an_interrupted_run_says_that_it_goes_on(pipeline):
    pipeline.error = KeyboardInterrupt()
    result = stp("run", "demo")
    assert result.exit_code == 128 + signal.SIGINT
    assert "the same command goes on" in result.stderr


def test_a_defect_keeps_its_traceback(pipeline):
    pipeline.error = ZeroDivisionError()
    assert isinstance(stp("run", "demo").exception, ZeroDivisionError)


def test_the_cause_of_a_remote_error_is_told(capsys):
    class Wrapped(StpError):
        cause = DataError("no images")

    with pytest.raises(SystemExit) as left, one_line_errors():
        raise Wrapped("a remote traceback\nof many lines")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: no images\n"


# -- the others -----------------------------------------------------------------------


def test_inspect_shows_axes_blocks_frozen_and_cost():
    text = stp("inspect", "resnet20").stdout
    for told in ("40,813,184 MACs", "axes: 12", "layer1.0.conv1: 2 to 16 channels", "frozen:"):
        assert told in text
    content = json.loads(stp("inspect", "resnet20", "--json", "--image-size", "16").stdout)
    assert content["cost"] == {"macs": 10_203_776, "params": 272_474}
    assert content["image_size"] == 16
    assert len(content["axes"]) == 12
    assert {"name", "size", "choices"} <= content["axes"][0].keys()
    assert len(content["blocks"]) == 7
    assert content["smallest"]["macs"] < content["cost"]["macs"]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            "resnet50",
            ["smallest subnet: 36,081,664 MACs (0.88 %)", "elastic: 100.0 % of the MACs",
             "axes: 37", "conv1: 8 to 64 channels in 8 widths", "layer1.0.conv3: 32 to 256 "
             "channels in 29 widths, 4 layers", "dropped: 12", "layer4.2: 7 layers", "frozen: 0"],
        ),
        (
            "vit_b_16",
            ["encoder_layer_0.self_attention: 2 to 12 heads in 11 widths", "dropped: 24",
             "encoder_layer_0.mlp: 6 layers"],
        ),
        (
            "shufflenet_v2_x1_0",
            ["elastic: 96.1 % of the MACs", "dropped: 0", "frozen: 19", "stage2.0.branch2.5 (58): "
             "reshape that mixes several elastic dimensions: view_1 at shufflenetv2.py:"],
        ),
    ],
)  # fmt: skip
def test_inspect_tells_what_can_be_pruned_and_what_cannot(model, told):
    text = stp("inspect", model).stdout
    for words in told:
        assert words in text
    content = json.loads(stp("inspect", model, "--json").stdout)
    assert content.keys() == {
        "model", "image_size", "num_classes", "cost", "smallest", "elastic_share", "axes", "blocks",
        "frozen",
    }  # fmt: skip
    assert all({"name", "size", "unit", "choices", "layers"} <= a.keys() for a in content["axes"])
    assert all({"name", "size", "reason"} == frozen.keys() for frozen in content["frozen"])


def test_inspect_finds_a_model_of_ones_own_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "own_model_for_inspect.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(32, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = "own_model_for_inspect:build"
    result = stp("inspect", name, "--image-size", "8", "--num-classes", "3", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["cost"]["params"] == 32 * 28 + 33 * 3
    assert [axis["size"] for axis in content["axes"]] == [32]


def test_inspect_counts_the_classes_of_the_model_itself(tmp_path, monkeypatch):
    (tmp_path / "three_classes_for_inspect.py").write_text(
        "from torch import nn\n"
        "class Both(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body = build()\n"
        "    def forward(self, x):\n"
        "        return self.body(x), x\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))\n"
        "def both():\n"
        "    return Both()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sizes = ("--image-size", "8", "--num-classes", "5")
    result = stp("inspect", "three_classes_for_inspect:build", *sizes, "--json")
    assert json.loads(result.stdout)["num_classes"] == 3
    # one that has no logits is looked at nevertheless
    result = stp("inspect", "three_classes_for_inspect:both", *sizes)
    assert result.exit_code == 0, result.output


def test_inspect_refuses_an_unknown_model():
    assert "did you mean 'resnet20'?" in refused(stp("inspect", "resnet2"))


def test_data_describe_shows_classes_and_sizes():
    text = stp("data", "describe", "digits").stdout
    assert "class_names: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in text
    content = json.loads(stp("data", "describe", "digits", "--json").stdout)
    assert content["image_size"] == 8
    assert content["train_rows"] + content["test_rows"] == 1797


def test_data_describe_needs_no_square_images_and_no_memory(tmp_path):
    from PIL import Image

    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 6)).save(tmp_path / "photos" / place / f"{number}.png")
    named = ["data", "describe", "ImageFolder", "--root", str(tmp_path / "photos")]
    assert "set data.image_size" in refused(stp(*named))
    found = json.loads(stp(*named, "--image-size", "20000", "--json").stdout)
    assert found["image_size"] == 20000 and not found["streams"]
    target = str(tmp_path / "set")
    assert stp("data", "convert", str(tmp_path / "photos"), target).exit_code == 0
    for size, streams in ((8, False), (20000, True)):
        done = stp("data", "describe", target, "--image-size", str(size), "--json")
        found = json.loads(done.stdout)
        assert (found["image_size"], found["streams"]) == (size, streams)


@pytest.mark.parametrize("source", ["dogits", "./absent", "file:///absent/folder"])
def test_data_describe_refuses_what_is_not_there(source):
    refused(stp("data", "describe", source))


@pytest.mark.parametrize("command", [["report"], ["export"], ["export", "--to", "pt2"]])
def test_commands_on_a_folder_that_is_no_run(tmp_path, command):
    name, *options = command
    assert str(tmp_path) in refused(stp(name, str(tmp_path), *options))
    assert list(tmp_path.iterdir()) == []


def test_report_is_written_from_the_artifacts(tmp_path, monkeypatch):
    import stp_ray.report
    from stp_ray.artifacts import Store

    Store(tmp_path).write_json("summary.json", SUMMARY)
    seen = []
    monkeypatch.setattr(
        stp_ray.report, "write_report", lambda store: seen.append(store) or "the page"
    )
    assert stp("report", str(tmp_path)).stdout == "the page\n"
    assert seen == [Store(tmp_path)]
    monkeypatch.undo()
    for content in ([], {}):
        Store(tmp_path).write_json("summary.json", content)
        assert "holds no summary" in refused(stp("report", str(tmp_path)))


@pytest.mark.parametrize("own", [False, True])
def test_export_writes_a_program_beside_the_weights(tmp_path, own):
    import random

    import torch

    from stp_ray.artifacts import Store
    from stp_ray.elastic import Supernet
    from stp_ray.export import save_model
    from stp_ray.models import resnet20

    name = "stp_ray.models:resnet20" if own else "resnet20"
    net = Supernet.trace(resnet20(), torch.zeros(1, 3, 8, 8)).eval()
    subnet = net.space.sample(random.Random(0))
    description = {
        "model": {"name": name, "kwargs": {}},
        "num_classes": 10,
        "image_size": 8,
        "space": {"divisor": None, "min_ratio": 0.125},
        "subnet": subnet.to_json(),
    }
    save_model(Store(tmp_path), net.extract(subnet), description)
    if own:
        assert "import path read from storage" in refused(stp("export", str(tmp_path)))
        options = ["--factory", name]
    else:
        options = []
    result = stp("export", str(tmp_path), "--to", "pt2", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"file://{tmp_path}/model.pt2"
    assert (tmp_path / "model.pt2").stat().st_size > 0
    assert "ms an image" in result.stderr
    written = (tmp_path / "model.pt2").read_bytes()
    again = stp("export", str(tmp_path), "--to", "pt2", *options)
    assert again.stdout == result.stdout and "there already" in again.stderr
    assert (tmp_path / "model.pt2").read_bytes() == written


def test_data_convert_makes_what_a_recipe_reads(tmp_path):
    from PIL import Image

    for place in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / place / f"{number}.jpg")
    target = str(tmp_path / "set")
    result = stp("data", "convert", str(tmp_path / "photos"), target)
    assert (result.stdout, result.stderr) == (f"{target}: 6 train, 6 test\n", "")
    described = json.loads(stp("data", "describe", target, "--json").stdout)
    assert (described["train_rows"], described["test_rows"]) == (6, 6)
    assert "holds files already" in refused(stp("data", "convert", f"{tmp_path}/photos", target))
    assert "leave out one" in refused(stp("data", "describe", target, "--root", str(tmp_path)))
    assert "or --root" in refused(stp("data", "describe", "CIFAR10"))
    assert "none found" in refused(stp("data", "convert", target, f"{tmp_path}/other"))
    assert "cannot be loaded" in refused(stp("data", "convert", "--hub", "/absent", target))


def test_an_interrupted_conversion_does_not_say_that_it_goes_on(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("stp_ray.data.folder_to_parquet", interrupted)
    result = stp("data", "convert", str(tmp_path), str(tmp_path / "set"))
    assert result.exit_code == 128 + signal.SIGINT
    assert "is deleted; the same command begins anew\n" in result.stderr


def test_wandb_sync_says_what_to_upload(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run = tmp_path / "demo-1"
    run.mkdir()
    (tmp_path / "latest").symlink_to("demo-1")
    assert "no config.json" in refused(stp("wandb-sync", str(run)))
    (run / "config.json").write_text("{}")
    assert stp("wandb-sync", str(run)).stdout.startswith("nothing to upload")
    for stage in ("supernet", "explore"):
        (run / "wandb" / f"offline-run-20260101_000000-demo-1-{stage}").mkdir(parents=True)
    (run / "wandb" / "offline-run-20260101_000000-other").mkdir()
    sent = run / "wandb" / "offline-run-20260101_000000-demo-1-report"
    sent.mkdir()
    (sent / "run-demo-1-report.wandb.synced").touch()
    first, second = stp("wandb-sync", str(tmp_path / "latest")).stdout.splitlines()
    assert first.startswith("2 stages of demo-1")
    assert second.split()[:2] == ["wandb", "sync"] and second.endswith("offline-run-*-demo-1-*")


def test_wandb_sync_finds_the_runs_of_a_long_name(tmp_path, monkeypatch):
    from stp_ray.artifacts import Store
    from stp_ray.tracking.wandb_files import WandbTracker

    monkeypatch.delenv("WANDB_DIR", raising=False)
    run = Store(tmp_path / "runs ü" / ("narrowing-" * 8 + "0123456789"))
    run.write_json("config.json", {})
    tracker = WandbTracker("trial", run.local_path.name, run.local_path)
    tracker.start("supernet", {})
    tracker.finish()
    first, second = stp("wandb-sync", str(run.local_path)).stdout.splitlines()
    assert first.startswith("1 stages of narrowing-")
    found = subprocess.run(  # as a shell takes it
        ["sh", "-c", second.replace("wandb sync", "ls -d")], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert found.returncode == 0 and str(run.local_path) in found.stdout


def test_a_terminal_shows_progress_and_a_log_does_not(capsys, monkeypatch):
    from stp_ray.cli import _progress

    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        with _progress("converting") as told:
            told(5, 10)
        assert ("converting" in capsys.readouterr().err) == terminal


# -- plans ----------------------------------------------------------------------------


def test_dry_run_shows_stages_and_costs_and_leaves_nothing(tmp_path):
    arguments = ("run", "demo", "--dry-run", f"storage={tmp_path}/runs")
    result = stp(*arguments, "cluster.device_price=1000")
    assert result.exit_code == 0, result.output
    for told in ("baseline", "explore", "finalize/0.15", "to do", "money", "core-hours"):
        assert told in result.stdout
    assert "money" not in stp(*arguments).stdout
    assert list(tmp_path.iterdir()) == []
    assert "did you mean" in refused(stp("run", "demmo", "--dry-run"))


def test_a_plan_follows_the_work_and_what_is_done(tmp_path, monkeypatch):
    from stp_ray.artifacts import Manifest, Store
    from stp_ray.config import load_config, run_id
    from stp_ray.stages import plan as planning

    monkeypatch.setattr(planning, "_speed", lambda *_: (1e-9, "a test"))

    def steps(*overrides):
        config = load_config("demo", [f"storage={tmp_path}", *overrides])
        return {step.stage: step for step in planning.plan(config).steps}, config

    first, config = steps()
    assert list(first) == ["baseline", "supernet", "explore", "finalize/0.5", "finalize/0.15"]
    assert first["supernet"].devices == 2 and first["finalize/0.5"].devices == 1
    # 24 epochs of 1,245 images at three passes of 2.55 million MACs
    expected = 24 * 1245 * 3 * 2_551_424 * 1e-9 / 3600
    assert first["baseline"].device_hours == pytest.approx(expected)
    assert first["finalize/0.5"].device_hours > first["finalize/0.15"].device_hours
    twice, _ = steps("supernet.optimisation.epochs=24")
    ratio = twice["supernet"].device_hours / first["supernet"].device_hours
    assert ratio == pytest.approx(2)
    more, _ = steps("supernet.stimulation.subnets=3")
    assert more["supernet"].device_hours > first["supernet"].device_hours
    taught, _ = steps("teacher_weight=0.5")
    assert taught["baseline"].device_hours == first["baseline"].device_hours
    # 12 epochs of the teacher's forward passes, a sixth of the baseline's 24 with theirs and back
    more_h = taught["supernet"].device_hours - first["supernet"].device_hours
    assert more_h == pytest.approx(expected / 6)
    at_first, _ = steps("teacher_weight=0.5", "finalize.taught=false")
    assert at_first["supernet"] == taught["supernet"]
    assert at_first["finalize/0.5"] == first["finalize/0.5"]
    none, some, more = (steps(f"explore.finalists={n}")[0]["explore"] for n in (0, 2, 4))
    assert some == first["explore"]
    finals = some.device_hours - none.device_hours
    assert more.device_hours - some.device_hours == pytest.approx(finals) and finals > 0
    longer, _ = steps("explore.final_steps=80")  # of two finalists of each of two budgets
    tuned, _ = steps("explore.tuning_steps=20")  # of a quarter of five times 24
    ratio = (longer["explore"].device_hours - some.device_hours) / (
        tuned["explore"].device_hours - some.device_hours
    )
    assert ratio == pytest.approx(2 * 2 * 40 / (30 * 10))
    control, _ = steps("finalize.control=true")
    assert control["finalize/0.5"].device_hours > first["finalize/0.5"].device_hours

    store = Store(tmp_path).child(run_id(config))
    output = {"baseline/model.safetensors": store.write_bytes("baseline/model.safetensors", b"")}
    Manifest(store).finish(
        "baseline", inputs={}, outputs=output, seconds=1, device_seconds=7200, metrics={}
    )
    done, _ = steps()
    assert done["baseline"].done and done["baseline"].device_hours == 2
    planned = planning.plan(config)
    assert planned.left == pytest.approx(sum(s.device_hours for s in done.values()) - 2)
    assert planning.costs(planned, 3)["explore"] == pytest.approx(3 * done["explore"].device_hours)
    assert "baseline" not in planning.costs(planned, 3)


def test_a_dry_run_refuses_what_the_run_would(tmp_path, monkeypatch):
    """That it was begun with other images; and does not measure on cores that are not there."""
    from stp_ray.artifacts import Store
    from stp_ray.config import load_config, run_id
    from stp_ray.stages.inputs import INPUTS

    monkeypatch.setattr("os.cpu_count", lambda: 2)
    overrides = [f"storage={tmp_path}", "cluster.threads_per_worker=64"]
    run = Store(tmp_path).child(run_id(load_config("demo", overrides)))
    assert "on 2 of this machine's cores" in stp("run", "demo", "--dry-run", *overrides).stdout
    run.write_json(INPUTS, {"data": "others", "weights": None})
    assert "begun with other images" in refused(stp("run", "demo", "--dry-run", *overrides))


def test_a_plan_for_gpus_that_are_not_here_says_what_it_assumes(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = stp("run", "demo", "--dry-run", f"storage={tmp_path}", "cluster.use_gpu=true")
    assert "20 TFLOP/s assumed" in result.stdout and "GPU-hours" in result.stdout


# -- manners --------------------------------------------------------------------------


def test_help_teaches_commands_that_exist():
    text = stp("--help").stdout
    named = set(re.findall(r"stp ((?:data )?[\w-]+)", text))
    assert named >= {"inspect", "data convert", "run", "report", "export"}
    for command in named - {"demo"}:
        assert stp(*command.split(), "--help").exit_code == 0, command


def test_a_shell_completes_commands_and_recipes():
    def completed(line):
        environment = {
            **os.environ,
            "_STP_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
            "PYTHONPATH": str(ROOT),
        }
        code = "from stp_ray.cli import main; main()"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.stdout.split()

    assert "inspect" in completed("stp ins")
    assert completed("stp run imagenet_r") == ["imagenet_resnet50"]


def test_the_command_line_itself_imports_nothing_heavy():
    heavy = "{'torch', 'ray', 'wandb', 'pydantic', 'pyarrow', 'fsspec'}"
    code = f"import sys, stp_ray.cli; sys.exit(str(sorted({heavy} & set(sys.modules))))"
    assert script(None, code=code).stderr.strip() == "[]"


# -- scripts --------------------------------------------------------------------------


@pytest.mark.parametrize("until", [None, "supernet", "explore"])
def test_scripts_run_as_far_as_they_say(pipeline, until, monkeypatch, capsys, tmp_path):
    path = ROOT / "pipelines" / f"{until or 'full_stp'}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "demo", f"storage={tmp_path}"])
    runpy.run_path(str(path), run_name="__main__")
    assert pipeline.until == until
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{until} is done: file://{tmp_path}/demo-" if until else "report: ")


def test_a_script_without_a_recipe_shows_its_usage():
    done = script("full_stp")
    assert done.returncode == 2
    assert done.stderr == "usage: pipelines/full_stp.py RECIPE [key=value ...]\n"


@pytest.mark.parametrize("name", ["full_stp", "supernet", "explore", "finalize"])
def test_scripts_refuse_bad_input_like_the_command(name):
    done = script(name, "demo", "sed=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown key sed; did you mean seed?\n"


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that was begun."""
    config = load_config({"name": "trial", "storage": str(tmp_path)})
    run = Store(tmp_path / run_id(config))
    run.write_json("config.json", dump_config(config))
    return tmp_path / run_id(config)


def test_status_shows_every_stage(begun):
    (begun.parent / "latest").symlink_to(begun.name)
    shown = CliRunner().invoke(app, ["status", str(begun.parent / "latest")])
    assert shown.exit_code == 0, shown.output
    assert f"{begun.name}: stopped" in shown.output
    for stage in ("supernet", "explore", "finalize/", "report"):
        assert stage in shown.output
    told = CliRunner().invoke(app, ["status", str(begun), "--json"])
    assert json.loads(told.output)["stages"][0]["name"] == "supernet"


def test_resume_goes_on_with_the_settings_of_the_folder(begun, pipeline):
    done = CliRunner().invoke(app, ["resume", str(begun)])
    assert done.exit_code == 0, done.output
    (config,) = pipeline.configs
    assert run_id(config) == begun.name
    assert Store(config.storage).uri == Store(begun.parent).uri


def test_resume_takes_another_cluster(begun, pipeline):
    command = ["resume", str(begun), "cluster.address=auto", "cluster.schedule_timeout_s=1800"]
    assert CliRunner().invoke(app, command).exit_code == 0
    (config,) = pipeline.configs
    assert (config.cluster.address, config.cluster.schedule_timeout_s) == ("auto", 1800)
    assert "seed=7" in refused(CliRunner().invoke(app, ["resume", str(begun), "seed=7"]))


@pytest.mark.parametrize("uri", ["images", "file://images"])
def test_resume_elsewhere_than_where_relative_data_lies_says_so(
    tmp_path, pipeline, monkeypatch, uri
):
    data = {"name": "ImageFolder", "uri": uri}
    config = load_config({"name": "trial", "storage": str(tmp_path), "data": data})
    run = Store(tmp_path / run_id(config))
    run.write_json("config.json", dump_config(config))
    (tmp_path / "there" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    told = refused(CliRunner().invoke(app, ["resume", run.uri]))
    assert "data.uri" in told and "go to the folder that it is relative to" in told
    monkeypatch.chdir(tmp_path / "there")
    assert CliRunner().invoke(app, ["resume", run.uri]).exit_code == 0
