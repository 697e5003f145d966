import io
import json
import logging
from types import SimpleNamespace

import pytest

from stp_ray.artifacts import Store
from stp_ray.errors import StorageError
from stp_ray.tracking import Artifact, MultiTracker, Tracking, wandb_upload
from stp_ray.tracking.console import ConsoleTracker
from stp_ray.tracking.jsonl import JsonlTracker
from stp_ray.tracking.wandb_files import WandbTracker

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

    def table(self, name, rows, axes=None):
        self._call("table", name, rows, axes)

    def picture(self, name, draw):
        self._call("picture", name, draw)

    def artifact(self, artifact):
        self._call("artifact", artifact)

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
    tracker.table("candidates", [{"macs": 1, "score": 0.5}], axes=("macs", "score"))
    tracker.picture("architecture", lambda: pytest.fail("nobody here keeps pictures"))
    tracker.artifact(Artifact("model", "model", "s3://bucket/model"))
    tracker.finish()


# -- several --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call", ["start", "log", "summary", "table", "picture", "artifact", "finish"]
)
def test_a_tracker_that_fails_is_named_once_and_stops_nothing(call, caplog):
    bad, good = Recorder(fails=[call]), Recorder()
    with caplog.at_level(logging.WARNING):
        use(MultiTracker([bad, good]))
    assert len(good.calls) == 8
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
    tracker = Tracking(options, "demo-1", Store(tmp_path)).of("supernet")
    assert [type(one) for one in tracker._trackers] == kinds


def test_sending_that_fails_stops_nothing(tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise OSError("no more processes")

    monkeypatch.setattr(wandb_upload, "_no_login", lambda: None)
    monkeypatch.setattr(wandb_upload, "_server", lambda: "http://nowhere")
    monkeypatch.setattr(wandb_upload, "probe", lambda url: None)
    monkeypatch.setattr(wandb_upload, "_errand", refuse)
    options = SimpleNamespace(console=False, wandb="online", project="p")
    tracking = Tracking(options, "demo-1", Store(tmp_path))
    for _ in range(2):
        tracking._uploads.start(tmp_path / "run.wandb")
    assert [r.message.partition(";")[0] for r in caplog.records] == [
        "no process to send with (no more processes)"
    ]
    monkeypatch.setattr(tracking._uploads, "finish", refuse)
    tracking.close()
    assert "the run goes on" in caplog.text


# -- console --------------------------------------------------------------------------


def console_lines(stream, total=100, seconds=100.0, **extra):
    clock = Clock()
    tracker = ConsoleTracker(stream, clock=clock)
    tracker.start("supernet", {"total_steps": total, "batch_size": 64})
    for step in range(1, total + 1):
        clock.now += seconds / total
        tracker.log({"loss": 2.0 / step, "kd": 0.25, "epoch": 3, "lr": 0.1, **extra}, step)
    tracker.summary({"top1": 97.512})
    tracker.artifact(Artifact("model", "model", "runs/model"))
    tracker.finish()
    tracker.finish()
    return stream.getvalue()


def test_plain_lines_come_every_ten_seconds():
    lines = console_lines(io.StringIO()).splitlines()
    steps = [line.split()[1] for line in lines if "/100" in line]
    assert steps == [f"{n}/100" for n in (1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100)]
    assert "supernet  51/100  epoch 3  64 images/s  loss 0.03922  kd 0.25  ETA 0:49" in lines
    assert "supernet  done in 1:40  top1 97.51" in lines
    assert "supernet  wrote model: runs/model" in lines
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
def test_every_call_is_a_line_and_a_restart_adds_to_them(tmp_path, remote):
    store = Store("memory://every-call/run" if remote else tmp_path)
    use(JsonlTracker(store))
    lines = lines_of(store)
    assert [line["event"] for line in lines] == [
        "start",
        "log",
        "log",
        "summary",
        "table",
        "artifact",
    ]
    assert (lines[4]["rows"], lines[4]["columns"]) == (1, ["macs", "score"])
    assert lines[1]["metrics"] == {"loss": 2.0}
    assert lines[1]["step"] == 1
    assert {line["stage"] for line in lines} == {"supernet"}
    use(JsonlTracker(store))
    assert len(lines_of(store)) == 12


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
    assert len(lines) == 13
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
