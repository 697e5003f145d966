"""What is calculated follows from the constants that it names."""

import argparse

import pytest
import torch


@pytest.fixture
def paper(setting):
    from measure import paper

    return paper


def test_a_ring_sends_every_byte_twice_over_its_slowest_link(paper):
    assert paper.ring(1e9, 1) == 0
    assert paper.ring(1e9, 8) == pytest.approx(2 * 7 / 8 * 1e9 / paper.WITHIN)
    assert paper.ring(1e9, 64) == pytest.approx(2 * 63 / 64 * 1e9 / paper.BETWEEN)


def test_the_recipe_on_more_gpus(paper):
    chosen = argparse.Namespace(recipe="imagenet_resnet50")
    lines = {line["gpus"]: line for line in paper.measure(chosen, torch.device("cpu"))}
    one = lines[1]
    # 100 epochs of the dense network at the public rate, and nobody to send to.
    hours = 100 * (paper.TRAIN - 10_000) / paper.IMAGES_PER_S / 3600
    assert one["hours"]["baseline"] == pytest.approx(hours, abs=0.01)
    assert one["network_share"] == 0
    assert one["dollars"] == pytest.approx(one["total_hours"] * paper.PRICE, rel=0.01)
    # More GPUs take less time, but no less than their share, and send more.
    for few, many in ((1, 8), (8, 64)):
        assert lines[many]["total_hours"] < lines[few]["total_hours"]
        assert lines[many]["total_hours"] >= 0.99 * lines[few]["total_hours"] * few / many
        assert lines[many]["network_share"] > lines[few]["network_share"]
