"""Stage 1 alone: stimulative training of the supernet (and the dense baseline, if asked for).

    python pipelines/supernet.py RECIPE [key=value ...]

The run's folder is that of the whole pipeline, which goes on from here.
"""

from stp_ray.cli import run_script

if __name__ == "__main__":
    run_script(until="supernet")
