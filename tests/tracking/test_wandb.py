"""Weights & Biases through its own client: what is kept on disk, what a server gets, and what a
server that does not behave can do to a run."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from stp_ray import tracking
from stp_ray.artifacts import Store
from stp_ray.tracking import wandb_folder
from stp_ray.tracking.wandb_files import WandbTracker
from stp_ray.tracking.wandb_report import build
from stp_ray.tracking.wandb_upload import probe
from tests.tracking.records import Kept
from tests.tracking.server import Server

pytest.importorskip("wandb")
pytestmark = pytest.mark.timeout(150)

ROOT = Path(__file__).parents[2]

#: A run's tracking in small, and the seconds that it spent on a server.
SCRIPT = """
import io, sys, time
from types import SimpleNamespace
from PIL import Image
from stp_ray.artifacts import Store
from stp_ray.tracking import Artifact, Tracking
from stp_ray.tracking.wandb_upload import Uploads

def png():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "png")
    return file.getvalue()

spent = 0.0
def timed(method):
    def call(*args):
        global spent
        begin = time.monotonic()
        result = method(*args)
        spent += time.monotonic() - begin
        return result
    return call
Uploads.start, Uploads.finish = timed(Uploads.start), timed(Uploads.finish)

options = SimpleNamespace(console=False, wandb=sys.argv[1], project="proof")
tracking = Tracking(options, "demo-1", Store("memory://bucket/run"))
made = ()
for stage, counts in (("supernet", "step"), ("explore", "generation"), ("finalize/0.15", "step")):
    tracker = tracking.of(stage)
    tracker.start(stage, {"lr": 0.125, "counts": counts})
    tracker.log({"loss": 0.5, "step": 3}, 3)
    tracker.log({"loss": 0.25}, 2)
    if stage == "explore":
        rows = [{"macs": 10 * n, "score": 1 / (n + 1)} for n in range(5)]
        tracker.table("candidates", rows, axes=("macs", "score"))
        tracker.picture("architecture", png)
    tracker.summary({"top1": 97.5})
    kind = stage.partition("/")[0]
    files = {"model.safetensors": "digest"}
    made = (Artifact(stage, kind, f"s3://bucket/run/{kind}", files, made),)
    tracker.artifact(made[0])
    tracker.finish()
tracking.complete(["0.15"])
tracking.close()
print(f"spent {spent} at {time.time()}")
"""


class Tracked:
    """A run's tracking in a process of its own, whose home, cache and folder were empty."""

    def __init__(self, folder: Path, mode: str, url: str = "", key: str = "0" * 40) -> None:
        work, home = folder / "work", folder / "home"
        work.mkdir()
        environment = {
            "HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **({"WANDB_BASE_URL": url} if url else {}),
            **({"WANDB_API_KEY": key} if key else {}),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, mode],
            cwd=work, env=environment, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        over = time.time()
        found = re.search(r"spent (\S+) at (\S+)", done.stdout)
        #: Seconds that the run waited because of a server, those at its very end included.
        self.delay_s = float(found[1]) + over - float(found[2])
        self.errors = done.stderr
        assert list(work.iterdir()) == [], "nothing is written into the current folder"
        self.files = sorted(home.rglob("*.wandb"), key=lambda path: path.name)
        #: By stage.
        self.kept = {kept.run.display_name: kept for kept in map(Kept, self.files)}

    @property
    def sent(self) -> bool:
        """Whether wandb says of every stage that it is with the server."""
        return all(file.with_name(f"{file.name}.synced").exists() for file in self.files)


STAGES = ["explore", "finalize/0.15", "supernet"]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    with Server() as server:
        tracked = Tracked(tmp_path_factory.mktemp("offline"), "offline", server.url)
    tracked.requests = server.requests
    return tracked


def test_offline_nobody_is_asked(offline):
    assert offline.requests == []
    assert offline.errors == ""


def test_offline_keeps_metrics_by_stage(offline):
    assert list(offline.kept) == STAGES
    explore, finalize, supernet = offline.kept.values()
    assert supernet.run.run_group == "demo-1"
    assert supernet.run.display_name == "supernet"
    assert supernet.run.project == "proof"
    assert {i.key: json.loads(i.value_json) for i in supernet.run.config.update}["lr"] == 0.125
    # Steps of a stage that was resumed go back; each stage has an axis of its own.
    assert supernet.column("supernet/step") == [3, 2]
    assert supernet.column("supernet/loss") == [0.5, 0.25]
    assert supernet.axes == {"supernet/step": "", "supernet/*": "supernet/step"}
    assert explore.axes["explore/*"] == "explore/generation"
    assert finalize.column("finalize/loss") == [0.5, 0.25]
    assert finalize.summary["top1"] == 97.5
    assert {"memory_percent", "proc"} <= {name.partition(".")[0] for name in finalize.stats}


def test_offline_keeps_tables_pictures_and_lineage(offline):
    explore, finalize, _ = offline.kept.values()
    table = explore.table("explore/candidates")
    assert table["columns"] == ["macs", "score"]
    assert table["data"][4] == [40, 0.2]
    assert explore.column("explore/candidates_plot_table")[0]["nrows"] == 5
    (picture,) = explore.column("explore/architecture")
    assert (explore.folder / "files" / picture["path"]).read_bytes().startswith(b"\x89PNG")
    references = {"model.safetensors": "s3://bucket/run/explore/model.safetensors"}
    assert finalize.artifacts == [
        ("demo-1-explore", "explore", True, references),
        ("demo-1-finalize-0.15", "finalize", False,
         {"model.safetensors": "s3://bucket/run/finalize/model.safetensors"}),
    ]  # fmt: skip


def test_online_a_server_gets_all_of_it_and_a_report(tmp_path):
    with Server() as server:
        tracked = Tracked(tmp_path, "online", server.url)
    assert tracked.sent, tracked.errors
    rows = server.history_of("supernet")
    assert [(row["supernet/step"], row["supernet/loss"]) for row in rows] == [(3, 0.5), (2, 0.25)]
    asked = server.asked
    used = [v["input"]["runName"] for name, v in asked if name == "UseArtifact"]
    assert sorted(used) == [tracked.kept[stage].run.run_id for stage in STAGES[:2]]
    named = {v["input"]["artifactCollectionName"] for name, v in asked if name == "CreateArtifact"}
    assert {"demo-1-supernet", "demo-1-explore", "demo-1-finalize-0.15"} <= named
    (page,) = [v for name, v in asked if "spec" in v]
    assert (page["displayName"], page["projectName"]) == ("demo-1", "proof")
    assert "supernet/loss" in page["spec"]
    assert "offline" not in tracked.errors and "not written" not in tracked.errors


@pytest.mark.parametrize(
    ("ill", "well"),
    [("refuses", 0), ("hangs", 0), ("500", 0), ("hangs", 1), ("dies", 9), ("401", 1)],
)
def test_a_server_that_does_not_behave_delays_a_run_by_20_s_at_most(tmp_path, ill, well):
    with Server("" if ill == "refuses" else ill, well) as server:
        if ill == "refuses":
            server.__exit__()
        tracked = Tracked(tmp_path, "online", server.url)
    print(f"{ill} after {well} good answers: {tracked.delay_s:.1f} s")
    assert tracked.delay_s <= 20
    assert list(tracked.kept) == STAGES
    assert all(kept.summary["top1"] == 97.5 for kept in tracked.kept.values())
    assert not tracked.sent
    # Once for the run, not once for each stage.
    assert tracked.errors.count("going on offline, upload later with: wandb sync") == 1
    assert "Traceback" not in tracked.errors
    if well:
        assert len(server.requests) > well, "it did fall ill"
    if ill == "401":
        assert tracked.delay_s <= 12, "what ended by itself is not waited for"
    if well == 0 and ill != "refuses":
        assert len(server.requests) == 1, "the other stages do not ask again"


def test_without_a_login_nobody_is_asked_and_the_way_to_sync_is_shown(tmp_path):
    with Server() as server:
        tracked = Tracked(tmp_path, "online", server.url, key="")
    assert server.requests == []
    assert list(tracked.kept) == STAGES
    assert "wandb login" in tracked.errors
    assert "wandb sync" in tracked.errors


def test_a_key_may_end_in_a_newline_as_that_of_a_mounted_secret_does(tmp_path):
    with Server() as server:
        tracked = Tracked(tmp_path, "online", server.url, key=f"{'0' * 40}\n")
    assert server.requests
    assert list(tracked.kept) == STAGES
    assert "offline" not in tracked.errors


def test_a_key_that_cannot_be_one_is_told_and_everything_is_kept(tmp_path):
    with Server() as server:
        tracked = Tracked(tmp_path, "online", server.url, key="no key, but a remark")
    assert server.requests == []
    assert list(tracked.kept) == STAGES
    assert all(kept.summary["top1"] == 97.5 for kept in tracked.kept.values())
    assert tracked.errors.count("going on offline, upload later with: wandb sync") == 1


@pytest.mark.timeout(60)
def test_a_sender_ends_when_the_run_was_killed(tmp_path):
    # The header of a file that nobody goes on writing.
    file = tmp_path / "offline-run-1-x" / "run-x.wandb"
    file.parent.mkdir()
    file.write_bytes(b":W&B" + (0xBEE1).to_bytes(2, "little") + b"\0")
    program = Path(tracking.__file__).with_name("wandb_sync.py")
    with Server() as server:
        environment = {
            **os.environ, "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path),
            "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url,
            "WANDB_ERROR_REPORTING": "false",
        }  # fmt: skip
        log = tmp_path / "log"
        with log.open("wb") as output:
            sender = subprocess.Popen(
                [sys.executable, "-P", str(program), str(file)],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + 40
            while b"waiting for more data" not in log.read_bytes():
                assert time.monotonic() < deadline and sender.poll() is None, log.read_text()
                time.sleep(0.1)
            sender.stdin.close()  # as the system does for a process that is gone
            assert sender.wait(10) == 1
        finally:
            sender.kill()


@pytest.mark.parametrize(("ill", "reason"), [("500", "answers 500"), ("dies", "http://")])
def test_the_probe_says_what_is_wrong(ill, reason):
    with Server(ill) as server:
        assert reason in probe(server.url)
    assert "http://" in probe(server.url)


def test_the_probe_takes_a_server_that_refuses_the_question():
    with Server() as server:
        assert probe(server.url) is None


def test_the_report_holds_front_curves_and_tables_of_the_group():
    wr = pytest.importorskip("wandb_workspaces.reports.v2")
    report = build("somebody", "proof", "demo-1", ["0.5", "0.15"])
    grids = [block for block in report.blocks if isinstance(block, wr.PanelGrid)]
    runsets = [runset for grid in grids for runset in grid.runsets]
    assert all("demo-1" in runset.filters for runset in runsets)
    assert {runset.project for runset in runsets} == {"proof"}
    panels = [panel for grid in grids for panel in grid.panels]
    tables = [p.table_name for p in panels if isinstance(p, wr.WeavePanelSummaryTable)]
    assert tables == ["report/budgets", "explore/scored"]
    (front,) = [p for p in panels if isinstance(p, wr.ScatterPlot)]
    assert (str(front.x), str(front.y)) == ("macs", "top1")
    curves = [p for p in panels if isinstance(p, wr.LinePlot)]
    assert {str(p.x) for p in curves} >= {"supernet/step", "finalize/step", "explore/generation"}
    (media,) = [p for p in panels if isinstance(p, wr.MediaBrowser)]
    assert "report/architecture" in media.media_keys


def test_budgets_of_a_run_with_a_long_name_keep_ids_of_their_own(tmp_path, monkeypatch):
    ids = []
    monkeypatch.setattr(
        "stp_ray.tracking.wandb_files.client",
        lambda: SimpleNamespace(
            init=lambda id, **more: ids.append(id) or MagicMock(), Settings=dict
        ),
    )
    monkeypatch.setattr("time.strftime", lambda form: "261128131500")  # they start together
    for label in ("0.5", "0.15"):
        tracker = WandbTracker("project", f"{'n' * 80}-0123456789", tmp_path)
        tracker.start(f"finalize/{label}", {})
    assert len(set(ids)) == 2
    assert all("0123456789" in each and len(each) < 128 for each in ids)


def test_wandb_files_lie_with_the_run_or_in_a_cache_and_never_in_the_current_folder(
    tmp_path, monkeypatch
):
    work, cache = tmp_path / "work", tmp_path / "cache"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(sys, "platform", "linux")
    assert wandb_folder(Store(tmp_path / "run"), "demo-1") == tmp_path / "run"
    remote = Store("memory://bucket/run")
    assert wandb_folder(remote, "demo-1") == cache / "stp_ray" / "wandb" / "demo-1"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = wandb_folder(remote, "demo-1")
    assert "stp_ray-" in str(folder)
    assert work not in folder.parents
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "mine"))
    assert wandb_folder(remote, "demo-1") == tmp_path / "mine"
