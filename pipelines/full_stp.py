"""The whole pipeline as a script: what `ray job submit` runs.

    ray job submit --working-dir . -- python pipelines/full_stp.py RECIPE [key=value ...]

Exit codes and messages are those of `stp run`: 0, 2 for bad input, 1 for a run that stopped
and goes on with the same command.
"""

from stp_ray.cli import run_script

if __name__ == "__main__":
    run_script()
