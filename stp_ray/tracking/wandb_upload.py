"""Weights & Biases online: a process for each stage sends what the stage writes on disk.

The run never talks to the server itself, but for one question at its start. Whatever the server
does or fails to do happens to those processes; the run looks at them once, at its end, and then
for a bounded time.
"""

import http.client
import json
import logging
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .wandb_files import client, sync_command, wandb_id

log = logging.getLogger(__name__)

#: Seconds that a server gets to answer at all, and for what is left to do when the run is over.
PROBE_S, END_S = 4.0, 14.0

_HERE = Path(__file__).parent


class Uploads:
    """Sends a run's wandb files while they are written.

    Args:
        project: wandb project.
        run_id: the group of the run's stages.
        folder: where wandb's files go.
    """

    def __init__(self, project: str, run_id: str, folder: Path) -> None:
        self._project, self._run_id, self._folder = project, run_id, folder
        self._usable: bool | None = None
        self._running: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, file: Path) -> None:
        """Send a file from now on, unless the server cannot be used: asked once for a run."""
        if self._usable is None:
            reason = _no_login() or probe(_server())
            self._usable = reason is None
            if reason is not None:
                self._explain(f"wandb cannot be reached ({reason})")
        if self._usable and any(self._failed(sent) for sent in self._running):
            self._usable = False
            self._explain("wandb no longer takes what it is sent")
        if self._usable:
            output = file.parent / "logs" / "upload.log"
            try:
                self._running[file] = _errand("wandb_sync.py", str(file), self._folder, output)
            except OSError as error:  # out of processes or memory: what is on disk goes on
                self._usable = False
                self._explain(f"no process to send with ({error})")

    def finish(self, budgets: Sequence[str] = ()) -> str | None:
        """Wait until all is sent, at most `END_S` seconds.

        Args:
            budgets: those of a run that went to its end; it gets a wandb Report.

        Returns:
            The address of the report.
        """
        end = time.monotonic() + END_S
        for process in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            _stop(process)
        complete = bool(self._running) and all(map(_sent, self._running))
        if self._usable and not complete and self._running:
            self._explain("wandb did not take everything")
        self._running.clear()
        return self._report(budgets, end) if self._usable and complete and budgets else None

    def _failed(self, file: Path) -> bool:
        return self._running[file].poll() is not None and not _sent(file)

    def _explain(self, what: str) -> None:
        log.warning(
            "%s; going on offline, upload later with: %s",
            what,
            sync_command(self._folder, wandb_id(self._run_id)),
        )

    def _report(self, budgets: Sequence[str], end: float) -> str | None:
        """Write the run's wandb Report; a report that fails is only named."""
        about = {"project": self._project, "run_id": self._run_id, "budgets": list(budgets)}
        output = self._folder / "wandb" / f"report-{self._run_id}.log"
        process = _errand("wandb_report.py", json.dumps(about), self._folder, output)
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        _stop(process)
        lines = output.read_text(errors="replace").split()
        if process.returncode == 0 and lines:
            return lines[-1]
        log.warning("the run's wandb Report was not written; %s says why", output)
        return None


def probe(url: str, timeout_s: float = PROBE_S) -> str | None:
    """Why a server cannot be used, or None where it answers anything but an error of its own.

    Asked in a thread, because a server that trickles its answer outlasts every time-out of a
    socket.
    """
    found: list[str | None] = [f"no answer from {url} in {timeout_s:g} s"]
    question = json.dumps({"query": "query { serverInfo { cliVersionInfo } }"}).encode()
    request = urllib.request.Request(
        f"{url}/graphql", question, {"Content-Type": "application/json"}
    )

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=timeout_s):
                found[0] = None
        except urllib.error.HTTPError as error:
            found[0] = None if error.code < 500 else f"{url} answers {error.code}"
        except TimeoutError:
            pass
        except (OSError, ValueError, http.client.HTTPException) as error:
            found[0] = f"{url}: {' '.join(str(error).split())}"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0]


def _no_login() -> str | None:
    """Why there is nobody to send as. Silent, `login` reads environment and netrc alone; otherwise
    it would ask the server for a name to greet."""
    wandb = client()
    try:
        wandb.setup(wandb.Settings(silent=True))
        known = wandb.login(prompt=False, verify=False)
    except Exception as error:  # of a key that cannot be one; what it says does not repeat it
        return " ".join(str(error).split()) or type(error).__name__
    return None if known else "no wandb login; run `wandb login`"


def _server() -> str:
    return str(client().setup().settings.base_url).rstrip("/")


def _sent(file: Path) -> bool:
    """wandb marks what it has sent to the end."""
    return file.with_name(f"{file.name}.synced").exists()


def _errand(program: str, argument: str, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """A program that lies beside this one as a process of its own.

    It shares neither the terminal, whose interrupts are not for it, nor wandb's service process,
    which a bad answer of the server can bring down.
    """
    kept = {k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_MODE")}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-P", str(_HERE / program), argument],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**kept, "WANDB_DIR": str(folder)},
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process; the wandb service that it started ends with it."""
    process.kill()
    process.wait()
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()
