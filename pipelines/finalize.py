"""The last stage: mutating expansion and pruning for each budget, then the report; what is
missing before it is made first.

    python pipelines/finalize.py RECIPE [key=value ...]

The run's folder is that of the whole pipeline, so that both do the same from here on.
"""

from stp_ray.cli import run_script

if __name__ == "__main__":
    run_script()
