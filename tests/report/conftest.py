import copy
import io
import json
import random

import pyarrow as pa
import pytest
from PIL import Image

from stp_ray.elastic.cost import Extent, Term
from stp_ray.elastic.space import ResidualBlock, SearchSpace, WidthAxis
from stp_ray.report import render, with_space


@pytest.fixture(scope="session")
def space():
    axes = [
        WidthAxis("stem", 16, (4, 8, 16), layers=("stem", "block.last")),
        WidthAxis("block.inner", 32, (8, 16, 32)),
    ]
    blocks = [ResidualBlock("block", axes=("block.inner",), layers=("block.last",))]
    macs = [Term(100, (Extent(0, (("stem", 1),)), Extent(0, (("block.inner", 1),))))]
    return SearchSpace(axes, blocks, macs, macs)


@pytest.fixture(scope="session")
def candidates(space):
    rng = random.Random(0)
    subnets = [space.sample(rng) for _ in range(40)]
    rows = [
        {
            "subnet_id": subnet.id,
            "subnet": subnet.to_json(),
            "macs": space.cost(subnet).macs,
            "params": space.cost(subnet).params,
            "score": 1.0 / (1 + i),
            "images": 128,
            "steps": 0,
            "generation": i // 8,
        }
        for i, subnet in enumerate({s.id: s for s in subnets}.values())
    ]
    # scored again on all images after a short distillation, and worse than others as they are
    rows.append({**rows[0], "images": 0, "steps": 25, "score": 0.123})
    return with_space(pa.Table.from_pylist(rows), space)


@pytest.fixture(scope="session")
def _summary(candidates):
    rows = candidates.to_pylist()

    def entry(row, top1, **changes):
        return {
            "top1": top1,
            "retention_dense": 100 * top1 / 98,
            "retention_main": 100 * top1 / 97.5,
            "macs": row["macs"],
            "params": row["params"],
            "latency_ms": 0.5,
            "dense_latency_ms": 1.75,
            "subnet_id": row["subnet_id"],
            "uri": "runs/demo/budget",
            **changes,
        }

    return {
        "run_id": "demo-<script>alert(1)</script>",
        "storage": "runs",
        "dense_top1": 98.0,
        "main_top1": 97.5,
        "macs": 51_200,
        "params": 51_200,
        "budgets": {"0.5": entry(rows[0], 97.31), "0.15": entry(rows[1], 96.12)},
        "seconds": 3725.4,
    }


@pytest.fixture
def summary(_summary):
    """A copy of its own for each test, which may change it."""
    return copy.deepcopy(_summary)


@pytest.fixture(scope="session")
def config():
    return {
        "name": "demo",
        "model": {"name": "resnet20", "kwargs": {}},
        "data": {"name": "digits"},
        "cluster": {"device_price": 36.0},
        "note": "</pre><img src=https://evil.example/x>",
    }


@pytest.fixture(scope="session")
def curves():
    steps = list(range(1000))
    return {
        "supernet": pa.table(
            {
                "step": steps,
                "epoch": [step // 100 for step in steps],
                "lr": [0.1] * 1000,
                "loss": [2.0 / (1 + step) for step in steps],
                "kl": [float("nan") if step % 2 else 1.0 for step in steps],
                "top1": [50.0 + step / 25 if step % 100 == 99 else None for step in steps],
                "kept_norm": [2.0] * 1000,
                "dropped_norm": [1.0] * 1000,
                "ratio": [2.0] * 1000,
                "split": ["train"] * 1000,
            }
        ),
        "budget $0.15$": pa.table({"epoch": [0, 1], "loss": [0.5, 0.25], "top1": [90.0, 96.0]}),
    }


@pytest.fixture(scope="session")
def pruned():
    """Of one budget only: a run may have lost the other's."""
    figures = {"difference": 2e-7, "latency_ms": 0.25, "seconds": 1.5}
    return {"0.15": {"compared_with": "baseline", "programs": {"onnx": figures}}}


@pytest.fixture(scope="session")
def predictions():
    """Three cats and a dog: one cat is lost, the dog is won."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, "PNG")
    rows = [
        {"label": 0, "before": 0, "after": 0, "image": None},
        {"label": 0, "before": 0, "after": 1, "image": file.getvalue()},
        {"label": 0, "before": 1, "after": 1, "image": None},
        {"label": 1, "before": 0, "after": 1, "image": file.getvalue()},
    ]
    names = {"class_names": json.dumps(["cat <1>", "dog"])}
    return {"0.15": pa.Table.from_pylist(rows).replace_schema_metadata(names)}


@pytest.fixture(scope="session")
def stages():
    return {
        "supernet": {"seconds": 90.0, "device_seconds": 180.0},
        "finalize/0.15": {"seconds": 60.0, "device_seconds": 60.0},
    }


@pytest.fixture(scope="session")
def text(_summary, config, candidates, curves, stages, pruned, predictions):
    """The page, which takes two seconds to draw."""
    return render(
        _summary, config, candidates, curves, environment={"torch": "2.15"}, stages=stages,
        pruned=pruned, predictions=predictions,
    )  # fmt: skip
