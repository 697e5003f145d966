"""Code where stp_ray is not installed."""

import subprocess
import sys
from pathlib import Path

import torch


def alone(folder, code, *arguments):
    """Run code in a process that cannot import stp_ray."""
    path = folder / "stranger.py"
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(path), str(Path(torch.__file__).parents[1]), *arguments],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
