"""A run whose machines come and go with its stages; `make test-cluster`."""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cluster.apart import run_apart
from tests.cluster.fleet import FOUND, IDLE_S, MOST, STAGES

LIMIT_S = 900
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(LIMIT_S + 60)]

#: Seconds that the autoscaler takes to see that a machine is idle, and to end it.
SLACK_S = 10


@pytest.fixture(scope="module")
def stages():
    # Sockets lie in there: the path has to be short.
    with tempfile.TemporaryDirectory(prefix="stp-", dir="/tmp", ignore_cleanup_errors=True) as home:
        folder = Path(home)
        run_apart([sys.executable, "-m", "tests.cluster.fleet", home], folder / "log", LIMIT_S)
        yield json.loads((folder / FOUND).read_text())


@pytest.mark.parametrize(("stage", "workers"), list(zip(STAGES, (2, 3, 2), strict=True)))
def test_workers_come_for_a_stage_and_go_after_it(stages, stage, workers, record_property):
    seen = stages[stage]
    assert seen["code"] == 0, seen["output"]
    assert seen["before"] == 0
    # Batches that last for less than a worker takes to start let Tune ask for a few too many.
    assert workers <= max(count for _, count in seen["changes"]) <= MOST, seen["changes"]
    assert seen["left"] == 0, seen["changes"]
    assert seen["empty_after_s"] < IDLE_S + SLACK_S, seen["changes"]
    record_property("changes", seen["changes"])
    changes = ", ".join(f"{count} at {at:.0f} s" for at, count in seen["changes"])
    print(f"{stage}: {seen['seconds']:.0f} s; workers: {changes}")
