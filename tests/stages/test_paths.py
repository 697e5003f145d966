"""Paths that are relative to where a run is started, through Ray, whose workers stand elsewhere."""

import pytest
import torch

from stp_ray.models import build_model
from tests.data.samples import write_parquet
from tests.stages.runs import minimal, stp, write_recipe

pytestmark = pytest.mark.timeout(900)


def test_streamed_data_and_weights_beside_the_recipe_are_found(tmp_path, start):
    write_parquet(tmp_path / "set", train=160, test=32)
    torch.save(build_model("resnet20", num_classes=4).state_dict(), tmp_path / "first.pt")
    content = minimal(
        model={"weights": "first.pt"},
        cluster={"in_process": False, "num_workers": 2},
        finalize={"num_workers": 1},
    )
    content["data"] = {"name": "parquet", "uri": "set", "loading": "stream", "holdout": 32}
    recipe = write_recipe(tmp_path, content)
    driver = start(stp("run", str(recipe), "storage=runs"), tmp_path / "log", cwd=tmp_path)
    assert driver.wait(800) == 0, driver.output
    assert (tmp_path / "runs/latest/summary.json").exists()
