import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stp_ray.artifacts import Store
from stp_ray.errors import StorageError
from stp_ray.tracking import (
    ConsoleTracker,
    JsonlTracker,
    MultiTracker,
    WandbTracker,
    make_trackers,
    wandb_folder,
)

pytestmark = pytest.mark.timeout(120)


class Recorder:
    """A tracker that remembers its calls and fails where it is told to."""

    def __init__(self, fails=()):
        self.calls = []
        self._fails = fails

    def _call(self, name, *args):
        self.calls.append((name, *args))
        if name in self._fails:
            raise RuntimeError("no such\nluck")

    def start(self, stage, config):
        self._call("start", stage, config)

    def log(self, metrics, step):
        self._call("log", metrics, step)

    def summary(self, metrics):
        self._call("summary", metrics)

    def artifact(self, name, uri):
        self._call("artifact", name, uri)

    def finish(self):
        self._call("finish")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use(tracker):
    tracker.start("supernet", {"total_steps": 2})
    tracker.log({"loss": 2.0}, 1)
    tracker.log({"loss": 1.0}, 2)
    tracker.summary({"top1": 97.5})
    tracker.artifact("model", "s3://bucket/model.safetensors")
    tracker.finish()


# -- several --------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["start", "log", "summary", "artifact", "finish"])
def test_a_tracker_that_fails_is_named_once_and_stops_nothing(call, caplog):
    bad, good = Recorder(fails=[call]), Recorder()
    with caplog.at_level(logging.WARNING):
        use(MultiTracker([bad, good]))
    assert len(good.calls) == 6
    assert [name for name, *_ in bad.calls].count(call) == 1
    assert len(caplog.records) == 1
    assert "Recorder failed" in caplog.text
    assert "no such luck" in caplog.text


@pytest.mark.parametrize(
    ("console", "wandb", "kinds"),
    [
        (True, "offline", [JsonlTracker, ConsoleTracker, WandbTracker]),
        (False, "off", [JsonlTracker]),
    ],
)
def test_trackers_follow_the_options(tmp_path, console, wandb, kinds):
    options = SimpleNamespace(console=console, wandb=wandb, project="p")
    tracker = make_trackers(options, "demo-1", "supernet", Store(tmp_path))
    assert [type(one) for one in tracker._trackers] == kinds


# -- console --------------------------------------------------------------------------


def console_lines(stream, total=100, seconds=100.0, **extra):
    clock = Clock()
    tracker = ConsoleTracker(stream, clock=clock)
    tracker.start("supernet", {"total_steps": total, "batch_size": 64})
    for step in range(1, total + 1):
        clock.now += seconds / total
        tracker.log({"loss": 2.0 / step, "kd": 0.25, "epoch": 3, "lr": 0.1, **extra}, step)
    tracker.summary({"top1": 97.512})
    tracker.artifact("model", "runs/model.safetensors")
    tracker.finish()
    tracker.finish()
    return stream.getvalue()


def test_plain_lines_come_every_ten_seconds():
    lines = console_lines(io.StringIO()).splitlines()
    steps = [line.split()[1] for line in lines if "/100" in line]
    assert steps == [f"{n}/100" for n in (1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100)]
    assert "supernet  51/100  epoch 3  64 images/s  loss 0.03922  kd 0.25  ETA 0:49" in lines
    assert "supernet  done in 1:40  top1 97.51" in lines
    assert "supernet  wrote model: runs/model.safetensors" in lines
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_a_live_line():
    text = console_lines(Terminal(), total=5, seconds=5)
    assert "\x1b" in text
    assert "supernet  5/5  epoch 3" in text
    assert "done in 0:05" in text


def test_stages_that_run_side_by_side_share_a_terminal():
    stream = Terminal()
    both = [ConsoleTracker(stream, clock=Clock()) for _ in range(2)]
    for tracker, budget in zip(both, ("0.5", "0.15"), strict=True):
        tracker.start(f"finalize/{budget}", {"total_steps": 9})
        tracker.log({"loss": 1.0}, 3)
    last = stream.getvalue().rpartition("started")[2]
    assert "finalize/0.5  3/9" in last
    assert "finalize/0.15  3/9" in last
    for tracker in both:
        tracker.finish()
        tracker.finish()


def test_more_steps_than_were_announced():
    stream = io.StringIO()
    tracker = ConsoleTracker(stream, interval_s=0, clock=Clock())
    tracker.start("control", {"total_steps": 5})
    tracker.log({"loss": 1.0}, 6)
    assert stream.getvalue().splitlines()[-1] == "control  6  loss 1"


def test_given_rates_and_missing_totals():
    stream = io.StringIO()
    tracker = ConsoleTracker(stream, clock=Clock())
    tracker.start("explore", {})
    tracker.log({"images_per_s": 1234.5, "best": 0.25, "note": "text", "flag": True}, 7)
    tracker.finish()
    assert stream.getvalue().splitlines()[-1] == "explore  7  1,234 images/s  best 0.25"


def test_a_restarted_stage_forgets_its_old_pace():
    stream, clock = io.StringIO(), Clock()
    tracker = ConsoleTracker(stream, interval_s=0, clock=clock)
    tracker.start("supernet", {"total_steps": 7200})
    for step in (100, 50, 51):
        clock.now += 1
        tracker.log({}, step)
    assert stream.getvalue().splitlines()[-1] == "supernet  51/7200  ETA 1:59:09"


# -- JSON lines -----------------------------------------------------------------------


def lines_of(store, stage="supernet"):
    return [json.loads(line) for line in store.read_bytes(f"logs/{stage}.jsonl").splitlines()]


@pytest.mark.parametrize("remote", [False, True])
def test_every_call_is_a_line_and_a_restart_adds_to_them(tmp_path, remote, request):
    store = Store(f"memory://{request.node.name}/run" if remote else tmp_path)
    use(JsonlTracker(store))
    lines = lines_of(store)
    assert [line["event"] for line in lines] == [
        "start",
        "log",
        "log",
        "summary",
        "artifact",
    ]
    assert lines[1]["metrics"] == {"loss": 2.0}
    assert lines[1]["step"] == 1
    assert {line["stage"] for line in lines} == {"supernet"}
    use(JsonlTracker(store))
    assert len(lines_of(store)) == 10


def test_numbers_that_json_lacks_become_null(tmp_path):
    tracker = JsonlTracker(Store(tmp_path))
    tracker.start("finalize/0.15", {})
    tracker.log({"loss": float("nan")}, 1)
    tracker.finish()
    assert lines_of(Store(tmp_path), "finalize-0.15")[-1]["metrics"] == {"loss": None}


def test_half_a_line_of_a_killed_process_spoils_no_other(tmp_path):
    store = Store(tmp_path)
    use(JsonlTracker(store))
    path = tmp_path / "logs" / "supernet.jsonl"
    path.write_text(path.read_text() + '{"time": 1')
    use(JsonlTracker(store))
    lines = path.read_text().splitlines()
    assert len(lines) == 11
    assert [line for line in lines if not line.endswith("}")] == ['{"time": 1']


def test_remote_lines_are_pushed_from_time_to_time():
    store, clock = Store("memory://pushes/run"), Clock()
    tracker = JsonlTracker(store, push_s=30, clock=clock)
    tracker.start("supernet", {})
    tracker.log({"loss": 1}, 1)
    assert not store.exists("logs/supernet.jsonl")
    clock.now = 31
    tracker.log({"loss": 1}, 2)
    assert len(lines_of(store)) == 3
    tracker.log({"loss": 1}, 3)
    assert len(lines_of(store)) == 3
    tracker.finish()
    assert len(lines_of(store)) == 4


def test_storage_that_goes_away_stops_nothing(tmp_path, monkeypatch, caplog):
    store = Store("memory://gone/run")
    tracker = MultiTracker([JsonlTracker(store)])
    tracker.start("supernet", {})

    def refuse(self, name, data):
        raise StorageError("gone")

    monkeypatch.setattr(Store, "write_bytes", refuse)
    tracker.finish()
    assert "JsonlTracker failed" in caplog.text


# -- wandb ----------------------------------------------------------------------------


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


WANDB_SCRIPT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from stp_ray.artifacts import Store
from stp_ray.tracking import make_trackers
options = SimpleNamespace(console=False, wandb=sys.argv[1], project="proof")
store = Store("memory://bucket/run")
for stage in ("supernet", "finalize/0.15"):
    tracker = make_trackers(options, "demo-1", stage, store)
    tracker.start(stage, {"supernet": {"lr": 0.125}})
    tracker.log({"loss": 0.5}, 3)
    tracker.log({"loss": 0.25}, 2)
    tracker.summary({"top1": 97.5})
    tracker.artifact("model", "s3://bucket/run/model.safetensors")
    tracker.finish()
"""


def run_wandb(tmp_path, mode, **extra):
    """Run a stage's tracking in a process of its own: home, cache and folder are empty."""
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        "HOME": str(tmp_path / "home"),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "OMP_NUM_THREADS": "1",
        **extra,
    }
    done = subprocess.run(
        [sys.executable, "-c", WANDB_SCRIPT, mode],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert list(work.iterdir()) == []
    files = sorted(
        (tmp_path / "home" / ".cache" / "stp_ray").rglob("*.wandb"), key=lambda p: p.name
    )
    return files, done.stderr


def records(path):
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def test_wandb_offline_keeps_metrics_config_group_and_references(tmp_path):
    pytest.importorskip("wandb")
    files, errors = run_wandb(tmp_path, "offline")
    assert errors == ""
    assert [path.name for path in files] == [
        "run-demo-1-finalize-0.15.wandb",
        "run-demo-1-supernet.wandb",
    ]
    content = list(records(files[1]))
    started = next(record.run for record in content if record.HasField("run"))
    assert (started.run_group, started.display_name, started.project) == (
        "demo-1",
        "supernet",
        "proof",
    )
    config = {item.key: item.value_json for item in started.config.update}
    assert json.loads(config["supernet"]) == {"lr": 0.125}
    history = [
        {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
        for record in content
        if record.HasField("history")
    ]
    assert [(row["step"], row["loss"]) for row in history] == [("3", "0.5"), ("2", "0.25")]
    text = files[1].read_bytes()
    assert b"s3://bucket/run/model.safetensors" in text
    assert b"top1" in text


def test_wandb_online_without_login_goes_on_offline_and_says_how_to_sync(tmp_path):
    pytest.importorskip("wandb")
    files, errors = run_wandb(tmp_path, "online")
    assert len(files) == 2
    assert "wandb login" in errors
    assert "wandb sync" in errors
    assert "Traceback" not in errors


def test_wandb_with_an_unreachable_server_goes_on_offline(tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    begun = []

    class Run(Recorder):
        def define_metric(self, *args, **kwargs):
            begun.append("defined")

    def init(**options):
        begun.append(options["mode"])
        if options["mode"] == "online":
            raise wandb.errors.CommError("no\nroute")
        return Run()

    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(wandb, "init", init)
    tracker = WandbTracker("p", "demo-1", online=True, folder=tmp_path / "w")
    tracker.start("supernet", {})
    tracker.finish()
    tracker.finish()
    tracker.log({}, 1)
    tracker.summary({})
    tracker.artifact("model", "s3://bucket/x")
    assert begun == ["online", "offline", "defined"]
    assert "no route" in caplog.text
    assert f"wandb sync {tmp_path}" in caplog.text
