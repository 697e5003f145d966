"""An S3 server whose requests fail, whose answers break off, or that is away for a while."""

import contextlib
import http.client
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Unreliable(ThreadingHTTPServer):
    """Hands requests on to an S3 server, except for those that it spoils."""

    daemon_threads = True

    def __init__(self, upstream, address="127.0.0.1"):
        super().__init__((address, 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.random = random.Random(0)
        self.share = 0.0
        self.away = False
        #: Says nothing, and leaves connections open.
        self.silent = False
        self.spoiled = 0
        #: (seconds of the monotonic clock, path) of each file that was written, and whose writer
        #: was told so.
        self.written = []

    def handle_error(self, request, client_address):
        """Those who ask may be killed while they do."""

    @property
    def url(self):
        return "http://{}:{}".format(*self.server_address)

    @contextlib.contextmanager
    def saying_nothing(self, seconds):
        """For so many seconds, or until the block ends."""
        timer = threading.Timer(seconds, setattr, (self, "silent", False))
        self.silent = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            self.silent = False

    @contextlib.contextmanager
    def serving(self):
        """Answers requests, in a thread of its own."""
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_expect_100(self):
        self.keep_silent()
        return super().handle_expect_100()

    def keep_silent(self):
        while self.server.silent:
            time.sleep(0.05)

    def handle_any(self):
        server = self.server
        self.keep_silent()
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
        if self.command == "PUT" and answer.status == 200 and fault != "cut":
            server.written.append((time.monotonic(), urlsplit(self.path).path))

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
