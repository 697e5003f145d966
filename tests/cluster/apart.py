"""A command with nothing of this computer around it: processes and a network of its own."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.stages.runs import ROOT, Process, environment

#: Namespaces for processes, which all end with the first, and for a network of nothing but itself:
#: other clusters on this computer are neither ended nor joined, and no other machine is reached.
_NAMESPACES = (
    "unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", "--kill-child",
)  # fmt: skip


def run_apart(command: Sequence[str], log: Path, limit_s: float) -> str:
    """Output of a command that runs so, and must succeed; skips the test where that cannot be."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs iproute2 and util-linux")
    alone = [*_NAMESPACES, *(["--map-root-user"] if os.geteuid() else [])]
    if subprocess.run([*alone, "true"], capture_output=True, timeout=20).returncode:
        pytest.skip("may not make namespaces here")
    inside = ("sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    process = Process([*alone, *inside, *command], log, cwd=ROOT, env=environment())
    try:
        code = process.wait(limit_s)
    finally:
        process.end()
    assert code == 0, process.output
    return process.output
