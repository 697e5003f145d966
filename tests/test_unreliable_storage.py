"""Object storage that answers with errors, cuts answers short, or is away for a while."""

import http.client
import os
import random
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import torch

from stp_ray import artifacts
from stp_ray.artifacts import Checkpoints, Manifest, Store
from stp_ray.errors import StorageError

pytestmark = pytest.mark.timeout(240)


class Unreliable(ThreadingHTTPServer):
    """Hands requests on to an S3 server, except for those that it spoils."""

    daemon_threads = True

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.random = random.Random(0)
        self.share = 0.0
        self.away = False
        self.spoiled = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if server.away:
            self.close_connection = True
            return
        fault = "none"
        if server.random.random() < server.share:
            fault = server.random.choice(("500", "503", "before", "cut"))
            server.spoiled += 1
        if fault in ("500", "503"):
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            text = f"<Error><Code>{code}</Code><Message>spoiled</Message></Error>".encode()
            self.answer(int(fault), [("Content-Type", "application/xml")], text)
            return
        if fault == "before":  # the request never arrives
            self.close_connection = True
            return
        onward = http.client.HTTPConnection(server.upstream, timeout=30)
        onward.request(self.command, self.path, body or None, dict(self.headers))
        answer = onward.getresponse()
        content = answer.read()
        onward.close()
        kept = [
            (name, value) for name, value in answer.getheaders()
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date")
        ]  # fmt: skip
        if self.command == "HEAD":
            kept.append(("Content-Length", answer.getheader("Content-Length") or "0"))
        self.answer(answer.status, kept, content, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def answer(self, status, headers, content, cut=False):
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if cut:  # the request was carried out, its answer breaks off
            self.close_connection = True
        self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(s3, monkeypatch):
    proxy = Unreliable(os.environ["AWS_ENDPOINT_URL"])
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.shutdown()
    proxy.server_close()
    thread.join()


def test_one_request_in_five_may_fail(s3, server):
    store = Store(f"{s3}/{uuid.uuid4().hex}")
    store.probe()
    server.share = 0.2
    checkpoints = Checkpoints(store, keep=2)
    for step in range(1, 6):
        weights = {"w": torch.full((200, 100), float(step))}
        checkpoints.save(step, weights, {"step": step})
        assert store.create_bytes(f"lease-{step}.json", f"owner {step}".encode())
        assert not store.create_bytes(f"lease-{step}.json", b"somebody else")
        Manifest(store).finish(
            f"stage-{step}", inputs={}, outputs={}, seconds=1, device_seconds=1, metrics={}
        )
    step, tensors, meta = checkpoints.latest()
    assert (step, meta) == (5, {"step": 5})
    assert torch.equal(tensors["w"], torch.full((200, 100), 5.0))
    assert list(Manifest(store).stages()) == [f"stage-{step}" for step in range(1, 6)]
    assert server.spoiled > 10


def test_storage_that_is_away_for_ten_seconds_is_waited_for(s3, server):
    store = Store(f"{s3}/{uuid.uuid4().hex}")
    store.write_bytes("a.bin", b"before")
    server.away = True
    timer = threading.Timer(10.0, setattr, (server, "away", False))
    timer.start()
    started = time.monotonic()
    store.write_bytes("a.bin", b"after")
    assert time.monotonic() - started > 9
    assert store.read_bytes("a.bin") == b"after"
    timer.join()


def test_storage_that_stays_away_ends_in_one_line(s3, server, monkeypatch):
    monkeypatch.setattr(artifacts, "PAUSES", (0.1, 0.1))
    store = Store(f"{s3}/{uuid.uuid4().hex}")
    server.away = True
    with pytest.raises(StorageError, match="cannot write s3://") as told:
        store.write_bytes("a.bin", b"x")
    assert "\n" not in str(told.value)
