"""`ray job submit` of pipelines/full_stp.py to a head that the test starts; how workers begin."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import pytest
import torch
from torch import distributed

from stp_ray.stages.jobs import Place
from tests.stages.runs import (
    ROOT,
    WEIGHTS,
    Process,
    environment,
    minimal,
    stp,
    tiny,
    wait_for,
    write_recipe,
)

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")


def variables():
    """As in an activated environment: a job's `python` is the one that has the package."""
    return environment(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@dataclass(frozen=True)
class Head:
    """A Ray head: where drivers join it, and where jobs are given to it."""

    address: str
    dashboard: str


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A Ray head with a dashboard on free ports, in a session of its own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("finds the processes of a session through /proc")
    if not Path(RAY).exists():
        pytest.skip("the ray command is not installed beside python")
    pytest.importorskip("aiohttp_cors", reason="needs ray[default]")
    gcs, dashboard, agent = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="stp-", dir="/tmp") as temporary:
        process = Process(
            [
                RAY, "start", "--head", "--block", f"--port={gcs}", "--num-cpus=2",
                "--include-dashboard=true", "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
                f"--temp-dir={temporary}", "--disable-usage-stats",
            ],
            tmp_path_factory.mktemp("head") / "log",
            env=variables(),
        )  # fmt: skip
        found = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}")
        try:
            wait_for(lambda: job(found, "list").returncode == 0, 120, "the head", process.running)
            yield found
        finally:
            process.end()


def job(head, command, *arguments, **options):
    """The finished client of a job command."""
    return subprocess.run(
        [RAY, "job", command, "--address", head.dashboard, *arguments],
        env=variables(), capture_output=True, text=True, **{"timeout": 60, **options},
    )  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """What a user submits: the files of the repository, and a recipe."""
    folder = tmp_path / "checkout"
    for name in ("stp_ray", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def submit(head, checkout, *arguments, options=()):
    """The finished client; a head that just started may have no agent for jobs yet."""
    command = ("python", "pipelines/full_stp.py", *arguments)
    given = (*options, "--working-dir", str(checkout), "--", *command)

    def attempt():
        client = job(head, "submit", *given, timeout=200, cwd=checkout)
        return None if "No available agent" in client.stderr + client.stdout else client

    return wait_for(attempt, 300, "an agent for jobs")


@pytest.mark.timeout(420)
def test_a_submitted_run_shows_progress_and_a_failing_one_fails(head, checkout, tmp_path):
    quick = {key: value for key, value in minimal().items() if key not in ("cluster", "tracking")}
    recipe = tiny(**quick, cluster={"num_workers": 1})
    write_recipe(checkout, {**recipe, "tracking": {"wandb": "off"}})
    done = submit(head, checkout, "recipe.yaml", f"storage={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stdout + done.stderr
    for progress in ("supernet  started", "explore  1/1", "finalize/0.5  done", "pruned 0.5"):
        assert progress in done.stdout
    (summary,) = (tmp_path / "runs").glob("tiny-*/summary.json")
    assert summary.stat().st_size > 0

    failed = submit(head, checkout, "recipe.yaml", "sed=1")
    assert failed.returncode != 0
    assert "error: " in failed.stdout and "seed" in failed.stdout


@pytest.mark.timeout(600)
def test_a_stopped_job_is_finished_by_another_driver(head, checkout, undisturbed, start, tmp_path):
    shutil.copy(undisturbed.recipe, checkout / "recipe.yaml")
    storage, named = tmp_path / "runs", ("--no-wait", "--submission-id", "first")
    asked = submit(head, checkout, "recipe.yaml", f"storage={storage}", options=named)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    # unlike Path.glob, glob passes over folders that go while it looks
    checkpoints = f"{storage}/*/supernet/checkpoint-*/complete.json"
    (found, *_) = wait_for(lambda: glob(checkpoints), 200, "a checkpoint")
    run = Path(found).parents[2]
    stopped = job(head, "stop", "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "STOPPED" in job(head, "status", "first").stdout.upper()
    assert not (run / "summary.json").exists()

    driver = start(
        stp("resume", str(run)), tmp_path / "resumed.log",
        env={**variables(), "RAY_ADDRESS": head.address},
    )  # fmt: skip
    assert driver.wait(300) == 0, driver.output
    assert (run / "summary.json").exists()
    for name in WEIGHTS:
        assert (run / name).read_bytes() == undisturbed.files[name], name


def test_workers_that_found_different_checkpoints_do_not_go_on(monkeypatch):
    """Their weights would differ, and nobody would notice."""
    others = [8]

    def all_gather(found, mine):
        for place, value in zip(found, [mine, *map(torch.tensor, others)], strict=True):
            place.fill_(value.item())

    monkeypatch.setattr(distributed, "all_gather", all_gather)
    place = Place(rank=0, world_size=2)
    place.require_same_step(8)
    others[0] = 4
    with pytest.raises(RuntimeError, match=r"checkpoints of the steps \[4, 8\]"):
        place.require_same_step(8)
    Place().require_same_step(8)  # nobody to ask
