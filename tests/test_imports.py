"""What importing a part of the package loads, and what the package offers."""

import subprocess
import sys
from pathlib import Path

import pytest

import stp_ray as stp

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("ray", "wandb", "pandas", "pyarrow", "fsspec", "pydantic")


def loaded_by(statements: str) -> set[str]:
    """Top-level packages in `sys.modules` after these statements ran in a fresh process."""
    program = (
        f"{statements}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.timeout(120)
def test_the_mathematics_loads_no_cluster_tracker_storage_or_table_library():
    loaded = loaded_by("import stp_ray.elastic, stp_ray.method")
    assert "torch" in loaded and not loaded & {*HEAVY, "torchvision"}


@pytest.mark.timeout(120)
def test_using_the_mathematics_loads_none_either():
    loaded = loaded_by(
        "import torch, stp_ray as stp\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8),\n"
        "    torch.nn.Flatten(), torch.nn.Linear(288, 4))\n"
        "x = torch.zeros(2, 3, 8, 8)\n"
        "net = stp.Supernet.trace(model, x)\n"
        "sub = net.space.uniform(0.5)\n"
        "net.extract(sub, stp.calibrate(net, sub, [x]))(x).sum().backward()\n"
    )
    assert not loaded & set(HEAVY)


@pytest.mark.timeout(120)
def test_the_package_itself_loads_on_first_use():
    assert not loaded_by("import stp_ray") & {*HEAVY, "torch", "torchvision", "numpy"}


@pytest.mark.timeout(120)
def test_models_and_parquet_load_without_the_cluster():
    unwanted = {"ray", "pydantic", "wandb"}
    loaded = loaded_by("import stp_ray.models, stp_ray.data.parquet")
    assert "pyarrow" in loaded and not loaded & unwanted


@pytest.mark.timeout(120)
@pytest.mark.parametrize("module", ["relay", "notices", "quiet"])
def test_small_actors_start_without_what_takes_seconds_to_load(module):
    slow = {"torch", "torchvision", "pandas", "pyarrow", "sklearn"}
    assert not loaded_by(f"import stp_ray.stages.{module}") & slow


def test_public_names():
    from stp_ray import elastic, export, method

    for name in ("Supernet", "Subnet", "SearchSpace", "Budget", "Cost"):
        assert getattr(stp, name) is getattr(elastic, name)
    assert stp.calibrate is method.calibrate
    assert stp.load is export.load
    assert callable(stp.run)
    assert set(stp.__all__) == {
        "Budget", "Cost", "SearchSpace", "Subnet", "Supernet", "calibrate", "load", "run",
    }  # fmt: skip
    for name in ("trace", "forward", "cost", "extract"):
        assert callable(getattr(stp.Supernet, name))
    for name in ("sample", "mutate", "crossover", "expand", "uniform"):
        assert callable(getattr(stp.SearchSpace, name))
    with pytest.raises(AttributeError, match="module 'stp_ray' has no attribute 'Supernets'"):
        _ = stp.Supernets
