"""The measurements of a step run, and compare what they say they compare."""

import argparse
import random

import pytest
import torch


@pytest.fixture
def speed(monkeypatch):
    import speed

    monkeypatch.setitem(speed.CASES, "resnet20", speed.Case(size=8, batch=4))
    return speed


def test_every_way_of_a_step_is_timed(speed):
    chosen = argparse.Namespace(
        model="resnet20", subnets=2, draws=2, repeats=1, processor_time=False
    )
    line = speed.step(chosen, torch.device("cpu"))
    assert line["ratio"].keys() == {"ours", *speed.OTHERS}
    assert all(ratio > 0 for ratio in line["ratio"].values())


@pytest.mark.parametrize("way", ["at_once", "one_by_one"])
def test_the_other_ways_learn_what_ours_learns(speed, way):
    rng, found = random.Random(), []
    for make in (speed.Setting.our_step, getattr(speed, way)):
        setting = speed.Setting("resnet20", torch.device("cpu"))
        rng.seed(1)
        make(setting, [setting.net.space.sample(rng) for _ in range(2)])()
        found.append({name: p.grad for name, p in setting.net.named_parameters()})
    for name, expected in found[1].items():
        assert torch.allclose(found[0][name], expected, rtol=1e-3, atol=1e-5), name


def test_a_mask_zeroes_what_the_subnet_drops(speed):
    setting = speed.Setting("resnet20", torch.device("cpu"))
    subnet = setting.net.space.smallest
    masked = speed._masks(setting, subnet)
    cuts = setting.net.slices(subnet)
    assert masked
    names = {layer: name for name, layer in setting.dense.named_modules()}
    for layer, mask in masked:
        assert int(mask.sum()) == cuts[f"{names[layer]}.weight"][0][0][1]
