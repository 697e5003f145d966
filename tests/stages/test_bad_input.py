"""A user's mistake is one line and exit code 2, before anything is written; a run that has to stop
says so and keeps what it has."""

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stp_ray.cli import one_line_errors, run_recipe
from stp_ray.config import load_config
from stp_ray.errors import ClusterError, StorageError
from stp_ray.stages import cluster, pipeline
from stp_ray.stages.images import share
from stp_ray.stages.jobs import Job, Place, train
from tests.stages.runs import Process, in_process, minimal, stp, tiny, write_recipe


class Untraceable(torch.nn.Module):
    """Control flow that depends on the values of a tensor."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.head = torch.nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        if x.sum() > 0:
            x = -x
        return self.head(x)


def untraceable(num_classes):
    return Untraceable(num_classes)


def three_classes():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 3)
    )


def told(capsys, recipe, *overrides):
    """What is printed, and the exit code."""
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        run_recipe(str(recipe), list(overrides))
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in err
    return errors[0], stopped.value.code


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("supernet.optimisation.epoch=3", ["supernet.optimisation.epoch", "epochs"]),
        ("seed=many", ["seed", "many"]),
        ("budgets=[0.0001]", ["no subnet keeps the budget", "cheapest", "MACs"]),
        ("data={name: parquet, uri: nowhere}", ["nowhere"]),
        ("data={name: parquet, uri: empty}", ["empty"]),
        ("storage=s3://bucket-that-nobody-has/x", ["s3://bucket-that-nobody-has/x"]),
        ("storage=file-in-the-way/runs", ["file-in-the-way"]),
        ("model.name=mobilnet_v2", ["unknown model", "mobilenet_v2"]),
        (f"model.name='{__name__}:three_classes'", ["3 logits", "10 classes", "let the function"]),
        (f"model.name='{__name__}:untraceable'", ["test_bad_input.py", "if x.sum() > 0"]),
        ("space={ignore: [layer9]}", ["space.ignore", "layer9", "matches no layer"]),
        ("supernet.optimisation.batch_size=4096", ["4096", "batch_size"]),
        ("cluster={in_process: false, num_workers: 64}", ["64 workers", "64 CPU", "num_workers"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    override, parts, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "RAY_AUTH_MODE": "disabled",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file-in-the-way").write_text("")
    recipe = write_recipe(tmp_path, minimal())
    batch = [] if "batch_size" in override else ["supernet.optimisation.batch_size=64"]
    line, code = told(capsys, recipe, f"storage={tmp_path}/runs", *batch, override)
    assert code == 2
    for part in parts:
        assert part in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(120)
def test_a_joined_cluster_that_never_can_is_waited_for_and_then_named(monkeypatch):
    """The wait is bounded, and ends in what the cluster has and what was asked."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = load_config(tiny(cluster={"num_workers": 1, "schedule_timeout_s": 2.0}))
    with cluster.connected(config.cluster):
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        with pytest.raises(ClusterError, match=r"after 2 s; 64 workers need 64 CPU"):
            cluster.require_resources(config.cluster, 64)


def dataset(folder, rows, corrupt):
    """Bright and dark images as JPEG, some of them unreadable."""
    rng = np.random.default_rng(0)
    for split, count in (("train", rows), ("test", 40)):
        images, labels = [], []
        for index in range(count):
            label = index % 2
            pixels = rng.integers(0, 100, (8, 8, 3)).astype(np.uint8) + np.uint8(150 * label)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            broken = split == "train" and index < corrupt
            images.append({"bytes": b"no image" if broken else buffer.getvalue(), "path": ""})
            labels.append(label)
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels, pa.int64())})
        pq.write_table(table, folder / f"{split}.parquet")
    return str(folder)


def test_corrupt_images_are_skipped_up_to_the_stated_share(tmp_path, capsys, caplog):
    uri = dataset(tmp_path, rows=200, corrupt=4)
    data = {"name": "parquet", "uri": uri, "limit": None, "holdout": 32, "max_corrupt": 0.05}
    recipe = write_recipe(tmp_path, minimal(data=data, storage=str(tmp_path / "runs")))
    run_recipe(str(recipe), [])
    (summary,) = (tmp_path / "runs").glob("tiny-*/summary.json")
    assert json.loads(summary.read_text())["budgets"]["0.5"]["top1"] > 0
    assert any("4" in r.getMessage() and "200" in r.getMessage() for r in caplog.records)
    line, _ = told(capsys, recipe, "data.max_corrupt=0.01")
    assert "4" in line and "max_corrupt" in line


def test_an_epoch_has_the_steps_that_the_readable_images_fill(tmp_path):
    uri = dataset(tmp_path, rows=194, corrupt=4)  # 162 to train on, 5 batches; less 4 it is 4
    data = {"name": "parquet", "uri": uri, "limit": None, "holdout": 32, "max_corrupt": 0.05}
    config = load_config(minimal(data=data, storage=str(tmp_path / "runs")))
    pipeline.run(config, until="supernet")
    (run,) = (tmp_path / "runs").glob("tiny-*")
    assert pq.read_table(run / "supernet/metrics.parquet").column("step").to_pylist() == [4]
    events = map(json.loads, (run / "logs/supernet.jsonl").read_text().splitlines())
    (start,) = (event for event in events if event["event"] == "start")
    assert start["config"]["total_steps"] == 4


def test_a_loss_that_is_not_finite_stops_the_stage_and_keeps_the_last_checkpoint(tmp_path, capsys):
    recipe = write_recipe(tmp_path, in_process(storage=str(tmp_path / "runs"), budgets=[0.5]))
    line, code = told(
        capsys,
        recipe,
        "supernet.optimisation.lr=1e12",
        "supernet.optimisation.warmup_epochs=0",
        "supernet.optimisation.checkpoint_every=1",
    )
    assert code == 1 and "not finite" in line and "checkpoint" in line
    (run,) = (tmp_path / "runs").iterdir()
    assert not (run / "supernet" / "result.json").exists()
    for state in run.glob("supernet/checkpoint-*/complete.json"):
        assert json.loads(state.read_text())["step"] >= 1


def test_a_worker_that_does_not_see_the_storage_says_so(tmp_path):
    config = load_config(minimal(storage=str(tmp_path / "runs")))
    summary, _ = pipeline.preflight(config)
    job = Job(
        stage="supernet", kind="supernet", folder="supernet",
        run_uri=(tmp_path / "elsewhere").as_uri(), config=config,
        options=config.supernet.optimisation,
    )  # fmt: skip
    images = share(config.data, summary, in_process=True)
    with pytest.raises(StorageError, match=r"does not see .*shared folder or object storage"):
        train(job, images, Place(), lambda step, metrics: None)


@pytest.mark.timeout(60)
def test_the_command_itself_exits_with_2(tmp_path, start):
    recipe = write_recipe(tmp_path, minimal())
    command: Process = start(stp("run", str(recipe), "sed=1"), tmp_path / "log", cwd=tmp_path)
    assert command.wait(50) == 2
    assert command.output.strip().startswith("error: ") and "seed" in command.output
    assert command.output.strip().count(os.linesep) == 0
