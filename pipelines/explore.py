"""Stages 1 and 2: what is missing of the supernet, then the search for each budget's subnet.

    python pipelines/explore.py RECIPE [key=value ...]

The run's folder is that of the whole pipeline, which goes on from here.
"""

from stp_ray.cli import run_script

if __name__ == "__main__":
    run_script(until="explore")
