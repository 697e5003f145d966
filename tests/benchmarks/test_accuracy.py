"""Every method of the comparison runs, keeps its budget and spends no more than ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 0.3
pytestmark = pytest.mark.xdist_group("accuracy")  # one process, so that `lines` are made once


def smoke(out, *options, timeout):
    command = [sys.executable, "benchmarks/accuracy.py", "--smoke", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return smoke(tmp_path_factory.mktemp("accuracy") / "smoke.jsonl", timeout=880)


@pytest.mark.timeout(900)
def test_every_method_runs_under_both_accounts(lines):
    equal = {account: {line["method"] for line in lines if line["equal"] == account}
             for account in ("epochs", "macs")}  # fmt: skip
    ours = {method for method in equal["epochs"] if method.startswith("stp")}
    assert {"stp", "stp, uniform widths", "stp, random subnet", "stp, no expansion"} <= ours
    lean = {"stp, main let go", "stp, target alone", "stp, target alone, shapes tried"}
    dear = {"stp, target alone, finals", "stp, target alone, finals tried"}
    assert dear <= ours  # but their search alone costs more than all of so short a training
    twice = {"dense, twice the epochs"}
    twice |= {
        f"scratch + distillation, shape {of}, twice the epochs"
        for of in ("from the teacher", "of finals")
    }
    assert twice <= equal["epochs"]
    assert equal["macs"] == equal["epochs"] - ours - twice | lean
    assert {"dense", "scratch", "scratch + distillation", "torch-pruning"} <= equal["macs"]


def test_a_pruned_network_keeps_its_budget(lines):
    for line in lines:
        if not line["method"].startswith("dense"):
            assert 0 < line["macs"] <= BUDGET * line["full_macs"], line["method"]


def test_all_have_the_epochs_or_the_macs_that_their_account_allows(lines):
    (ours,) = [line for line in lines if line["method"] == "stp"]
    for line in lines:
        if line["equal"] == "epochs":
            twice = line["method"].endswith("twice the epochs")
            assert line["epochs"] == (8 if twice else 4), line["method"]
        else:  # and leave no epoch unused
            allowed, dense = ours["training_macs"], 3 * 4 * 64 * line["full_macs"]
            epoch = max(dense, line["training_macs"] / line["epochs"])
            assert allowed - epoch < line["training_macs"] <= allowed, line["method"]


def test_the_course_of_norms_is_kept_where_a_plot_draws_it(lines):
    for line in lines:
        if line["method"] == "stp, main let go":
            kept = {"epochs": line["epochs"] + 1, "macs": 2}  # from the first weights on
            assert len(line["sparsity"]) == kept[line["equal"]]


def test_networks_learn(lines):
    """Ten classes: a guess is right one time in ten."""
    best = {line["method"]: 0.0 for line in lines}
    for line in lines:
        best[line["method"]] = max(best[line["method"]], line["top1"])
    assert min(best.values()) > 25, best


@pytest.mark.timeout(200, func_only=True)  # `lines` have a limit of their own
def test_networks_trained_side_by_side_are_those_trained_one_by_one(lines, tmp_path):
    methods = ("stp, taught, four subnets a step", "scratch + distillation, shape of four", "dense")
    options = ("--jobs", "2", "--equal", "epochs", "--method", *methods)
    found = smoke(tmp_path / "smoke.jsonl", *options, timeout=180)
    assert {line["method"] for line in found} == set(methods)
    for line in found:
        (same,) = [
            other for other in lines
            if (other["method"], other["equal"]) == (line["method"], "epochs")
        ]  # fmt: skip
        assert {**line, "seconds": 0} == {**same, "seconds": 0}
