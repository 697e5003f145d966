"""The budget that the measurement is about is kept by what it leads to."""

import argparse

import torch


def test_a_line_says_how_a_budget_was_met(setting):
    from measure import latency

    chosen = argparse.Namespace(
        model="resnet20", size=16, budget=0.5, divisor=8, candidates=50, seed=0, eager=True
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (line,) = latency.measure(chosen, torch.device("cpu"))
    torch.set_num_threads(threads)
    assert line["used"] <= 1 and line["networks"] <= 25
    assert len(line["again"]) == latency.LOOKS and all(0.3 < share < 2 for share in line["again"])
    (head, _, found) = latency.table([{**line, "device": "x86_64", "threads": 1}])[-4:-1]
    assert head.count("|") == found.count("|") and "resnet20" in found
