import functools
import random

import pytest
import torch

from stp_ray import export
from stp_ray.artifacts import Store
from stp_ray.config import load_config
from stp_ray.data import eval_batches, load
from stp_ray.elastic.supernet import Supernet
from stp_ray.method import calibrate
from stp_ray.models import build_model

from .networks import Small


@pytest.fixture
def module():
    torch.manual_seed(0)
    small = Small()
    small.norm.running_mean.normal_()
    small.norm.running_var.uniform_(0.5, 2)
    return small


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "model")


@pytest.fixture
def example():
    return torch.randn(1, 3, 12, 12)


@pytest.fixture(scope="session")
def held_out():
    """The test images of the demo, and a network of its smallest budget with their statistics: its
    logits lie closer together than those of a trained one."""
    config = load_config("demo")
    data = load(config.data)
    images = torch.cat([x for x, _ in eval_batches(data.test, config.data, 512)])
    torch.manual_seed(0)
    net = Supernet.trace(build_model(config.model.name, num_classes=10), images[:1])
    subnet = net.space.sample(random.Random(3), budget=config.budgets[-1])
    return net.extract(subnet, calibrate(net, subnet, images.split(90))).eval(), images


@pytest.fixture(scope="session")
def write(held_out, tmp_path_factory):
    """Writes that network in a format, once: the folder, and what `write_programs` returned."""
    folder = tmp_path_factory.mktemp("programs")
    module, images = held_out

    @functools.cache
    def written(kind):
        return folder, export.write_programs(Store(folder), module, images[:2], [kind])

    return written
