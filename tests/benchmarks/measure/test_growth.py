"""How time grows is measured at sizes that do grow."""

import argparse
from itertools import groupby

import torch


def test_every_quantity_is_measured_at_all_of_its_sizes(setting):
    from measure import growth

    chosen = argparse.Namespace(
        model="resnet20", subnets=[1, 3], networks=["resnet20", "resnet56"], populations=[4, 8],
        images=[20, 40], repeats=1, processor_time=True,
    )  # fmt: skip
    lines = list(growth.measure(chosen, torch.device("cpu")))
    sizes = {
        quantity: [line["size"] for line in found]
        for quantity, found in groupby(lines, key=lambda line: line["quantity"])
    }
    assert len(sizes) == 6
    assert all(len(found) == 2 and found[0] < found[1] for found in sizes.values()), sizes
    assert sizes["loading images of 32 px"] == [20, 40]
    for line in lines:
        assert 0 < line["each_ms"] <= line["ms"]
