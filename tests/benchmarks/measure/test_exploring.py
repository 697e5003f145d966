"""Scoring is compared with the very passes that it stands for."""

import argparse

import pytest
import torch

from stp_ray.data import describe
from stp_ray.method import calibrate
from stp_ray.stages.explore import Scorer
from stp_ray.stages.images import share
from stp_ray.stages.network import build_supernet


@pytest.fixture
def exploring(setting):
    from measure import exploring

    return exploring


def test_the_rate_and_the_ratio_are_of_the_same_candidates(exploring):
    chosen = argparse.Namespace(
        model="resnet20", size=8, calibration=64, scoring=32, candidates=3, repeats=1,
        processor_time=True, threads=1,
    )  # fmt: skip
    (line,) = exploring.measure(chosen, torch.device("cpu"))
    assert line["clock"] == "processor"
    assert 0 < line["macs"] < max(exploring.BUDGETS)
    low, high = line["quartiles"]
    assert 0 < low <= line["ratio"] <= high
    assert line["candidates_per_s"] > 0


def test_the_plain_passes_come_to_the_statistics_that_calibration_finds(exploring):
    config = exploring.settings("resnet20", 8, 64, 32)
    summary = describe(config.data)
    weights = build_supernet(config, summary).model.state_dict()
    images = share(config.data, summary, in_process=True)
    scorer = Scorer(config, images.here(), weights, torch.device("cpu"))
    subnet = scorer.net.space.uniform(0.5)
    kept = []
    extract = scorer.net.extract
    scorer.net.extract = lambda subnet: kept.append(extract(subnet)) or kept[-1]
    exploring.alone(scorer, subnet, 0)()
    buffers = dict(kept[0].named_buffers())
    for layer, found in calibrate(scorer.net, subnet, scorer.calibration).items():
        for name, expected in found.items():
            assert torch.allclose(buffers[f"{layer}.{name}"], expected, atol=1e-4), layer
