"""The networks that inference compares keep one budget."""

import argparse

import pytest
import torch
from torch import nn

from stp_ray.elastic import Budget, Supernet, latency
from stp_ray.models import build_model

BUDGET = 0.3


@pytest.fixture
def inference(setting, monkeypatch):
    from measure import inference

    monkeypatch.setattr(latency, "NETWORKS", 5)  # each is exported, which takes seconds
    monkeypatch.setattr(latency, "NEAR", 1)
    return inference


def test_every_network_is_as_large_as_the_budget_allows_and_no_larger(inference):
    dense = build_model("resnet20", num_classes=10, image_size=8).eval()
    example = torch.randn(1, 3, 8, 8)
    full = inference.macs_of(dense, example)
    net, bound = Supernet.trace(dense, example, divisor=2), Budget(macs=BUDGET)
    found = inference.pruned(net, dense, example, bound, divisor=2)
    assert {"Torch-Pruning, even", "Torch-Pruning, global"} <= found.keys()
    fastest = inference.fastest(
        net.space, bound, example, lambda subnet: inference._program(net.extract(subnet), example)
    )
    found["fast shape"] = net.extract(fastest)
    shares = {name: inference.macs_of(network, example) / full for name, network in found.items()}
    # A step of the smallest widths is a few per cent of so small a network.
    assert all(0.7 * BUDGET < share <= BUDGET for share in shares.values()), shares
    for network in found.values():
        convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
        assert all(part.out_channels % 2 == 0 for part in convolutions)


def test_a_line_for_each_runtime_and_batch(inference):
    chosen = argparse.Namespace(
        model="resnet20", size=8, budget=BUDGET, divisor=2, batches=[1, 2], repeats=[2, 1],
        processor_time=False,
    )  # fmt: skip
    lines = list(inference.measure(chosen, torch.device("cpu")))
    places = [(line["runtime"], line["batch"], line["repeats"]) for line in lines]
    assert places == [
        ("eager", 1, 2),
        ("ONNX Runtime", 1, 2),
        ("eager", 2, 1),
        ("ONNX Runtime", 2, 1),
    ]
    for line in lines:
        assert line["faster"].keys() == line["macs"].keys() - {"dense"}
        assert all(ratio > 0 for ratio in line["faster"].values())


def test_a_pruner_that_cannot_get_so_small_is_left_out_and_the_table_shows_it(inference):
    dense = build_model("resnet20", num_classes=10, image_size=8).eval()
    example = torch.randn(1, 3, 8, 8)
    assert inference.torch_pruned(dense, example, 1e-5, divisor=2, everywhere=False) is None
    line = {
        "model": "resnet20", "size": 8, "divisor": 2, "runtime": "eager", "batch": 1,
        "device": "x86_64", "threads": 1, "clock": "wall", "dense_ms": 3.0,
    }  # fmt: skip
    both = {"faster": {"ours": 2.0, "theirs": 1.5}, "macs": {"ours": 0.1, "theirs": 0.1}}
    one = {"faster": {"ours": 2.0}, "macs": {"ours": 0.1}}
    *_, first, second, _ = inference.table([{**line, **both}, {**line, **one}])
    assert first.endswith("| 2.00 (0.100) | 1.50 (0.100) |")
    assert second.endswith("| 2.00 (0.100) | – |")


def test_the_program_that_is_timed_computes_what_the_network_does(inference):
    network = build_model("resnet20", num_classes=10, image_size=8).eval()
    images = torch.randn(3, 3, 8, 8)
    (logits,) = inference._onnx(inference._program(network, images[:1]))(images)
    expected = inference._eager(network)(images)
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-4)
