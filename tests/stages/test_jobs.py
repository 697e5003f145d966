"""`ray job submit` of pipelines/full_stp.py to a head that the test starts."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.stages.runs import ROOT, environment, minimal, tiny, wait_for, write_recipe

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


@pytest.fixture
def head(start, tmp_path):
    """A Ray head with a dashboard on free ports, in a session of its own."""
    if not Path(RAY).exists():
        pytest.skip("the ray command is not installed beside python")
    pytest.importorskip("aiohttp_cors", reason="needs ray[default]")
    gcs, dashboard, agent = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="stp-", dir="/tmp") as temporary:
        process = start(
            [
                RAY, "start", "--head", "--block", f"--port={gcs}", "--num-cpus=2",
                "--include-dashboard=true", "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
                f"--temp-dir={temporary}", "--disable-usage-stats",
            ],
            tmp_path / "head.log",
            env=variables(),
        )  # fmt: skip
        address = f"http://127.0.0.1:{dashboard}"

        def up():
            listed = subprocess.run(
                [RAY, "job", "list", "--address", address], env=variables(),
                capture_output=True, timeout=60,
            )  # fmt: skip
            return listed.returncode == 0

        wait_for(up, 120, "the head", process.running)
        yield address
        process.end()


@pytest.fixture
def checkout(tmp_path):
    """What a user submits: the files of the repository, and a recipe."""
    folder = tmp_path / "checkout"
    for name in ("stp_ray", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def submit(head, checkout, *arguments):
    """The finished client; a head that just started may have no agent for jobs yet."""

    def attempt():
        client = subprocess.run(
            [
                RAY, "job", "submit", "--address", head, "--working-dir", str(checkout), "--",
                "python", "pipelines/full_stp.py", *arguments,
            ],
            env=variables(), capture_output=True, text=True, timeout=200, cwd=checkout,
        )  # fmt: skip
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
