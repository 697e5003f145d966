"""What data-parallel workers send each other."""

import pytest


@pytest.mark.timeout(200)
def test_a_step_reduces_one_gradient_for_any_number_of_subnets(setting, monkeypatch):
    from measure import group, parallel

    monkeypatch.setattr(group, "PATIENCE", 150)  # more than two imports on busy cores
    found = parallel.run("resnet20", workers=2, steps=1)
    weights = setting.Setting("resnet20", "cpu").dense.parameters()
    assert found["gradient_bytes"] == 4 * sum(weight.numel() for weight in weights)
    assert found["reduced"] == {count: found["gradient_bytes"] for count in parallel.COUNTS}
    assert all(rate > 0 for rate in found["rate"].values())
