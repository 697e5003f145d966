import pytest
import torch
from torch import nn

from stp_ray import timing
from stp_ray.errors import ExportError
from stp_ray.timing import Stopwatch

CPU = torch.device("cpu")


def network(width: int, depth: int = 2) -> nn.Module:
    """Convolutions of so many channels, and a head."""
    layers = [nn.Conv2d(3, width, 3, padding=1)]
    for _ in range(depth):
        layers += [nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@pytest.mark.parametrize("onnx", [False, True])
def test_ratios_follow_the_work_and_one_is_one(onnx):
    if onnx:
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    dense = network(64)
    watch = Stopwatch(dense, torch.zeros(2, 3, 32, 32), CPU, onnx=onnx)
    assert watch.runtime == ("ONNX Runtime" if onnx else "PyTorch")
    assert watch.where == f"1 CPU thread, {watch.runtime}"
    assert watch.ratio(dense) == pytest.approx(1, abs=0.15)
    assert watch.ratio(network(64, depth=1)) == pytest.approx(0.52, abs=0.2)
    assert watch.ratio(network(16)) < 0.4
    assert 0 < watch(network(16)) < watch.seconds


def test_what_cannot_be_exported_is_timed_in_pytorch(monkeypatch):
    def refuse(module, example):
        raise ExportError("no ONNX file")

    monkeypatch.setattr(timing, "onnx_program", refuse)
    threads = torch.get_num_threads()
    watch = Stopwatch(network(4), torch.zeros(1, 3, 8, 8), CPU, threads=2)
    assert watch.where == "2 CPU threads, PyTorch" and watch.ratio(network(4)) > 0
    assert torch.get_num_threads() == threads


def test_a_network_that_trains_is_left_as_it_is():
    module = network(4).train()
    module.append(nn.Dropout())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    watch = Stopwatch(module, torch.zeros(1, 3, 8, 8), CPU, onnx=False)
    watch.ratio(module)
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
