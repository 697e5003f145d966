"""What a line of results says about the code and the machine it comes from. Needs only torch."""

import platform
import subprocess
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
