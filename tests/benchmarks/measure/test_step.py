"""The measurements of a step run, and compare what they say they compare."""

import argparse
import random

import pytest
import torch


@pytest.fixture
def step(setting):
    from measure import step

    return step


@pytest.mark.timeout(200)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_way_of_a_step_is_timed(step, workers, monkeypatch):
    from measure import group

    monkeypatch.setattr(group, "PATIENCE", 150)  # more than two imports on busy cores
    chosen = argparse.Namespace(
        model="resnet20", subnets=2, draws=2, repeats=1, workers=workers, processor_time=False
    )
    (line,) = step.measure(chosen, torch.device("cpu"))
    assert line["workers"] == workers
    assert line["ratio"].keys() == {"ours", *step.OTHERS}
    assert all(ratio > 0 for ratio in line["ratio"].values())


@pytest.mark.parametrize("way", ["at_once", "one_by_one"])
def test_the_other_ways_learn_what_ours_learns(setting, step, way):
    rng, found = random.Random(), []
    for make in (setting.Setting.our_step, getattr(step, way)):
        chosen = setting.Setting("resnet20", torch.device("cpu"))
        rng.seed(1)
        make(chosen, [chosen.net.space.sample(rng) for _ in range(2)])()
        found.append({name: p.grad for name, p in chosen.net.named_parameters()})
    for name, expected in found[1].items():
        assert torch.allclose(found[0][name], expected, rtol=1e-3, atol=1e-5), name


def test_a_mask_zeroes_what_the_subnet_drops(setting, step):
    chosen = setting.Setting("resnet20", torch.device("cpu"))
    subnet = chosen.net.space.smallest
    masked = step._masks(chosen, subnet)
    cuts = chosen.net.slices(subnet)
    assert masked
    names = {layer: name for name, layer in chosen.dense.named_modules()}
    for layer, mask in masked:
        assert int(mask.sum()) == cuts[f"{names[layer]}.weight"][0][0][1]
