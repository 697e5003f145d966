"""What a line of results says about the code and the machine it comes from. Needs only torch."""

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch


def surroundings(device: torch.device) -> dict[str, Any]:
    """The code, the machine and the versions, as they are when the program starts."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    cuda = device.type == "cuda"
    return {
        "revision": git("rev-parse", "--short", "HEAD") + changed,
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def cores_in_use(seconds: float = 0.5) -> float:
    """Cores that other programs use while this one sleeps; 0 where the system does not say."""
    before = _ticks()
    time.sleep(seconds)
    busy, idle = (now - then for now, then in zip(_ticks(), before, strict=True))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return round(cores * busy / (busy + idle), 2) if busy + idle else 0.0


def _ticks() -> tuple[int, int]:
    """Time that the cores have worked, and waited, since the machine started."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0, 0
    user, nice, system, idle, wait, *rest = map(int, path.read_text().split()[1:9])
    return user + nice + system + sum(rest), idle + wait
