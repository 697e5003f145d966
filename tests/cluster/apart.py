"""A command with nothing of this computer around it: processes and a network of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

#: Namespaces for processes, which all end with the first, and for a network of nothing but itself:
#: other clusters on this computer are neither ended nor joined, and no other machine is reached.
_NAMESPACES = (
    "unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", "--kill-child",
)  # fmt: skip


def apart(command: Sequence[str]) -> list[str]:
    """The command line that runs it so; skips the test where that cannot be."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("needs Linux and root")
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs iproute2 and util-linux")
    if subprocess.run([*_NAMESPACES, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not make namespaces here")
    return [*_NAMESPACES, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
