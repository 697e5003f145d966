"""Jobs where no other machine can be reached, the internet least of all; `make test-cluster`."""

import sys

import pytest

from tests.cluster.apart import run_apart
from tests.stages.runs import ROOT

LIMIT_S = 900
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(LIMIT_S + 60)]

#: Whole jobs, given to a head of their own.
JOBS = (
    "test_a_submitted_run_shows_progress_and_a_failing_one_fails",
    "test_a_stopped_job_is_finished_by_another_driver",
)

#: Runs tests where the machine has no way out: else they would show nothing.
TESTS = """
import socket, sys, pytest
names = [name for _, name in socket.if_nameindex()]
assert names == ["lo"], f"expected loopback alone, found {names}"
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_jobs_run_stop_and_are_resumed_without_a_network(tmp_path):
    file = ROOT / "tests" / "stages" / "test_jobs.py"
    tests = [f"{file}::{name}" for name in JOBS]
    command = [sys.executable, "-c", TESTS, *tests, "-v", "-p", "no:cacheprovider"]
    output = run_apart(command, tmp_path / "log", LIMIT_S)
    assert output.count(" PASSED") == len(JOBS), output
