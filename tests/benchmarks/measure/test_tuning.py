"""What Tune adds is measured in a search that really runs."""

import json
import sys

import pytest

from tests.stages.runs import ROOT, Process, environment


@pytest.mark.timeout(240)
def test_a_search_is_timed_trial_by_trial(tmp_path):
    command = (
        "tuning --size 8 --calibration 32 --scoring 16 --population 12 --batch 3 --threads 1 --out"
    )
    program = [sys.executable, "benchmarks/speed.py", *command.split(), str(tmp_path)]
    process = Process(program, tmp_path / "log", cwd=ROOT, env=environment())
    try:
        assert process.wait(220) == 0, process.output
    finally:
        process.end()
    (line,) = map(json.loads, (tmp_path / "tuning.jsonl").read_text().splitlines())
    # Two generations of 12, each in 4 trials; all but the first trial are timed.
    assert (line["trials"], line["candidates"]) == (7, 21)
    assert line["scoring_s"] > 0
    assert line["share"] == pytest.approx(line["added_s"] / line["scoring_s"], rel=0.1, abs=1e-3)
