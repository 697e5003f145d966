"""How long a network takes."""

import pytest
import torch
from torch import nn

from stp_ray import export


def test_latency_is_a_median_and_restores_the_thread_count(module, example, monkeypatch):
    before = torch.get_num_threads()
    ticks = iter([0.0, 1.0, 0.0, 9.0, 0.0, 2.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    module.train()
    assert export.latency(module, example, repeats=3) == 2.0
    assert module.training
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="repeats=0"):
        export.latency(module, example, repeats=0)


def test_weights_that_a_hook_computes_are_measured_after_a_step(example):
    module = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)), nn.Flatten())
    module(example).sum().backward()
    assert export.latency(module, example, repeats=3) > 0


def test_latency_grows_with_the_work(module):
    little = export.latency(module, torch.randn(1, 3, 8, 8), repeats=15)
    much = export.latency(module, torch.randn(8, 3, 96, 96), repeats=15)
    assert 0 < little < much
