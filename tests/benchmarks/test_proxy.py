"""The score against the accuracy: different shapes within the budget, and what the table says."""

import json
import subprocess
import sys

import numpy as np
import pytest

from stp_ray.elastic import Subnet

from .conftest import BENCHMARKS


@pytest.mark.timeout(300)
def test_shapes_differ_keep_the_budget_and_are_trained_once(tmp_path):
    command = [
        sys.executable, "proxy.py", "smoke", "--out", str(tmp_path / "smoke.jsonl"),
        "--work", str(tmp_path), "--subnets",
    ]  # fmt: skip
    seen = []
    for options in (["2"], ["3"], ["3"], ["3", "--again"]):
        if len(seen) == 2:  # a line that lacks a score gets it, the same again
            kept = [json.loads(line) for line in seen[-1]]
            del kept[0]["scores"]["100"]
            (tmp_path / "smoke.jsonl").write_text("\n".join(map(json.dumps, kept)))
        done = subprocess.run(
            [*command, *options], cwd=BENCHMARKS, capture_output=True, text=True, timeout=140
        )
        assert done.returncode == 0, done.stderr
        seen.append((tmp_path / "smoke.jsonl").read_text().splitlines())
    two, three, filled, twice = seen
    assert three[:2] == two and filled == three
    again = [json.loads(line).pop("again") for line in twice]
    assert again != [json.loads(line)["top1"] for line in twice]  # of other images at each step
    assert [
        {**json.loads(line), "again": top1} for line, top1 in zip(three, again, strict=True)
    ] == [json.loads(line) for line in twice]
    kept[0]["scores"]["0"] += 0.1  # by another supernet
    (tmp_path / "smoke.jsonl").write_text("\n".join(map(json.dumps, kept)))
    refused = subprocess.run(
        [*command, "3"], cwd=BENCHMARKS, capture_output=True, text=True, timeout=140
    )
    assert refused.returncode == 1 and "expected the supernet that" in refused.stderr
    lines = [json.loads(line) for line in three]
    assert [line["how"] for line in lines] == ["explored", "uniform", "random"]
    assert len({Subnet.from_json(line["subnet"]).id for line in lines}) == 3
    for line in lines:
        assert 0 < line["macs"] <= line["budget"] * line["full_macs"]
        few = ["0", "10", "25", "50", "100"]
        assert list(line["scores"]) == [*few, "25 on 4096", "200 on 4096"]
        assert max(line["scores"]["100"], line["scores"]["200 on 4096"]) < line["scores"]["0"]
        assert line["top1"] > 25  # of ten classes


def line(score, top1, how="random", budget=0.15):
    return {
        "method": "stp", "seed": 0, "budget": budget, "how": how, "top1": top1,
        "scores": {"0": score, "200 on 4096": -score},
        "device": "x86_64", "threads": 1, "torch": "2.15.0", "revision": "abc",
    }  # fmt: skip


def test_tau_is_one_where_the_lowest_score_is_the_most_accurate():
    from proxy_table import tau

    found = [line(score, 60 - score) for score in range(6)]
    assert tau(found, "0")[0] == pytest.approx(1)
    assert tau(found, "200 on 4096")[0] == pytest.approx(-1)


def test_no_score_ranks_better_than_what_two_trainings_differ_by_lets_it():
    from proxy_table import apart, most, tau

    rng = np.random.default_rng(0)
    worth = rng.normal(size=2000)  # of each shape; a training errs by as much as shapes differ
    first, second = worth + rng.normal(size=(2, 2000))
    found = [
        {**line(-knows, once), "again": again}
        for knows, once, again in zip(worth, first, second, strict=True)
    ]
    reached = tau(found, "0")[0]
    assert reached == pytest.approx(0.5, abs=0.03) == most(found, apart(found))
    assert most(found, 0.0) == 1 and most(found, 9.0) == 0


def test_a_second_training_has_columns_of_its_own(tmp_path):
    from proxy_table import section

    lines = [line(score, 60 - score, how) for score, how in enumerate(["explored", "uniform"])]
    lines += [line(score, 60 - score) for score in range(2, 6)]
    lines[0]["again"], lines[1]["again"] = 58, 59  # of 60 and 59
    (tmp_path / "smoke.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (cells,) = [text.split(" | ") for text in section(tmp_path, tmp_path) if text[:5] == "| stp"]
    assert cells[6:9] == ["1.00 (2)", "-1.00", "0.64"]


def test_what_a_score_has_chosen_is_left_out_in_brackets(tmp_path):
    from proxy_table import section

    lines = [line(0, 60, "explored"), line(9, 50, "uniform")]
    lines += [line(score, 50 + score) for score in range(2, 6)]  # which the score ranks upside down
    (tmp_path / "smoke.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (cells,) = [text.split(" | ") for text in section(tmp_path, tmp_path) if text[:5] == "| stp"]
    assert cells[4] == "0.20 (-1.00)"


def test_scores_that_some_lack_are_left_out(tmp_path):
    from proxy_table import section

    lines = [line(score, 60 - score, how) for score, how in enumerate(["explored", "uniform"])]
    lines += [line(score, 60 - score) for score in range(2, 5)]
    lines += [{**each, "seed": 1} for each in lines]
    for each in lines[:5]:
        each["scores"] = {"0": each["scores"]["0"]}
    (tmp_path / "smoke.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = section(tmp_path, tmp_path)
    assert "tau, 200 steps, 4,096 images" in "".join(page)
    rows = [text.split(" | ") for text in page if text[:5] == "| stp"]
    assert [cells[4:6] for cells in rows] == [
        ["1.00* (1.00)", "–"],
        ["1.00* (1.00)", "-1.00* (-1.00)"],
    ]


def test_the_table_has_a_row_for_each_seed_and_budget_and_a_plot(tmp_path):
    from proxy_table import section

    assert section(tmp_path, tmp_path) == []
    lines = [
        line(score, 60 - score + (budget == 0.05), how, budget)
        for budget in (0.05, 0.15)
        for score, how in enumerate(["explored", "uniform", "random", "random"])
    ]
    (tmp_path / "smoke.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = section(tmp_path, tmp_path)
    rows = [text.split(" | ") for text in page if text.startswith("| stp")]
    assert [cells[2] for cells in rows] == ["0.15", "0.05"]
    assert [cells[4:] for cells in rows] == [
        ["1.00 (1.00)", "-1.00 (-1.00)", "–", "–", "–", "60.00", "59.00", "57.50", "58.00 |"],
        ["1.00 (1.00)", "-1.00 (-1.00)", "–", "–", "–", "61.00", "60.00", "58.50", "59.00 |"],
    ]  # fmt: skip
    assert (tmp_path / "smoke-proxy.svg").read_text().count("explored") >= 1
    assert "![Accuracy against the score](smoke-proxy.svg)" in page
