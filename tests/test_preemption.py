"""The watcher of spot machines, against stand-ins of the three metadata services."""

import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from http.client import BadStatusLine, IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stp_ray import preemption

pytestmark = pytest.mark.timeout(60)

SCRIPT = Path(preemption.__file__)


class Cloud:
    """A metadata service: answers what is put into `notice`, strictly as the real ones do."""

    def __init__(self, kind):
        self.kind = kind
        self.notice = None
        self.asked = 0
        self.down = False
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                known = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
                is_token = cloud.kind == "aws" and known and self.path == "/latest/api/token"
                self.answer(200 if is_token else 400, "a-token")

            def do_GET(self):
                cloud.asked += 1
                self.answer(*(cloud.answer(self) if not cloud.down else (503, "")))

            def answer(self, code, text):
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def answer(self, request):
        path, headers = request.path, request.headers
        if self.kind == "aws" and path == "/latest/meta-data/spot/instance-action":
            if headers.get("X-aws-ec2-metadata-token") != "a-token":
                return 401, ""  # IMDSv2 is demanded
            return (200, self.notice) if self.notice else (404, "")
        if self.kind == "gcp" and path == "/computeMetadata/v1/instance/preempted":
            known = headers.get("Metadata-Flavor") == "Google"
            return (200, self.notice or "FALSE") if known else (403, "")
        if self.kind == "azure" and headers.get("Metadata") == "true":
            if path.startswith("/metadata/scheduledevents?api-version="):
                return 200, self.notice or '{"DocumentIncarnation": 1, "Events": []}'
            if path.startswith("/metadata/instance/compute/name?api-version="):
                return 200, "worker-1"
        return 400, ""

    def close(self):
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


@pytest.fixture
def cloud(request):
    stand_in = Cloud(request.param)
    yield stand_in
    stand_in.close()


# Tests are given these, not what they return: its time counts from the call, and a time in
# the name of a test would differ between the processes that collect it.
def event(kind="Preempt", resource="worker-1", seconds=30):
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
    begins = when if seconds else ""
    found = {"EventId": "1", "EventType": kind, "Resources": [resource], "NotBefore": begins}
    return json.dumps({"DocumentIncarnation": 2, "Events": [found]})


def instance_action(seconds):
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": f"{when:%Y-%m-%dT%H:%M:%SZ}"})


@pytest.mark.parametrize(
    ("cloud", "notice", "seconds"),
    [
        ("aws", str, None), ("aws", partial(instance_action, 120), 120),
        ("aws", partial(instance_action, -5), 0),
        ("gcp", str, None), ("gcp", "TRUE".strip, 30),
        ("azure", str, None), ("azure", event, 30), ("azure", partial(event, seconds=0), 0),
        ("azure", partial(event, "Reboot"), None),
        ("azure", partial(event, resource="worker-2"), None),
    ],
    indirect=["cloud"],
)  # fmt: skip
def test_notices(cloud, notice, seconds):
    cloud.notice = notice()
    left = preemption.NOTICES[cloud.kind](cloud.url)
    assert left == (seconds if seconds is None else pytest.approx(seconds, abs=50))
    if seconds:
        assert left > 0


@pytest.mark.parametrize("cloud", ["aws"], indirect=True)
def test_a_service_that_is_down_is_asked_again(cloud, caplog):
    cloud.down = True
    seen = []

    def notice():
        seen.append(cloud.asked)
        if len(seen) == 4:
            cloud.down, cloud.notice = False, instance_action(100)
        return preemption.aws(cloud.url)

    assert preemption.watch(notice, poll_s=0.01) > 0
    assert len(seen) == 4
    assert len(caplog.records) == 1  # it does not fill the disk


@pytest.fixture
def recorded(tmp_path):
    """A `ray` that writes down how it was called, and fails as often as the file says."""
    ray = tmp_path / "ray"
    ray.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$0.call.$$"\n'
        'test -s "$0.fail" && { : > "$0.fail"; exit 1; }\nexit 0\n'
    )
    ray.chmod(0o755)
    processes = {
        "1": ["bash", "--node_id=no-raylet", "--gcs-address=none"],
        "20": ["/site-packages/ray/raylet", "--node_id=n0de", "--gcs-address=10.0.0.1:6379", ""],
        "21": ["ray::Worker", "--node-id=n0de"],
    }
    for number, line in processes.items():
        (tmp_path / "proc" / number).mkdir(parents=True)
        (tmp_path / "proc" / number / "cmdline").write_text("\0".join(line))

    def calls():
        return [path.read_text().splitlines() for path in tmp_path.glob("ray.call.*")]

    return tmp_path, calls


def start(cloud, folder):
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-I", str(SCRIPT), cloud.kind, "--metadata", cloud.url, "--poll", "0.05",
         "--proc", str(folder / "proc")],
        env={**os.environ, "PATH": path, "http_proxy": "http://127.0.0.1:9"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cloud", "notice", "most"),
    [("aws", partial(instance_action, 120), 120), ("gcp", "TRUE".strip, 30), ("azure", event, 30)],
    indirect=["cloud"],
)
def test_the_node_is_drained_when_the_notice_comes_and_not_before(cloud, notice, most, recorded):
    folder, calls = recorded
    process = start(cloud, folder)
    try:
        deadline = time.monotonic() + 20
        while cloud.asked < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        assert calls() == []
        cloud.notice = notice()
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == 0, output
    ((command, *options),) = calls()
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert command == "drain-node"
    assert (given["--address"], given["--node-id"]) == ("10.0.0.1:6379", "n0de")
    assert given["--reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert 0 < int(given["--deadline-remaining-seconds"]) <= most


@pytest.mark.parametrize("error", [IncompleteRead(b"{"), BadStatusLine("?")])
def test_an_answer_that_was_cut_off_is_asked_for_again(error):
    answers = [error, None, 30.0]

    def notice():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert preemption.watch(notice, poll_s=0.01) == 30.0
    assert not answers


@pytest.mark.parametrize("cloud", ["aws", "azure"], indirect=True)
def test_an_answer_of_another_form_is_asked_for_again(cloud):
    cloud.notice = "[]"
    asked = []

    def notice():
        asked.append(cloud.asked)
        return 30.0 if len(asked) == 2 else preemption.NOTICES[cloud.kind](cloud.url)

    assert preemption.watch(notice, poll_s=0.01) == 30.0
    assert asked[1] > asked[0]


@pytest.mark.parametrize("failures", [1, 0])
def test_a_drain_that_fails_is_tried_again(recorded, monkeypatch, failures):
    folder, calls = recorded
    (folder / "ray.fail").write_text("x" * failures)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert preemption.drain(30.0, folder / "proc", pause_s=0.01)
    assert len(calls()) == failures + 1


def test_a_drain_that_is_never_accepted_is_told(recorded, monkeypatch, caplog):
    folder, _ = recorded
    (folder / "ray").write_text("#!/bin/sh\necho no cluster; exit 1\n")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert not preemption.drain(30.0, folder / "proc", pause_s=0.01)
    assert caplog.text.count("no cluster") == preemption.ATTEMPTS


def test_a_machine_without_the_command_of_ray_is_told(recorded, monkeypatch, caplog):
    folder, _ = recorded
    monkeypatch.setenv("PATH", str(folder / "nothing"))
    assert not preemption.drain(30.0, folder / "proc", pause_s=0.01)
    assert caplog.text.count("is not drained") == preemption.ATTEMPTS


def test_a_machine_without_ray_is_told(tmp_path, caplog):
    assert not preemption.drain(30.0, tmp_path, pause_s=0.01)
    assert "found no raylet" in caplog.text
