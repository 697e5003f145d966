"""A stand-in for a Weights & Biases server: enough of its protocol to take a run, and several
ways of not doing so."""

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ENTITY = {"name": "somebody"}


class Server:
    """Remembers what it was sent.

    Args:
        ill: "hangs" (never answers), "dies" (closes the connection), or the status that it answers.
        well: requests that are answered before that.
    """

    def __init__(self, ill: str = "", well: int = 0) -> None:
        self.requests: list[tuple[str, str]] = []
        self._ill, self._well = ill, well
        self._over = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._answer(self)

            do_PUT = do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *args: None  # a client that was ended
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def asked(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and variables of every GraphQL operation."""
        found = []
        for path, body in self.requests:
            if path == "/graphql":
                query = json.loads(body)
                name = query.get("operationName") or query["query"].split("(")[0].split()[1]
                found.append((name, query.get("variables") or {}))
        return found

    def history_of(self, run: str) -> list[dict[str, Any]]:
        """Every row of metrics of a run, in the order of their arrival."""
        return [
            json.loads(line)
            for path, body in self.requests
            if path.endswith("/file_stream") and f"-{run}-" in path
            for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            .get("content", [])
        ]  # fmt: skip

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.requests.append((request.path, body.decode(errors="replace")))
        if self._ill and len(self.requests) > self._well:
            if self._ill == "hangs":
                self._over.wait(60)
            if not self._ill.isdigit():
                request.close_connection = True
                return
        status = int(self._ill) if self._ill and len(self.requests) > self._well else 200
        answer = json.dumps(self._content(request.path, body) if status == 200 else {}).encode()
        with contextlib.suppress(OSError):
            request.send_response(status)
            request.send_header("Content-Type", "application/json")
            request.send_header("Content-Length", str(len(answer)))
            request.end_headers()
            request.wfile.write(answer)

    def _content(self, path: str, body: bytes) -> dict[str, Any]:
        if path != "/graphql":
            return {}
        query = json.loads(body)
        text, variables = query["query"], query.get("variables") or {}
        return {"data": dict(self._fields(text, variables))}

    def _fields(self, text: str, variables: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        if "upsertBucket" in text:
            project = {"name": variables["project"], "entity": _ENTITY}
            bucket = {
                "id": "run", "name": variables["name"], "displayName": variables["displayName"],
                "config": "{}", "historyLineCount": 0, "project": project,
            }  # fmt: skip
            yield "upsertBucket", {"bucket": bucket, "inserted": True}
        if "createArtifact(" in text:
            sequence = {"latestArtifact": {"id": "artifact"}}
            artifact = {"id": "artifact", "state": "COMMITTED", "artifactSequence": sequence}
            yield "createArtifact", {"artifact": artifact}
        if "useArtifact" in text:
            yield "useArtifact", {"artifact": {"id": "artifact"}}
        if "createRunFiles" in text:
            # Where it puts files is left out: it needs no pictures.
            yield "createRunFiles", {"runID": "run", "uploadHeaders": [], "files": []}
        if "viewer" in text:
            yield "viewer", {"id": "user", "entity": "somebody", "username": "somebody"}
        if "internalId" in text:
            yield "project", {"id": "project", "internalId": "project"}
        if "models(" in text:
            page = {"endCursor": None, "hasNextPage": False}
            yield "models", {"edges": [], "pageInfo": page}
        if "upsertModel" in text:
            yield "upsertModel", {"project": {"id": "project", "name": "proof"}, "inserted": True}
        if "upsertView" in text:
            view = {"id": "report", "name": "page", "spec": variables["spec"]}
            yield "upsertView", {"view": view, "inserted": True}
