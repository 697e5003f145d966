"""SIGKILL in the middle of each stage: the same command goes on, and ends in the same bits."""

import json
import os
import signal

import pyarrow.parquet as pq
import pytest

from tests.stages.runs import BUDGETS, WEIGHTS, Process, files, stp, times, wait_for

pytestmark = pytest.mark.timeout(1800)

#: Seconds that each step may take on a machine that is busy with other things.
PATIENCE_S = 400


def _interruptible() -> None:
    """What runs in the background hands on that it ignores interruptions."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Disturbed:
    """The recipe of an undisturbed run, started again and again in a storage of its own."""

    def __init__(self, undisturbed, folder, start):
        self.folder = folder / "runs" / undisturbed.run_id
        self._command = stp("run", str(undisturbed.recipe), f"storage={folder / 'runs'}")
        self._home, self._start, self._times = folder, start, 0

    def start(self) -> Process:
        self._times += 1
        log = self._home / f"log-{self._times}"
        return self._start(self._command, log, cwd=self._home, preexec_fn=_interruptible)

    def found(self, pattern: str) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.glob(pattern)}

    def stages(self) -> set[str]:
        path = self.folder / "manifest.json"
        return set(json.loads(path.read_text())["stages"]) if path.exists() else set()


def test_an_interruption_ends_it_in_training_and_after_one(undisturbed, tmp_path, start):
    """Ray Train has a handler of its own for it, which would outlive the training."""
    run = Disturbed(undisturbed, tmp_path, start)
    for pattern in ("supernet/checkpoint-*/complete.json", "explore/parts/*"):
        driver = run.start()
        wait_for(lambda p=pattern: run.found(p), PATIENCE_S, pattern, driver.running)
        os.kill(driver.pid, signal.SIGINT)
        assert driver.wait(PATIENCE_S) == 128 + signal.SIGINT, driver.output
        assert "stopped; the same command goes on where it was" in driver.output
        driver.end()
    assert run.stages() == {"supernet"}


def test_killed_in_every_stage_it_ends_in_the_same_bits(undisturbed, tmp_path, start):
    run = Disturbed(undisturbed, tmp_path, start)
    states = "supernet/checkpoint-*/complete.json"

    # The driver, while the supernet is trained.
    driver = run.start()
    wait_for(lambda: run.found(states), PATIENCE_S, "a checkpoint", driver.running)
    driver.kill()
    assert not run.found("supernet/result.json")
    assert run.stages() == set()

    # One of the two workers, after the same command went on from that checkpoint.
    before = run.found(states)
    driver = run.start()
    wait_for(lambda: run.found(states) - before, PATIENCE_S, "a new checkpoint", driver.running)
    workers = driver.workers()
    assert len(workers) == 2
    os.kill(min(workers), signal.SIGKILL)
    assert not run.found("supernet/result.json")
    wait_for(
        lambda: driver.workers() - workers, PATIENCE_S, "another worker",
        driver.running,
    )  # fmt: skip

    # The driver, while candidates are scored.
    wait_for(lambda: run.found("explore/parts/*"), PATIENCE_S, "a part", driver.running)
    driver.kill()
    assert not run.found("explore/front.json")
    assert run.stages() == {"supernet"}
    done = {f"supernet/{name}" for name in files(run.folder / "supernet")}
    done |= run.found("explore/parts/*.parquet")
    written = times(run.folder, done)

    # The driver, while the budgets are finalised.
    driver = run.start()
    states = "budget-*/checkpoint-*/complete.json"
    wait_for(lambda: run.found(states), PATIENCE_S, "a budget's checkpoint", driver.running)
    driver.kill()
    assert not run.found("budget-*/pruned.json")
    assert run.stages() == {"supernet", "explore"}
    assert times(run.folder, written) == written
    done |= {f"explore/{name}" for name in files(run.folder / "explore")}
    written = times(run.folder, done)

    driver = run.start()
    assert driver.wait(PATIENCE_S) == 0, driver.output
    assert driver.output.splitlines()[-1].endswith("/report.html")
    assert times(run.folder, written) == written
    for name in (*WEIGHTS, "explore/front.json"):
        assert (run.folder / name).read_bytes() == undisturbed.files[name], name
    for label in BUDGETS:
        mine = json.loads((run.folder / "summary.json").read_text())["budgets"][label]
        other = json.loads(undisturbed.files["summary.json"])["budgets"][label]
        for key in ("top1", "macs", "params", "subnet_id", "retention_main"):
            assert mine[key] == other[key]
    # The curves go on where they stopped: every epoch is there once.
    for name in ("supernet", *(f"budget-{label}" for label in BUDGETS)):
        epochs = pq.read_table(run.folder / name / "metrics.parquet").column("epoch").to_pylist()
        assert epochs == [1, 2, 3, 4, 5, 6]
